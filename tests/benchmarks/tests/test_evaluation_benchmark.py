"""A short run of the benchmark of generation and evaluation. The figures add up; no times are asserted."""

from __future__ import annotations

from pathlib import Path

import click
import evaluation
import pytest
from common import in_process


def _round(bare: float, short: float, long: float) -> dict[str, dict[str, float]]:
    """Evaluation takes half as long as generation."""
    return {kind: {"generate": value, "evaluate": value / 2} for kind, value in (("bare", bare), ("short", short), ("long", long))}


def test_the_fastest_run_counts_and_start_up_is_excluded() -> None:
    """Starting takes 10 s, an image 1 s. Each round has one disturbed run."""
    measured = [_round(9.0, 14.0, 18.0), _round(0.9, 99.0, 18.0), _round(0.9, 14.0, 99.0)]
    figures = evaluation.ratio(measured, short=4, long=8)
    assert figures["generate_seconds_per_image"] == pytest.approx(1.0)
    assert figures["evaluate_seconds_per_image"] == pytest.approx(0.5)
    assert figures["end_to_end_images_per_second"] == pytest.approx(1 / 1.5)
    assert figures["bare_parts_images_per_second"] == pytest.approx(1 / (0.9 + 0.45))
    assert figures["end_to_end_over_bare_parts"] == pytest.approx(0.9)


def test_a_busy_machine_gives_no_figure() -> None:
    with pytest.raises(click.ClickException, match="too busy"):
        evaluation.ratio([_round(0.9, 14.0, 13.0)], short=4, long=8)


@pytest.mark.faults
def test_the_stages_and_their_bare_parts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    (measured,) = in_process(evaluation.__file__, "rounds", tmp_path, "enat-s", 4, 8, 1)
    assert set(measured) == {"bare", "short", "long"}
    assert all(seconds > 0 for each in measured.values() for seconds in each.values())
    assert all(set(each) == {"generate", "evaluate"} for each in measured.values())
