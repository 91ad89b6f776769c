"""Successive halving over numbers of samples, with paired comparisons.

Every trial is scored with few samples; the best are scored again with more. The seed and the label of sample i depend on the seed
of the search and on i only, so the first n samples of two samplers are pairs: the error of the difference of their scores is that
of the differences of their samples' influences. What both have in common, such as easy and hard classes, cancels.

A rung passes on as many of its trials as the asynchronous form of the method (Li et al. 2020, arXiv 1810.05934) would, without
waiting for trials that are proposed later: the best 1 / reduction of all trials that were scored on it so far. Of these, a trial
that is worse than the best one of the rung by more than the 95% interval of their difference is not passed on either: more samples
would hardly make it the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def rung_sizes(num_samples: int, num_rungs: int, reduction: int) -> list[int]:
    """Numbers of samples, rising to num_samples. Raises ValueError if the first would be less than 2."""
    sizes = [-(-num_samples // reduction**left) for left in range(num_rungs - 1, -1, -1)]
    if sizes[0] < 2 or any(small == large for small, large in pairwise(sizes)):
        raise ValueError(
            f"num_rungs is {num_rungs}, but {num_samples} samples cannot be divided by {reduction} so often; lower it or reduction"
        )
    return sizes


def passed_on(
    scores: Mapping[T, float],
    candidates: Sequence[T],
    *,
    reduction: int,
    is_lower_better: bool,
    is_worse: Callable[[T, T], bool],
) -> list[T]:
    """Which candidates of a rung are scored with more samples, the best first.

    scores: of all trials on the rung so far, with the candidates.   is_worse: whether the first is worse than the second by more
    than their error.   At least the best trial of the rung passes, if it is a candidate.
    """
    ranked = sorted(scores, key=lambda trial: scores[trial] if is_lower_better else -scores[trial])
    best = ranked[: max(1, len(ranked) // reduction)]
    return [trial for trial in best if trial in candidates and (trial == ranked[0] or not is_worse(trial, ranked[0]))]
