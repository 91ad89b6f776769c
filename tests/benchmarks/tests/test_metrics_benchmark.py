"""A short run of the benchmark of metrics. The figures add up; no times are asserted."""

from __future__ import annotations

from pathlib import Path

import metrics
import pytest


@pytest.mark.faults
def test_ratios_are_those_of_the_seconds(tmp_path: Path) -> None:
    figures = metrics.measure(tmp_path, 0.01, 1)
    assert all(value > 0 for value in figures.values())
    for name in ("kid", "precision"):
        ratio = figures[f"torch_fidelity_{name}_seconds"] / figures[f"{name}_seconds"]
        assert figures[f"{name}_over_torch_fidelity"] == pytest.approx(ratio)
