"""Influences beside an evaluation: read as they were written, refused when they are not, and compared in pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from scipy.stats import norm, t, ttest_ind, ttest_rel

from enat.metrics.errors import standard_error
from pipelines.registry.influences import Evaluated, Influences, half_interval, margin_of_difference, save_influences, with_interval


def _normal(seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("labels", [None, np.arange(400) % 3])
def test_influences_are_read_as_they_were_written(tmp_path: Path, labels: np.ndarray | None) -> None:
    save_influences(tmp_path / "file", {"fid": _normal(0), "recall": _normal(1)}, labels)
    found = Influences.parse((tmp_path / "file").read_bytes())
    np.testing.assert_array_equal(found.by_score["recall"], _normal(1))
    assert {*found.by_score} == {"fid", "recall"} and (found.labels is None) == (labels is None)


def test_other_content_is_refused() -> None:
    for content, reason in (
        (b"", "cannot be read"),
        (b"\x80\x04K\x01.", "cannot be read"),
        (save({"fid": _normal(0), "kid": _normal(0, 3)}), "different lengths"),
        (save({"fid": _normal(0).reshape(20, 20)}), "different lengths"),
        (save({"fid": _normal(0).astype(np.float64)}), "not finite float32"),
        (save({"fid": np.full(4, np.nan, np.float32)}), "not finite float32"),
    ):
        with pytest.raises(ValueError, match=reason):
            Influences.parse(content)


def test_margins_of_differences() -> None:
    """One error counts alone, two of unrelated samples add, and what pairs share cancels."""
    shared, own = 4 * _normal(0), 0.4 * _normal(1)
    scores, z = {"fid": 7.0, "fid_se": 0.2}, norm.ppf(0.975)
    assert margin_of_difference(Evaluated({"fid": 7.0}), Evaluated({"fid": 8.0}), "fid") is None
    assert margin_of_difference(Evaluated(scores), Evaluated({"fid": 8.0}), "fid") == pytest.approx(0.2 * z)
    assert margin_of_difference(Evaluated(scores), Evaluated(scores), "fid") == pytest.approx(0.2 * z * 2**0.5)
    sides = [
        Evaluated({"fid": 7.0, "fid_se": standard_error(values)}, Influences({"fid": values})) for values in (shared, shared + own)
    ]
    assert margin_of_difference(sides[0], sides[1], "fid") == pytest.approx(0.02 * z, rel=0.2)
    assert margin_of_difference(sides[0], sides[0], "fid") == pytest.approx(0, abs=1e-6), "the same samples"
    others = Evaluated(sides[0].scores, Influences({"fid": shared}, np.arange(400)))
    assert margin_of_difference(sides[0], others, "fid") == pytest.approx(0.2 * z * 2**0.5, rel=0.1), (
        "samples of other labels are no pairs"
    )
    subsets = Evaluated({"kid": 1.0, "kid_se": 0.5}, Influences({"kid": shared}))
    assert margin_of_difference(subsets, subsets, "kid") == pytest.approx(z * 2**0.5 * (0.5**2 - 0.2**2) ** 0.5, rel=0.05)


def _replicated(values: np.ndarray, influences: Influences | None = None) -> Evaluated:
    each = {f"fid_replicate_{number}": float(value) for number, value in enumerate(values, start=1)}
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return Evaluated({"fid": float(values.mean()), "fid_se": error, "replicates": len(values), **each}, influences)


def test_margins_of_replicates_are_those_of_scipy() -> None:
    first, second = np.random.default_rng(0).normal(7, [[0.3], [0.5]], (2, 6))
    half = half_interval(_replicated(first).scores, "fid")
    assert half == pytest.approx(first.mean() - t.interval(0.95, 5, first.mean(), first.std(ddof=1) / 6**0.5)[0])
    welch = ttest_ind(first, second, equal_var=False).confidence_interval()
    margin = margin_of_difference(_replicated(first), _replicated(second), "fid")
    assert margin == pytest.approx((welch.high - welch.low) / 2)
    same = Influences({"fid": _normal(0)})
    paired = ttest_rel(first, second).confidence_interval()
    margin = margin_of_difference(_replicated(first, same), _replicated(second, same), "fid")
    assert margin == pytest.approx((paired.high - paired.low) / 2)
    incomplete = Evaluated({**_replicated(first).scores}, same)
    del incomplete.scores["fid_replicate_3"]
    margin = margin_of_difference(incomplete, _replicated(second, same), "fid")
    assert margin == pytest.approx((welch.high - welch.low) / 2), "a value is missing, so sets cannot be compared in pairs"
    assert half_interval({"fid": 7.0, "fid_se": 0.2, "replicates": 4}, "fid") == pytest.approx(0.2 * norm.ppf(0.975)), "influences"


def test_a_score_is_shown_with_half_of_its_interval() -> None:
    assert with_interval({"fid": 7.374, "fid_se": 0.2912}, "fid") == "7.374 ± 0.57"
    assert with_interval({"fid": 7.374}, "fid") == "7.374"
