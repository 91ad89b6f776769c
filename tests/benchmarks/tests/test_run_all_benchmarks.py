"""The table of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run_all
from click.testing import CliRunner


def test_every_benchmark_of_the_table_exists_and_has_json() -> None:
    for name in run_all.BENCHMARKS:
        assert "--json" in (Path(run_all.__file__).parent / f"{name}.py").read_text()


def test_rows_are_the_ratios_and_name_their_rivals() -> None:
    figures = {
        "kid_seconds": 2.0,
        "kid_over_torch_fidelity": 1.25,
        "reuse_share_of_matmul_peak": 0.5,
        "peak_ratio": 1.1,
        "commit": "x",
    }
    assert run_all.rows({"metrics": figures}) == [
        ("metrics", "kid", "torch fidelity", "1.25"),
        ("metrics", "reuse", "matmul peak", "0.5"),
        ("metrics", "peak", "the other", "1.1"),
    ]


def test_figures_are_kept_with_machine_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.py").write_text("print('{\"ours_over_theirs\": 2.5}')")
    monkeypatch.setattr(run_all, "_FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "BENCHMARKS", {"tiny": ()})
    result = CliRunner().invoke(run_all.main, ["--folder", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    assert "theirs" in result.output and "2.5" in result.output
    (kept,) = (tmp_path / "kept").iterdir()
    content = json.loads(kept.read_text())
    assert content["figures"] == {"tiny": {"ours_over_theirs": 2.5}} and content["hardware"] and content["commit"]


def test_a_benchmark_that_fails_loses_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import sys; sys.exit('no such machine')")
    (tmp_path / "tiny.py").write_text("print('{\"ours_over_theirs\": 2.5}')")
    monkeypatch.setattr(run_all, "_FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "BENCHMARKS", {"broken": (), "tiny": ()})
    result = CliRunner().invoke(run_all.main, ["--folder", str(tmp_path / "kept")])
    assert result.exit_code == 1 and "benchmark broken failed: no such machine" in result.output and "2.5" in result.output
    assert result.output.splitlines()[-1].startswith("failed: broken;")
    (kept,) = (tmp_path / "kept").iterdir()
    assert json.loads(kept.read_text())["figures"] == {"tiny": {"ours_over_theirs": 2.5}}
