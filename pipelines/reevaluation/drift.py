"""Drift: a change of a score that exceeds both a tolerance and the error of the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.evaluation.protocol import SCORES
from pipelines.registry.influences import Evaluated, margin_of_difference


@dataclass(frozen=True)
class Tolerances:
    """How far a score may move, relative to its old value. usual: for metrics that are not named; infinity disables a metric."""

    usual: float = 0.01
    by_metric: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Sequence[str]) -> Tolerances:
        """Of "0.02" and "kid=0.1". Raises ValueError."""
        usual, by_metric = cls.usual, {}
        for text in given:
            metric, has_name, number = text.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if not value >= 0:
                raise ValueError(f"--tolerance {text} is not a number of at least 0; write 0.01, or kid=0.1")
            if has_name and metric not in SCORES:
                raise ValueError(f"--tolerance names {metric!r}; choose from {', '.join(SCORES)}")
            if has_name:
                by_metric[metric] = value
            else:
                usual = value
        return cls(usual, by_metric)

    def of(self, metric: str) -> float:
        return self.by_metric.get(metric, self.usual)


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """A score that changed by more than its tolerance and its error."""

    metric: str
    was: float
    now: float
    tolerance: float

    @property
    def relative(self) -> float:
        return (self.now - self.was) / abs(self.was) if self.was else math.copysign(math.inf, self.now - self.was)

    def __str__(self) -> str:
        return f"{self.metric} {self.was:.6g} -> {self.now:.6g} ({100 * self.relative:+.3g} %)"


def find_drift(before: Evaluated, after: Evaluated, tolerances: Tolerances) -> list[ScoreChange]:
    """The scores of both that changed by more than their tolerance, and by more than 95% of differences by chance.

    The same samples have no error of a difference, so any change beyond the tolerance counts. Costs are not compared.
    """
    moved, was, now = [], before.scores, after.scores
    for metric in SCORES:
        tolerance = tolerances.of(metric)
        if metric not in was or metric not in now or math.isinf(tolerance):
            continue
        allowed = max(tolerance * abs(was[metric]), margin_of_difference(before, after, metric) or 0.0)
        if not abs(now[metric] - was[metric]) <= allowed:
            moved.append(ScoreChange(metric=metric, was=was[metric], now=now[metric], tolerance=tolerance))
    return moved


def words(moved: Sequence[ScoreChange]) -> str:
    return "; ".join(map(str, moved)) or "none"
