"""Scores from two sets of features: which ones can be computed, and their values. Ray tasks compute what is quadratic in size.

Metrics have descriptive names. With Inception's features they have their published names as well (published_name).

Shape legend: N generated samples, M reference samples, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from enat.config import check_in
from pipelines.cluster.resources import Execution
from pipelines.workflow.progress import Bar

if TYPE_CHECKING:
    from enat.metrics.moments import Moments


METRIC_VERSION = 1  # raised whenever the definition of a score changes; part of every protocol
METRICS = (
    "frechet_distance",
    "spatial_frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "density_coverage",
)
_OF_INCEPTION = {"frechet_distance": "fid", "spatial_frechet_distance": "sfid", "kernel_distance": "kid"}


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings of the metrics. If there are fewer samples than subsets or splits need, all of them are used."""

    num_splits: int = 10
    """Equal parts of the shuffled samples for the Inception score, as in torch-fidelity."""
    split_size: int | None = None
    """Parts of this many samples in order instead of num_splits, as in ADM's evaluation (5000). Unit: images."""
    kernel_subsets: int = 100
    """Subsets of the kernel distance."""
    kernel_subset_size: int = 1000
    """Images of one subset of the kernel distance, at least 2. Unit: images."""
    precision_neighbours: int = 3
    """Nearest neighbour whose distance is the radius of a ball, for precision and recall."""
    density_neighbours: int = 5
    """Nearest neighbour whose distance is the radius of a ball, for density and coverage."""
    seed: int = 2020
    """Seed of splits and subsets, in [0, 2**32). It is not the run's seed, so all models are scored on the same draws."""

    def __post_init__(self) -> None:
        counts = ("num_splits", "kernel_subsets", "precision_neighbours", "density_neighbours")
        check_in(self, "[1, inf)", *counts, "split_size")
        check_in(self, "[2, inf)", "kernel_subset_size")
        check_in(self, "[0, 4294967295]", "seed")  # numpy's
        if self.split_size is not None and self.num_splits != 10:
            raise ValueError(f"split_size replaces num_splits, which is {self.num_splits}; set only one of them")

    def fitted(self, num_generated: int, num_reference: int) -> ScoreSettings:
        """The settings for these numbers of samples. num_reference: reference images with stored features, 0 if none are stored."""
        subset = min(self.kernel_subset_size, num_generated, num_reference or num_generated)
        splits = min(self.num_splits, num_generated) if self.split_size is None else self.num_splits
        return replace(self, kernel_subset_size=max(2, subset), num_splits=max(1, splits))


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """Statistics of one set of images.

    moments: of outputs "features" and "spatial".   features, logits: float32 (N, width) of kept images in order, None if not kept.
    """

    moments: Mapping[str, Moments]
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Available:
    """Inputs that metrics can be computed from, known before anything is computed.

    outputs: of the extractor.   has_spatial: whether the reference has moments of "spatial".
    num_generated, num_reference: samples whose features are stored.
    """

    extractor: str
    outputs: Sequence[str]
    has_spatial: bool
    num_generated: int
    num_reference: int
    settings: ScoreSettings = field(default_factory=ScoreSettings)

    def obstacle(self, metric: str) -> str | None:
        """Why a metric cannot be computed, or None if it can."""
        if metric == "spatial_frechet_distance":
            if "spatial" not in self.outputs:
                return f"extractor {self.extractor} computes no spatial features"
            return None if self.has_spatial else "the reference has no moments of spatial features"
        if metric == "inception_score":
            return None if "logits" in self.outputs else f"extractor {self.extractor} computes no logits"
        if metric == "frechet_distance":
            return None
        if not self.num_reference:
            return "the reference stores moments only, not the features of single images"
        needed = {
            "kernel_distance": 2,
            "precision_recall": self.settings.precision_neighbours + 1,
            "density_coverage": self.settings.density_neighbours + 1,
        }[metric]
        fewest = min(self.num_generated, self.num_reference)
        return None if fewest >= needed else f"it needs {needed} generated and {needed} reference samples; one side has {fewest}"

    def chosen(self, metrics: Sequence[str] | None) -> tuple[str, ...]:
        """The named metrics and the Frechet distance, or all possible ones for None. Raises ValueError with the obstacle."""
        if metrics is None:
            return tuple(metric for metric in METRICS if self.obstacle(metric) is None)
        for metric in metrics:
            if (reason := self.obstacle(metric)) is not None:
                raise ValueError(f"evaluate.metrics names {metric}, which cannot be computed here: {reason}")
        return tuple(metric for metric in METRICS if metric in metrics or metric == "frechet_distance")


def published_name(metric: str, extractor: str) -> str:
    """Published name of a metric with Inception's features (fid, sfid, kid), else its own name."""
    return _OF_INCEPTION.get(metric, metric) if extractor == "inception" else metric


class TaskPool:
    """Runs Ray tasks, at most execution.num_workers at once. bar: makes a progress bar for a number of tasks.

    seconds: summed over tasks so far.   cpu_seconds: summed over tasks for the same scores that used a CPU only.
    """

    def __init__(self, execution: Execution, bar: Callable[[int], Bar]) -> None:
        self.execution, self.bar, self.seconds, self.cpu_seconds = execution, bar, 0.0, 0.0

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], bar: Bar) -> list[Any]:
        """Results in the order of the arguments, to which the device is added. Ray resolves object references among them."""
        import ray

        remote = ray.remote(**self.execution.resources)(_timed)
        results: dict[int, Any] = {}
        running: dict[Any, int] = {}
        remaining = iter(enumerate(arguments))
        while len(results) < len(arguments):
            while len(running) < self.execution.num_workers and (following := next(remaining, None)) is not None:
                number, given = following
                running[remote.remote(task, self.execution.num_threads, *given, device=self.execution.device)] = number
            for done in ray.wait(list(running))[0]:
                results[running.pop(done)], seconds = ray.get(done)
                self.seconds += seconds
                bar.advance(1)
        return [results[number] for number in range(len(arguments))]


def _timed(task: Callable[..., Any], num_threads: int, *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    import torch

    started = time.monotonic()
    torch.set_num_threads(num_threads)
    return task(*arguments, **keywords), time.monotonic() - started


def compute_scores(
    chosen: Sequence[str], generated: ImageStatistics, reference: ImageStatistics, settings: ScoreSettings, pool: TaskPool
) -> dict[str, float]:
    """Scores by the names in METRICS. Pairs are named by their parts; estimates have a second value with suffix _std."""
    import ray

    from enat.metrics.moments import frechet_distance, inception_score, kernel_distance

    on_one_thread = ray.remote(num_cpus=1)(_timed)  # sums must not depend on the CPUs of a worker
    stored = [None if side.features is None else ray.put(side.features) for side in (generated, reference)]
    estimates: dict[str, Any] = {}
    if "inception_score" in chosen:
        by_number = {"num_splits": settings.num_splits, "seed": settings.seed}
        sizes = by_number if settings.split_size is None else {"split_size": settings.split_size, "seed": None}
        estimates["inception_score"] = on_one_thread.remote(inception_score, 1, generated.logits, **sizes)
    if "kernel_distance" in chosen:
        sizes = {"num_subsets": settings.kernel_subsets, "subset_size": settings.kernel_subset_size, "seed": settings.seed}
        estimates["kernel_distance"] = on_one_thread.remote(kernel_distance, 1, *stored, **sizes)
    scores = {"frechet_distance": frechet_distance(generated.moments["features"], reference.moments["features"])}
    if "spatial_frechet_distance" in chosen:
        scores["spatial_frechet_distance"] = frechet_distance(generated.moments["spatial"], reference.moments["spatial"])
    for name, reference_to_result in estimates.items():
        estimate, seconds = ray.get(reference_to_result)
        pool.cpu_seconds += seconds
        scores[name], scores[f"{name}_std"] = estimate.value, estimate.std
    if {"precision_recall", "density_coverage"} & set(chosen):
        assert generated.features is not None and reference.features is not None
        sides = (len(generated.features), len(reference.features))
        scores |= _neighbour_scores(chosen, stored, sides, settings, pool)
    return scores


def _neighbour_scores(
    chosen: Sequence[str], stored: Sequence[Any], sizes: Sequence[int], settings: ScoreSettings, pool: TaskPool
) -> dict[str, float]:
    import ray

    from enat.metrics.neighbours import blocks_of, manifold_counts, scores_of_counts, squared_radii

    generated, reference = stored
    wants_precision, wants_density = "precision_recall" in chosen, "density_coverage" in chosen
    density = settings.density_neighbours if wants_density else settings.precision_neighbours
    precision = settings.precision_neighbours if wants_precision else density
    of_generated, of_reference = map(blocks_of, sizes)
    with pool.bar(2 * len(of_generated) + len(of_reference)) as bar:
        wanted: list[tuple[Any, ...]] = [(reference, (precision, density), rows) for rows in of_reference]
        wanted += [(generated, (precision,), rows) for rows in of_generated]
        radii = pool.run(squared_radii, wanted, bar)
        reference_radii = ray.put(np.concatenate(radii[: len(of_reference)]))
        own_radii = zip(of_generated, radii[len(of_reference) :], strict=True)
        arguments = [(reference, reference_radii, generated, own[:, 0], rows) for rows, own in own_radii]
        scores = scores_of_counts(pool.run(manifold_counts, arguments, bar), density)
    named = (["precision", "recall"] if wants_precision else []) + (["density", "coverage"] if wants_density else [])
    return {name: getattr(scores, name) for name in named}
