"""Which differences between rows of a comparison are larger than their errors."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.comparison.sections import Row, Section
from pipelines.registry.influences import Evaluated, half_interval, margin_of_difference


def is_better(first: Row, second: Row, score: str, better: str) -> bool:
    """Whether the first row's score is better than the second's, and by more than the 95% interval of their difference.

    Scores without an error differ if their values do.   better: "higher" or "lower".
    """
    gain = first.metrics[score] - second.metrics[score]
    if better == "lower":
        gain = -gain
    # The interval of a difference is at most as wide as both together: most pairs need no more than that.
    if gain <= 0 or gain > sum(half_interval(row.metrics, score) or 0.0 for row in (first, second)):
        return gain > 0
    sides = [Evaluated(row.metrics, row.influences) for row in (first, second)]
    return gain > (margin_of_difference(sides[0], sides[1], score) or 0.0)


def unbeaten(rows: Sequence[Row], score: str, better: str) -> set[int]:
    """Numbers of the rows that have the score, and than which no other is better."""
    having = {number: row for number, row in enumerate(rows) if score in row.metrics}
    return {
        number
        for number, row in having.items()
        if not any(is_better(other, row, score, better) for other in having.values() if other is not row)
    }


def has_errors(section: Section) -> bool:
    return any(name.endswith("_se") for row in section.rows for name in row.metrics)


def undecided(section: Section) -> list[Row]:
    """The row with the best distance, and after it those that are not distinguishable from it at 95%. Empty without errors, and if
    rows have different mask ratios, which are different tasks."""
    score = section.distance
    if score is None or not has_errors(section) or len({row.mask_ratio for row in section.rows}) > 1:
        return []
    having = [row for row in section.rows if score in row.metrics]
    leader = min(having, key=lambda row: row.metrics[score])
    return [leader, *(row for row in having if row is not leader and not is_better(leader, row, score, "lower"))]
