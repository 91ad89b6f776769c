"""Scores from two sets of features: which ones can be computed, and their values. Ray tasks compute what is quadratic in size.

Metrics have descriptive names. With Inception's features they have their published names as well (published_name).

Shape legend: N generated samples, M reference samples, F features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from enat.config import check_in
from pipelines.cluster import tasks
from pipelines.cluster.resources import Execution
from pipelines.registry.influences import MIN_REPLICATES, REPLICATES
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
    "authenticity",
    "cmmd",
)
_OF_NEIGHBOURS = {
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
    "authenticity": ("authenticity",),
}
_SUBSETS_AT_ONCE = 10  # of the kernel distance, in one task
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
    labels: int64 (N,), None for images that were not made for given labels.
    """

    moments: Mapping[str, Moments]
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """by_name: by the names in METRICS; pairs by the names of their parts. Beside a score are its standard error (suffix _se), its
    spread over splits or subsets (_std), and a distance at infinitely many samples (_infinity).
    influences: of each generated sample on a score, float32 (N,); see enat.metrics.errors.
    labels: int64 (N,), None for images that were not made for given labels.
    """

    by_name: dict[str, float] = field(default_factory=dict)
    influences: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None

    def add(self, name: str, value: float, influence: np.ndarray, std: float = 0.0) -> None:
        """std: of the value's own randomness."""
        from enat.metrics.errors import standard_error

        self.by_name.update({name: value, f"{name}_se": math.hypot(standard_error(influence, self.labels), std)})
        self.influences[name] = influence.astype(np.float32)


def mean_of_replicates(replicates: Sequence[Scores]) -> Scores:
    """Scores of several sets of samples: means, each value (suffix _replicate_1 and so on) and their deviation (_replicates_sd).

    From MIN_REPLICATES sets on, standard errors are those of a mean of these values. With fewer, whose deviation says little, they
    come from the influences of all samples.
    """
    first, count = replicates[0], len(replicates)
    if count == 1:
        return first
    found: dict[str, float] = {REPLICATES: count}
    for name in first.by_name:
        values = np.array([each.by_name[name] for each in replicates])
        if name.endswith("_se"):
            found.setdefault(name, float(np.sqrt(np.square(values).sum())) / count)
        else:
            found[name] = float(values.mean())
        if f"{name}_se" in first.by_name:
            found[f"{name}_replicates_sd"] = deviation = float(values.std(ddof=1))
            found |= {f"{name}_replicate_{number}": float(value) for number, value in enumerate(values, start=1)}
            if count >= MIN_REPLICATES:
                found[f"{name}_se"] = deviation / math.sqrt(count)
    means = {name: np.mean([each.influences[name] for each in replicates], axis=0) for name in first.influences}
    return Scores(by_name=found, influences=means, labels=first.labels)


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
        output = {"spatial_frechet_distance": "spatial", "inception_score": "logits"}.get(metric)
        if output is not None and output not in self.outputs:
            return f"extractor {self.extractor} computes no {output}{' features' if output == 'spatial' else ''}"
        if metric == "spatial_frechet_distance":
            return None if self.has_spatial else "the reference has no moments of spatial features"
        if metric in ("frechet_distance", "inception_score"):
            return None
        if metric == "cmmd" and self.extractor != "clip":
            return f"it is defined on CLIP embeddings, and the extractor is {self.extractor}"
        if not self.num_reference:
            return "the reference stores moments only, not the features of single images"
        needed = {
            "kernel_distance": 2,
            "cmmd": 2,
            "precision_recall": self.settings.precision_neighbours + 1,
            "density_coverage": self.settings.density_neighbours + 1,
            "authenticity": 2,
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


def published_name(name: str, extractor: str) -> str:
    """Published name of a score with Inception's features (fid, sfid, kid), else its own name. Suffixes stay."""
    for metric, published in _OF_INCEPTION.items():
        if extractor == "inception" and (name == metric or name.startswith(f"{metric}_")):
            return published + name.removeprefix(metric)
    return name


class TaskPool:
    """Runs Ray tasks, at most execution.count at once. bar: makes a progress bar for a number of tasks.

    seconds: summed over tasks so far.   cpu_seconds: summed over tasks for the same scores that used a CPU only.
    """

    def __init__(self, execution: Execution, bar: Callable[[int], Bar]) -> None:
        self.execution, self.bar, self.seconds, self.cpu_seconds = execution, bar, 0.0, 0.0

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], bar: Bar) -> list[Any]:
        """Results in the order of the arguments, to which the device is added. Ray resolves object references among them."""
        submit: Callable[..., Any] = partial(tasks.submit, resources=self.execution.resources)
        results: dict[int, Any] = {}
        running: dict[Any, int] = {}
        remaining = iter(enumerate(arguments))
        while len(results) < len(arguments):
            while len(running) < self.execution.count and (following := next(remaining, None)) is not None:
                number, given = following
                started = submit(_timed, task, self.execution.num_threads, *given, device=self.execution.device)
                running[started] = number
            for done in tasks.wait(list(running)):
                results[running.pop(done)], seconds = tasks.get(done)
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
) -> Scores:
    """The chosen scores with their errors. The generated images need their features."""
    from enat.metrics.moments import frechet_distance

    # Sums must not depend on the CPUs of a worker.
    submit: Callable[..., Any] = partial(tasks.submit, _timed, resources={"num_cpus": 1})
    stored = [None if side.features is None else tasks.put(side.features) for side in (generated, reference)]
    own, real = generated.moments["features"], reference.moments["features"]
    started: dict[str, Any] = {}
    if "inception_score" in chosen:
        by_number = {"num_splits": settings.num_splits, "seed": settings.seed}
        sizes = by_number if settings.split_size is None else {"split_size": settings.split_size, "seed": None}
        started["inception_score"] = submit(_inception_score, 1, generated.logits, **sizes)
    if "kernel_distance" in chosen:
        started["kernel_distance"] = submit(_kernel_influence, 1, *stored)
    labelled = {"labels": generated.labels, "seed": settings.seed}
    started["frechet_distance"] = submit(_frechet_errors, 1, stored[0], own, real, **labelled)
    scores = Scores(labels=generated.labels)
    scores.by_name["frechet_distance"] = frechet_distance(own, real)
    if "spatial_frechet_distance" in chosen:
        spatial = (side.moments["spatial"] for side in (generated, reference))
        scores.by_name["spatial_frechet_distance"] = frechet_distance(*spatial)
    sides = [
        (features, len(side.features))
        for features, side in zip(stored, (generated, reference), strict=True)
        if side.features is not None
    ]
    estimates = {}
    if "kernel_distance" in chosen:
        estimates["kernel_distance"] = _kernel_distance(sides, settings, pool)
    if not _OF_NEIGHBOURS.keys().isdisjoint(chosen):
        _add_neighbour_scores(scores, chosen, sides, settings, pool)
    if "cmmd" in chosen:
        _add_cmmd(scores, sides, pool)
    results: dict[str, Any] = {}
    for name, reference_to_result in started.items():
        results[name], seconds = tasks.get(reference_to_result)
        pool.cpu_seconds += seconds
    if "inception_score" in results:
        estimates["inception_score"], influence = results["inception_score"]
        scores.add("inception_score", estimates["inception_score"].value, influence)
    if "kernel_distance" in results:
        estimate = estimates["kernel_distance"]
        if all(size == settings.kernel_subset_size for _, size in sides):  # one subset: it has no spread but that of rounding
            estimate = replace(estimates.pop("kernel_distance"), std=0.0)
        scores.add("kernel_distance", estimate.value, results["kernel_distance"], estimate.std / math.sqrt(settings.kernel_subsets))
    scores.by_name.update({f"{name}_std": estimate.std for name, estimate in estimates.items()})
    influence, infinity = results["frechet_distance"]
    scores.add("frechet_distance", scores.by_name["frechet_distance"], influence)
    if infinity is not None:
        scores.by_name.update({"frechet_distance_infinity": infinity.value, "frechet_distance_infinity_se": infinity.error})
    return scores


def _inception_score(logits: np.ndarray, **sizes: Any) -> tuple[Any, np.ndarray]:
    from enat.metrics.errors import inception_influence
    from enat.metrics.moments import inception_score

    return inception_score(logits, **sizes), inception_influence(logits)


def _kernel_influence(generated: np.ndarray, reference: np.ndarray) -> np.ndarray:
    from enat.metrics.errors import kernel_influence

    return kernel_influence(generated, reference)


def _kernel_distance(sides: Sequence[tuple[Any, int]], settings: ScoreSettings, pool: TaskPool) -> Any:
    """An Estimate. sides: the generated and the reference features in Ray's store, and their numbers."""
    from enat.metrics.moments import estimate_of, kernel_distances, kernel_subsets

    (generated, num_generated), (reference, num_reference) = sides
    sizes = num_generated, num_reference
    subsets = kernel_subsets(sizes, settings.kernel_subsets, settings.kernel_subset_size, settings.seed)
    parts = [subsets[start : start + _SUBSETS_AT_ONCE] for start in range(0, len(subsets), _SUBSETS_AT_ONCE)]
    with pool.bar(len(parts)) as bar:
        return estimate_of(np.concatenate(pool.run(kernel_distances, [(generated, reference, part) for part in parts], bar)))


def _add_cmmd(scores: Scores, sides: Sequence[tuple[Any, int]], pool: TaskPool) -> None:
    """sides: the generated and the reference features in Ray's store, and their numbers."""
    from enat.metrics.cmmd import cmmd_blocks, discrepancy, mean_kernels

    (generated, num_generated), (reference, num_reference) = sides
    of_generated, of_reference = cmmd_blocks(num_generated), cmmd_blocks(num_reference)
    wanted = [(generated, rows, other) for other in (generated, reference) for rows in of_generated]
    wanted += [(reference, rows, reference) for rows in of_reference]
    with pool.bar(len(wanted)) as bar:
        means = pool.run(mean_kernels, wanted, bar)
    count = len(of_generated)
    found = discrepancy(means[:count], means[count : 2 * count], means[2 * count :])
    scores.add("cmmd", found.value, found.influence)


def _frechet_errors(
    features: np.ndarray, generated: Moments, reference: Moments, *, labels: np.ndarray | None, seed: int
) -> tuple[np.ndarray, Any]:
    from enat.metrics.errors import MIN_EXTRAPOLATED, extrapolated_frechet_distance, frechet_influence

    influence = frechet_influence(features, generated, reference)
    if len(features) < MIN_EXTRAPOLATED * features.shape[1]:
        return influence, None
    return influence, extrapolated_frechet_distance(features, influence, reference, labels, seed=seed)


def _add_neighbour_scores(
    scores: Scores, chosen: Sequence[str], sides: Sequence[tuple[Any, int]], settings: ScoreSettings, pool: TaskPool
) -> None:
    """sides: the generated and the reference features in Ray's store, and their numbers."""
    from enat.metrics.neighbours import blocks_of, influences_of_counts, manifold_counts, scores_of_counts, squared_radii

    density = settings.density_neighbours if "density_coverage" in chosen else 1  # what is not wanted may be more than there are
    precision = settings.precision_neighbours if "precision_recall" in chosen else 1
    (generated, num_generated), (reference, num_reference) = sides
    of_generated, of_reference = blocks_of(num_generated), blocks_of(num_reference)
    with pool.bar(2 * len(of_generated) + len(of_reference)) as bar:
        wanted: list[tuple[Any, ...]] = [(reference, (precision, density, 1), rows) for rows in of_reference]
        wanted += [(generated, (precision,), rows) for rows in of_generated]
        radii = pool.run(squared_radii, wanted, bar)
        reference_radii = tasks.put(np.concatenate(radii[: len(of_reference)]))
        own_radii = zip(of_generated, radii[len(of_reference) :], strict=True)
        arguments = [(reference, reference_radii, generated, own[:, 0], rows) for rows, own in own_radii]
        counts = pool.run(manifold_counts, arguments, bar)
    values, influences = scores_of_counts(counts, density), influences_of_counts(counts, density)
    for name in (name for metric, names in _OF_NEIGHBOURS.items() if metric in chosen for name in names):
        scores.add(name, getattr(values, name), influences[name])
