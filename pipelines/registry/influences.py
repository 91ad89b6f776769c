"""Influences of samples on scores, stored beside an evaluation, and errors of differences between two evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore

INFLUENCES = "influences.safetensors"
REPLICATES = "replicates"  # metric: number of sets of samples that scores are means of
MIN_REPLICATES = 5  # whose deviation is used; a t distribution with fewer degrees of freedom gives much wider intervals
_Z_95 = 1.959964  # 95% of a normal distribution are within this many standard deviations of its mean
_LABELS = "labels"


@cache
def _quantile(degrees: float) -> float:
    """Half of a 95% interval in standard errors. degrees: of freedom; infinite for errors from influences."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return _Z_95 if math.isinf(degrees) else float(stdtrit(degrees, 0.975))


def _degrees(metrics: Mapping[str, float]) -> float:
    count = metrics.get(REPLICATES, 1)
    return count - 1 if count >= MIN_REPLICATES else math.inf


def half_interval(metrics: Mapping[str, float], score: str) -> float | None:
    """Half of the 95% interval of a score; None for one without an error."""
    error = metrics.get(f"{score}_se")
    return None if error is None else _quantile(_degrees(metrics)) * error


def with_interval(metrics: Mapping[str, float], score: str) -> str:
    """A score and half of its 95% interval: "7.37 ± 0.57"."""
    half = half_interval(metrics, score)
    return f"{metrics[score]:.4g}" + ("" if half is None else f" ± {half:.2g}")


def save_influences(path: Path, influences: Mapping[str, np.ndarray], labels: np.ndarray | None) -> None:
    """influences: float32 (N,) by score.   labels: int64 (N,), None for samples without labels."""
    from safetensors.numpy import save_file

    save_file({**influences, **({} if labels is None else {_LABELS: labels.astype(np.int64)})}, path)


@dataclass(frozen=True, eq=False)
class Influences:
    """by_score: float32 (N,) each.   labels: int64 (N,), None for samples without labels."""

    by_score: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    _errors: dict[str, float] = field(default_factory=dict, repr=False)

    def error(self, score: str) -> float:
        """The standard error of the drawing of samples, computed once."""
        from enat.metrics.errors import standard_error

        if score not in self._errors:
            self._errors[score] = standard_error(self.by_score[score].astype(np.float64), self.labels)
        return self._errors[score]

    @classmethod
    def parse(cls, content: bytes) -> Influences:
        """Of a file by save_influences. Raises ValueError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            found = load(content)
        except SafetensorError as error:
            raise ValueError(f"the influences cannot be read ({error})") from error
        labels = found.pop(_LABELS, None)
        arrays = [*found.values(), *([] if labels is None else [labels])]
        if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
            raise ValueError("the influences have different lengths")
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in found.values()):
            raise ValueError("the influences are not finite float32 numbers")
        return cls(found, labels)

    def of_same_samples(self, other: Influences) -> bool:
        """Whether the samples of both were drawn for the same labels in the same order."""
        mine, theirs = self.labels, other.labels
        if mine is None or theirs is None:
            return mine is theirs and self._count == other._count
        return np.array_equal(mine, theirs)

    @property
    def _count(self) -> int:
        return max((len(each) for each in self.by_score.values()), default=0)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Scores of one set of samples, with errors (suffix _se), and influences where they are known."""

    scores: Mapping[str, float]
    influences: Influences | None = None


def evaluated(store: ArtifactStore, evaluation: Manifest) -> Evaluated:
    """Of an artifact of stage evaluate. Those of earlier versions have no influences."""
    has_influences = any(file.name == INFLUENCES for file in evaluation.files)
    influences = Influences.parse(store.fetch(evaluation, INFLUENCES).read_bytes()) if has_influences else None
    return Evaluated(evaluation.metrics, influences)


def margin_of_difference(first: Evaluated, second: Evaluated, score: str) -> float | None:
    """Half of the 95% interval of the difference of a score between two sets of samples; None if neither has an error.

    Samples with the same labels in the same order are compared in pairs, and so are equally many replicates: what both have in
    common, such as their seeds, cancels. The random subsets of the kernel distance count as different ones.
    """
    sides = [side for side in (first, second) if f"{score}_se" in side.scores]
    if len(sides) < 2:
        return half_interval(sides[0].scores, score) if sides else None
    degrees = [_degrees(side.scores) for side in sides]
    mine, theirs = first.influences, second.influences
    is_paired = mine is not None and theirs is not None and mine.of_same_samples(theirs)
    values = _differences(first.scores, second.scores, score) if is_paired and degrees[0] == degrees[1] < math.inf else None
    if values is not None:
        return _quantile(degrees[0]) * float(values.std(ddof=1)) / math.sqrt(len(values))
    squares = [side.scores[f"{score}_se"] ** 2 for side in sides]
    if is_paired and degrees == [math.inf, math.inf]:
        return _Z_95 * _paired_error(first, second, score, squares)
    return _quantile(_joint_degrees(squares, degrees)) * math.sqrt(sum(squares))


def _differences(first: Mapping[str, float], second: Mapping[str, float], score: str) -> np.ndarray | None:
    """Of each replicate. None if a value is not known."""
    names = [f"{score}_replicate_{number}" for number in range(1, int(first[REPLICATES]) + 1)]
    if not all(name in first and name in second for name in names):
        return None
    return np.array([first[name] - second[name] for name in names])


def _joint_degrees(squares: Sequence[float], degrees: Sequence[float]) -> float:
    """Degrees of freedom of the sum of two squared errors (Welch and Satterthwaite)."""
    spread = sum(square**2 / each for square, each in zip(squares, degrees, strict=True))
    return sum(squares) ** 2 / spread if spread else math.inf


def _paired_error(first: Evaluated, second: Evaluated, score: str, squares: Sequence[float]) -> float:
    from enat.metrics.errors import standard_error

    mine, theirs = first.influences, second.influences
    assert mine is not None and theirs is not None
    if not (score in mine.by_score and score in theirs.by_score):
        return math.sqrt(sum(squares))
    difference = mine.by_score[score].astype(np.float64) - theirs.by_score[score]
    # An error has a part that is not an error of drawing the samples: the random subsets of the kernel distance.
    own = [max(0.0, square - side.error(score) ** 2) for square, side in zip(squares, (mine, theirs), strict=True)]
    return math.sqrt(standard_error(difference, mine.labels) ** 2 + sum(own))
