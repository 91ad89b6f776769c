"""Which scores can be computed of two sets of features, and computing them: what is quadratic in their number is spread over Ray.

Metrics are named for what they are; features of Inception give them their published names (published_name).

Shape legend: N generated samples, M reference samples, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch

from enat.metrics.moments import FeatureMoments, FeatureStatistics, frechet_distance, inception_score, kernel_distance
from enat.metrics.neighbours import ManifoldCounts, manifold_counts, merge_counts, squared_radii
from pipelines.cluster.resources import Execution
from pipelines.workflow.progress import Bar

METRIC_VERSION = 1  # raised whenever a score is defined otherwise; part of every protocol
METRICS = (
    "frechet_distance",
    "spatial_frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "density_coverage",
)
_OF_INCEPTION = {"frechet_distance": "fid", "spatial_frechet_distance": "sfid", "kernel_distance": "kid"}
_ROWS_PER_TASK = 4096

AnyMoments = FeatureMoments | FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """num_splits: of the Inception score, parts of equal size of the shuffled samples, as torch-fidelity takes them.
    split_size: in their place parts of so many samples in order, as ADM's evaluation takes them, with 5000.
    kernel_subsets, kernel_subset_size: of the kernel distance.
    precision_neighbours, density_neighbours: whose distance is the radius of a ball.   seed: of splits and subsets, not of the
    run, so that models are scored on the same draws. Of fewer samples than a subset or splits need, as many as there are.
    """

    num_splits: int = 10
    split_size: int | None = None
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    precision_neighbours: int = 3
    density_neighbours: int = 5
    seed: int = 2020

    def __post_init__(self) -> None:
        for name in ("num_splits", "kernel_subsets", "precision_neighbours", "density_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate.settings.{name} is {getattr(self, name)}; it must be at least 1")
        if self.split_size is not None and (self.split_size < 1 or self.num_splits != 10):
            raise ValueError("evaluate.settings.split_size must be at least 1, and takes the place of num_splits: give one of them")
        if self.kernel_subset_size < 2 or not 0 <= self.seed < 1 << 32:
            raise ValueError("evaluate.settings.kernel_subset_size must be at least 2, and seed in [0, 2**32)")

    def fitted(self, num_generated: int, num_reference: int) -> ScoreSettings:
        """What these numbers of samples allow of it; num_reference: whose features are known, 0 for none."""
        subset = min(self.kernel_subset_size, num_generated, num_reference or num_generated)
        splits = min(self.num_splits, num_generated) if self.split_size is None else self.num_splits
        return replace(self, kernel_subset_size=max(2, subset), num_splits=max(1, splits))


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """What is known of one set of images.

    moments: of outputs "features" and "spatial".   features, logits: float32 (N, width) of kept images, in order; None where none
    are kept.
    """

    moments: Mapping[str, AnyMoments]
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Available:
    """What a metric may be computed from, known before anything is. outputs: of the extractor.

    has_spatial: whether the reference has moments of "spatial".   num_generated, num_reference: samples whose features are known.
    """

    extractor: str
    outputs: Sequence[str]
    has_spatial: bool
    num_generated: int
    num_reference: int
    settings: ScoreSettings = field(default_factory=ScoreSettings)

    def obstacle(self, metric: str) -> str | None:
        """Why a metric cannot be computed; None where it can."""
        if metric == "spatial_frechet_distance":
            if "spatial" not in self.outputs:
                return f"extractor {self.extractor} gives no spatial features"
            return None if self.has_spatial else "the reference has no moments of spatial features"
        if metric == "inception_score":
            return None if "logits" in self.outputs else f"extractor {self.extractor} gives no logits"
        if metric == "frechet_distance":
            return None
        if not self.num_reference:
            return "the reference keeps no features of single images"
        needed = {
            "kernel_distance": 2,
            "precision_recall": self.settings.precision_neighbours + 1,
            "density_coverage": self.settings.density_neighbours + 1,
        }[metric]
        fewest = min(self.num_generated, self.num_reference)
        return None if fewest >= needed else f"it needs {needed} samples of either kind, and there are {fewest}"

    def chosen(self, metrics: Sequence[str] | None) -> tuple[str, ...]:
        """The metrics named, the Frechet distance always; None: all that can be computed. Raises ValueError with the obstacle."""
        if metrics is None:
            return tuple(metric for metric in METRICS if self.obstacle(metric) is None)
        for metric in metrics:
            if (reason := self.obstacle(metric)) is not None:
                raise ValueError(f"evaluate.metrics names {metric}, which cannot be computed here: {reason}")
        return tuple(metric for metric in METRICS if metric in metrics or metric == "frechet_distance")


def published_name(metric: str, extractor: str) -> str:
    """fid, sfid and kid are of Inception's features only; of others the same numbers are called by what they are."""
    return _OF_INCEPTION.get(metric, metric) if extractor == "inception" else metric


class Spread:
    """Work over Ray tasks, as many at once as execution says. bar: given the number of tasks, a bar for them.

    seconds: that tasks took so far, summed.   cpu_seconds: that other tasks for the same scores took, on a CPU alone.
    """

    def __init__(self, execution: Execution, bar: Callable[[int], Bar]) -> None:
        self.execution, self.bar, self.seconds, self.cpu_seconds = execution, bar, 0.0, 0.0

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], bar: Bar) -> list[Any]:
        """Results in the order of the arguments. References among these are resolved by Ray."""
        remote = ray.remote(**self.execution.resources)(_timed)
        results: dict[int, Any] = {}
        running: dict[Any, int] = {}
        remaining = iter(enumerate(arguments))
        while len(results) < len(arguments):
            while len(running) < self.execution.num_workers and (following := next(remaining, None)) is not None:
                number, given = following
                running[remote.remote(task, self.execution.num_threads, *given)] = number
            for done in ray.wait(list(running))[0]:
                results[running.pop(done)], seconds = ray.get(done)
                self.seconds += seconds
                bar.advance(1)
        return [results[number] for number in range(len(arguments))]


def _timed(task: Callable[..., Any], num_threads: int, *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    started = time.monotonic()
    torch.set_num_threads(num_threads)
    return task(*arguments, **keywords), time.monotonic() - started


def compute_scores(
    chosen: Sequence[str], generated: ImageStatistics, reference: ImageStatistics, settings: ScoreSettings, spread: Spread
) -> dict[str, float]:
    """Scores by the names of METRICS, of pairs by their parts, of estimates also with _std."""
    on_one_thread = ray.remote(num_cpus=1)(_timed)  # so that sums do not depend on how many CPUs a worker has
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
        spread.cpu_seconds += seconds
        scores[name], scores[f"{name}_std"] = estimate.value, estimate.std
    if {"precision_recall", "density_coverage"} & set(chosen):
        assert generated.features is not None and reference.features is not None
        sides = (len(generated.features), len(reference.features))
        scores |= _neighbour_scores(chosen, stored, sides, settings, spread)
    return scores


@dataclass(frozen=True)
class _Rows:
    """A block of samples start..stop-1, and what they are computed with."""

    start: int
    stop: int
    device: str


def _blocks(num_samples: int, execution: Execution) -> list[_Rows]:
    starts = range(0, num_samples, _ROWS_PER_TASK)
    stops = [min(start + _ROWS_PER_TASK, num_samples) for start in starts]
    return [_Rows(start, stop, execution.device) for start, stop in zip(starts, stops, strict=True)]


def _neighbour_scores(
    chosen: Sequence[str], stored: Sequence[Any], sizes: Sequence[int], settings: ScoreSettings, spread: Spread
) -> dict[str, float]:
    generated, reference = stored
    wants_density = "density_coverage" in chosen
    density = settings.density_neighbours if wants_density else settings.precision_neighbours
    precision = settings.precision_neighbours if "precision_recall" in chosen else density
    of_generated, of_reference = (_blocks(size, spread.execution) for size in sizes)
    with spread.bar(2 * len(of_generated) + len(of_reference)) as bar:
        wanted: list[tuple[Any, ...]] = [(reference, (precision, density), rows) for rows in of_reference]
        wanted += [(generated, (precision,), rows) for rows in of_generated]
        radii = spread.run(_radii, wanted, bar)
        reference_radii = ray.put(np.concatenate(radii[: len(of_reference)]))
        own_radii = radii[len(of_reference) :]
        arguments = [
            (reference, reference_radii, generated, own[:, 0], rows) for rows, own in zip(of_generated, own_radii, strict=True)
        ]
        counts = merge_counts(spread.run(_counts, arguments, bar))
    scores: dict[str, float] = {}
    if "precision_recall" in chosen:
        scores |= vars(counts.precision_recall())
    if wants_density:
        scores |= vars(counts.density_coverage(density))
    return scores


def _radii(features: np.ndarray, num_neighbours: Sequence[int], rows: _Rows) -> np.ndarray:
    return squared_radii(features, num_neighbours, start=rows.start, stop=rows.stop, device=rows.device)


def _counts(
    reference: np.ndarray, reference_radii: np.ndarray, generated: np.ndarray, generated_radii: np.ndarray, rows: _Rows
) -> ManifoldCounts:
    return manifold_counts(
        reference, reference_radii, generated, generated_radii, start=rows.start, stop=rows.stop, device=rows.device
    )
