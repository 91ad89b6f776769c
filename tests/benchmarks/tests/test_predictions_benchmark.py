"""A short run of the benchmark of predictions. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import predictions
import pytest


@pytest.mark.faults
def test_the_second_run_is_predicted_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    case = predictions.cases(tmp_path, 0.1)["photographs"]
    figures = predictions.compare("photographs", case, tmp_path / "run")
    assert figures["photographs_seconds"] > 0 and figures["photographs_predicted_over_measured"] > 0


def test_the_table_of_h200s_has_every_size_on_every_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "_DATASETS", {"imagenet256.yaml": 1_281_167})
    monkeypatch.setattr(predictions, "_SIZES", ("enat-s",))
    rows = predictions.table()
    assert [row[2] for row in rows] == ["1x1xH200", "1x8xH200", "8x8xH200"]
    training = [float(row[3]) for row in rows]
    assert training[0] > training[1] > training[2]


@pytest.mark.slow
def test_the_table_of_the_guide_is_current() -> None:
    guide = (Path(__file__).parents[3] / "pipelines" / "guide" / "plan.md").read_text()
    missing = [row for row in predictions.table() if f"| {' | '.join(row)} |" not in guide]
    assert not missing, "run predictions.py --computed and copy its table"
