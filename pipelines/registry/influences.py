"""Influences of samples on scores, stored beside an evaluation, and errors of differences between two evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore

INFLUENCES = "influences.safetensors"
Z_95 = 1.959964  # 95% of a normal distribution are within this many standard deviations of its mean
_LABELS = "labels"


def with_interval(metrics: Mapping[str, float], score: str) -> str:
    """A score and half of its 95% interval: "7.37 ± 0.57"."""
    text = f"{metrics[score]:.4g}"
    return f"{text} ± {Z_95 * metrics[f'{score}_se']:.2g}" if f"{score}_se" in metrics else text


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


def error_of_difference(first: Evaluated, second: Evaluated, score: str) -> float | None:
    """The standard error of the difference of a score between two sets of samples; None if neither has an error.

    Samples with the same labels in the same order are compared in pairs: what both have in common, such as their seeds, cancels.
    The random subsets of the kernel distance count as different ones.
    """
    from enat.metrics.errors import standard_error

    errors = [side.scores.get(f"{score}_se") for side in (first, second)]
    if None in errors:
        known = [error for error in errors if error is not None]
        return known[0] if known else None
    squares = [error**2 for error in errors if error is not None]
    mine, theirs = first.influences, second.influences
    if (
        mine is None
        or theirs is None
        or not (score in mine.by_score and score in theirs.by_score)
        or not mine.of_same_samples(theirs)
    ):
        return math.sqrt(sum(squares))
    difference = mine.by_score[score].astype(np.float64) - theirs.by_score[score]
    # An error has a part that is no sampling error of the samples: the random subsets of the kernel distance.
    own = [max(0.0, square - side.error(score) ** 2) for square, side in zip(squares, (mine, theirs), strict=True)]
    return math.sqrt(standard_error(difference, mine.labels) ** 2 + sum(own))
