"""Successive halving and Pareto fronts against slow references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.search.front import distinct, pareto_front
from pipelines.search.halving import passed_on, rung_sizes

SCORES = st.dictionaries(st.integers(0, 30), st.sampled_from([float(x) for x in range(12)]), min_size=1, max_size=20)


def test_rungs_rise_to_all_samples() -> None:
    assert rung_sizes(1000, 3, 3) == [112, 334, 1000]
    assert rung_sizes(1000, 1, 3) == [1000]
    assert rung_sizes(8, 3, 2) == [2, 4, 8]
    with pytest.raises(ValueError, match="4 samples cannot be divided by 3 so often"):
        rung_sizes(4, 3, 3)


@given(
    scores=SCORES, reduction=st.integers(2, 5), is_lower=st.booleans(), margin=st.sampled_from([0.0, 1.5, 100.0]), data=st.data()
)
def test_passed_on_as_by_hand(scores: dict[int, float], reduction: int, is_lower: bool, margin: float, data: st.DataObject) -> None:
    candidates = data.draw(st.lists(st.sampled_from(sorted(scores)), unique=True))

    def loss(trial: int) -> float:
        return scores[trial] if is_lower else -scores[trial]

    found = passed_on(
        scores,
        candidates,
        reduction=reduction,
        is_lower_better=is_lower,
        is_worse=lambda first, second: loss(first) > loss(second) + margin,
    )
    num_best, lowest = max(1, len(scores) // reduction), min(map(loss, scores))
    for trial in scores:
        num_better = sum(loss(other) < loss(trial) for other in scores)
        num_as_good = sum(loss(other) <= loss(trial) for other in scores)
        is_close = loss(trial) <= lowest + margin
        if trial in found:
            assert trial in candidates and num_better < num_best and is_close
        elif trial in candidates and is_close:
            assert num_as_good > num_best, "it is certainly among the best, unless others are as good"
    assert [loss(trial) for trial in found] == sorted(loss(trial) for trial in found)
    assert len(found) <= num_best


@given(points=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25), is_lower=st.booleans())
def test_front_is_that_of_all_comparisons(points: list[tuple[int, int]], is_lower: bool) -> None:
    costs = {number: float(cost) for number, (cost, _) in enumerate(points)}
    scores = {number: float(score) for number, (_, score) in enumerate(points)}

    def is_beaten(point: int, other: int) -> bool:
        is_better = scores[other] < scores[point] if is_lower else scores[other] > scores[point]
        is_as_good = is_better or scores[other] == scores[point]
        return costs[other] <= costs[point] and is_as_good and (is_better or costs[other] < costs[point])

    slow = {(costs[p], scores[p]) for p in costs if not any(is_beaten(p, other) for other in costs)}
    front = pareto_front(costs, scores, is_lower_better=is_lower)
    assert {(costs[p], scores[p]) for p in front} == slow and len(front) == len(slow)
    assert [costs[p] for p in front] == sorted(costs[p] for p in front)


def test_a_step_of_the_front_is_larger_than_its_error() -> None:
    scores = {"a": 10.0, "b": 9.9, "c": 8.0, "d": 7.95}

    def is_better(first: str, second: str) -> bool:
        return scores[first] < scores[second] - 0.5

    assert distinct(["a", "b", "c", "d"], is_better, 4) == ["a", "c", "d"], "the best one stays, whatever its error"
    assert distinct(["a", "b", "c", "d"], is_better, 2) == ["a", "d"]
    assert distinct(["a"], is_better, 4) == ["a"]
    assert distinct([], is_better, 4) == []
