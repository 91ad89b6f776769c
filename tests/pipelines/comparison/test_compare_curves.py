"""Curves of scores while training in a comparison: one for each model, only comparable ones together, and no file is trusted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from material.compare_lab import HOSTILE, Lab, key_of
from pipelines.comparison import compare, table
from pipelines.comparison.charts import training_charts
from pipelines.comparison.page import Grids
from services.html_page import Page


def _scores(num_samples: int = 200, reference: str = "reference/abc", **of_steps: float) -> bytes:
    rows = [
        {"step": int(step[1:]), "fid": value, "fid_se": 0.5, "sliced_distance": value / 2, "seconds": 1.0}
        for step, value in of_steps.items()
    ]
    return json.dumps({"reference": reference, "num_samples": num_samples, "rows": rows}).encode()


def _train(lab: Lab, key: str, scores: bytes | None, number: int, **tags: Any) -> None:
    """A model with an evaluation."""
    run = lab.start("train", {"enat.stage": "train", "enat.key": key})
    if scores is not None:
        run.log_bytes(scores, "scores.json")
    run.finish()
    lab.evaluate(samples=key_of(number), **{"input.model": f"train/{key}", "model": f"model-{key}", **tags})


def test_every_model_has_its_curve_with_errors(lab: Lab) -> None:
    _train(lab, "a", _scores(s200=30.0, s100=40.0), 1)
    _train(lab, "b", _scores(s100=45.0, s200=25.0), 2)
    _train(lab, "c", None, 3)
    found = lab.compare()
    assert {curve.name: [*curve.scores] for curve in found.curves} == {"model-a": [100, 200], "model-b": [100, 200]}
    by_title = {chart.y_title: chart for chart in training_charts(found.curves)}
    assert {*by_title} == {f"{title} of 200 samples, lower is better" for title in ("FID", "sliced Wasserstein distance")}
    curves = {series.name: series.points for series in by_title["FID of 200 samples, lower is better"].series}
    assert [(point.x, point.y) for point in curves["model-a"]] == [(100, 40.0), (200, 30.0)]
    np.testing.assert_allclose([point.error for point in curves["model-a"]], 1.96 * 0.5, rtol=1e-4)
    files = compare.make_files(found, "curves", Grids())
    page = Page.parse(files.page)
    assert page.series("training 0")["model-b"] == [(100, 45.0), (200, 25.0)] and "While training" in page.text
    assert files.figures is not None
    assert json.loads(json.dumps(table.to_json(found)))["curves"][0]["scores"]["100"]["fid"] == 40.0


def test_other_numbers_of_samples_and_references_have_charts_of_their_own(lab: Lab) -> None:
    _train(lab, "a", _scores(s100=40.0), 1)
    _train(lab, "b", _scores(num_samples=500, s100=30.0), 2)
    _train(lab, "c", _scores(reference="reference/other", s100=20.0), 3)
    charts = [chart for chart in training_charts(lab.compare().curves) if chart.y_title.startswith("FID")]
    assert [[series.name for series in chart.series] for chart in charts] == [["model-a"], ["model-b"], ["model-c"]]


def test_a_model_in_two_rows_has_one_curve(lab: Lab) -> None:
    _train(lab, "a", _scores(s100=40.0), 1)
    lab.evaluate(samples=key_of(2), num_steps=4, **{"input.model": "train/a", "model": "model-a"})
    assert len(lab.rows()) == 2 and [curve.name for curve in lab.compare().curves] == ["model-a"]


def test_of_several_runs_of_a_training_the_newest_counts(lab: Lab) -> None:
    for value in (40.0, 30.0):
        _train(lab, "a", _scores(s100=value), 1)
    (curve,) = lab.compare().curves
    assert curve.scores[100]["fid"] == 30.0


@pytest.mark.slow
def test_files_that_are_no_scores_are_left_out_with_a_note(lab: Lab) -> None:
    hostile = [b"", b"[]", b"{}", b'{"rows": 1}', b"\xff", b"[" * 50_000, _scores(s1=float("nan"))]
    hostile += [
        b'{"rows": [{"step": "x"}], "reference": "r", "num_samples": 1}',
        b'{"rows": [3], "reference": "r", "num_samples": 1}',
    ]
    for number, content in enumerate(hostile):
        _train(lab, f"k{number}", content, number)
    found = lab.compare()
    assert sum("scores.json of run" in note for note in found.notes) == len(hostile) - 1
    (curve,) = found.curves  # a score that is not a number is left out alone
    assert curve.scores == {1: {"step": 1.0, "fid_se": 0.5, "seconds": 1.0}} and training_charts([curve]) == []


def test_names_on_the_page_are_text(lab: Lab) -> None:
    _train(lab, "a", _scores(reference=HOSTILE, s100=40.0), 1, model=HOSTILE)
    plain = Page.parse(compare.make_files(lab.compare(), "curves", Grids()).page)
    assert not [name for _, name, _ in plain.attributes if name.startswith("on")]
    assert not [picture for picture in plain.images if "onerror" in picture]
