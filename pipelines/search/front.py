"""Samplers that no other one beats at their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def pareto_front(costs: Mapping[T, float], scores: Mapping[T, float], *, is_lower_better: bool) -> list[T]:
    """Those that no other has a better score for at most their cost, the cheapest first. Of equal ones the first counts.

    costs, scores: of the same samplers.
    """
    front: list[T] = []
    sign = 1.0 if is_lower_better else -1.0
    for each in sorted(scores, key=lambda name: (costs[name], sign * scores[name])):
        if not front or sign * scores[each] < sign * scores[front[-1]]:
            front.append(each)
    return front


def distinct(front: list[T], is_better: Callable[[T, T], bool], limit: int) -> list[T]:
    """The best of a front, and cheaper ones as long as each step to the next is larger than its error, at most `limit`.

    front: the cheapest first, as pareto_front gives it.   is_better: whether the first's score is better than the second's by more
    than their error. A cheaper sampler whose score cannot be told from that of a dearer one takes its place: only the best stays in
    any case.
    """
    kept: list[T] = []
    for each in front:
        if not kept or is_better(each, kept[-1]):
            kept.append(each)
    if front and front[-1] not in kept:
        kept = [*kept[:-1], front[-1]] if len(kept) >= limit else [*kept, front[-1]]
    return kept[-limit:]
