"""Whether scores changed by more than their tolerance, and how tolerances are given."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation import protocol
from pipelines.reevaluation.drift import Tolerances, find_drift
from pipelines.registry.influences import Evaluated

SCORES = st.dictionaries(st.sampled_from([*protocol.SCORES, "images_per_second"]), st.floats(-1e6, 1e6), min_size=1)


@given(SCORES, st.floats(0, 10))
def test_equal_scores_never_drift_and_costs_are_not_compared(scores: dict[str, float], tolerance: float) -> None:
    assert find_drift(Evaluated(scores), Evaluated(scores), Tolerances(tolerance)) == []
    others = {name: value + 1 for name, value in scores.items()}
    assert {
        moved.metric for moved in find_drift(Evaluated(scores), Evaluated(others), Tolerances(0))
    } == scores.keys() & protocol.SCORES.keys()


def test_a_score_drifts_if_it_changes_by_more_than_its_tolerance() -> None:
    for was, now, drifts in (
        (10.0, 10.1, False),
        (10.0, 10.1005, True),
        (10.0, 9.89, True),
        (-2.0, -2.01, False),
        (0.0, 0.0, False),
        (0.0, 1e-9, True),
        (1.0, math.nan, True),
    ):
        assert bool(find_drift(Evaluated({"fid": was}), Evaluated({"fid": now}), Tolerances(0.01))) == drifts, (was, now)


def test_tolerances_are_given_for_all_metrics_or_by_name() -> None:
    tolerances = Tolerances.parse(["0.2", "kid=0.5", "recall=inf"])
    assert (tolerances.of("fid"), tolerances.of("kid")) == (0.2, 0.5)
    now = dict.fromkeys(("kid", "recall", "fid"), 1.4)
    assert [moved.metric for moved in find_drift(Evaluated(dict.fromkeys(now, 1.0)), Evaluated(now), tolerances)] == ["fid"]
    assert Tolerances.parse([]).of("fid") == 0.01
    for wrong in ("a lot", "-1", "fid=nan", "loss=0.1"):
        with pytest.raises(ValueError, match="--tolerance"):
            Tolerances.parse([wrong])
