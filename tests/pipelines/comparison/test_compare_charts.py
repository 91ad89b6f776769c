"""Charts of a comparison: which points and curves they have, and their names on the page and in the PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from material.compare_lab import HOSTILE, PROTOCOL, Lab, key_of, text_of
from pipelines.comparison import compare
from pipelines.comparison.charts import cost_chart, find_sweeps, sweep_charts
from pipelines.comparison.page import Grids
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Section
from pipelines.pages.chart import Chart, Point, Series, plotly_figure, png_of
from services.html_page import Page


def _cost(section: Section) -> Chart:
    chart = cost_chart(section)
    assert chart is not None
    return chart


def _points(series: Iterable[Series]) -> dict[str, set[tuple[float | None, float]]]:
    """By name, of series with markers."""
    return {s.name: {(p.x if p.x is None else round(p.x, 4), p.y) for p in s.points} for s in series if s.has_markers}


def _page(comparison: Comparison) -> Page:
    return Page.parse(compare.make_files(comparison, "compare-test", Grids()).page)


# Score against cost --------------------------------------------------------------------------------------------------------


def test_points_are_at_their_numbers_and_published_ones_are_hollow(lab: Lab) -> None:
    lab.evaluate({"fid": 2.9, "gmacs_total": 350.0})
    lab.evaluate({"fid": 4.9, "gmacs_total": 136.0}, samples=key_of(2), model="enat-s-imagenet", parameters=98_100_000)
    lab.evaluate({"fid": 4.0}, samples=key_of(3), model="no-cost")
    found = lab.compare(published="auto")
    chart = _cost(found.sections[0])
    points = _points(chart.series)
    quoted = points.pop("quoted from publications")
    assert points == {"enat-l-imagenet": {(0.35, 2.9)}, "enat-s-imagenet": {(0.136, 4.9)}}
    assert {point for point in quoted if point[0] is not None} == {(0.136, 4.97), (0.347, 2.79), (0.532, 2.48), (0.925, 2.68)}
    beside = {tuple(point.text.splitlines()[:3:2]) for point in chart.series[-1].points if point.x is None}
    assert beside >= {("MAR-H", "FID 1.55"), ("MaskGIT", "FID 6.18"), ("MAGE-B (unconditional)", "FID 11.10")} and len(beside) == 75
    small, large = (series.points[0] for series in chart.series[:2])
    assert small.text.splitlines() == [
        "enat-s-imagenet", "98.1M parameters", "8 steps", "guidance 3.5", "FID 4.9", "136 GMACs per image",
    ]  # fmt: skip
    assert small.size < large.size, "more parameters"
    page = _page(found)
    assert page.series("A cost")["enat-l-imagenet"] == [(0.35, 2.9)] and chart.x_title.startswith("TFLOPs per image")
    symbols = {(trace["name"], trace["marker"]["symbol"]) for trace in page.charts["A cost"]["data"]}
    assert {symbol for name, symbol in symbols if name == "quoted from publications"} == {"diamond-open", "line-ew-open"}
    assert not [name for name, symbol in symbols if symbol.endswith("open") and name != "quoted from publications"]


def test_a_distant_published_cost_does_not_stretch_the_axis(lab: Lab) -> None:
    lab.evaluate({"fid": 2.9, "gmacs_total": 350.0})
    chart = _cost(lab.compare(published="auto").sections[0])
    dit = next(point for point in chart.series[-1].points if point.text.startswith("DiT-XL/2"))
    assert (dit.x, dit.y) == (None, 2.27) and "675M parameters\n59.5 TFLOPs per image, without decoder" in dit.text
    assert not chart.is_log_x and chart.strip_title.endswith("far off")
    lab.evaluate({"fid": 2.0, "gmacs_total": 40_000.0}, samples=key_of(2), model="large")
    chart = _cost(lab.compare(published="auto").sections[0])
    assert chart.is_log_x and (59.5, 2.27) in _points(chart.series)["quoted from publications"]


def test_a_chart_of_small_models_uses_gmacs_and_has_no_published_points(lab: Lab) -> None:
    lab.evaluate({"frechet_distance": 6.5, "gmacs_total": 0.0123}, dataset="digits", resolution=16)
    chart = _cost(lab.compare(published="auto").sections[0])
    assert _points(chart.series) == {"enat-l-imagenet": {(0.0123, 6.5)}} and not chart.has_strip
    assert chart.x_title.startswith("GMACs per image") and chart.y_title.startswith("Fréchet distance on inception features")


@pytest.mark.slow
def test_points_of_a_sweep_are_joined_among_other_runs(lab: Lab) -> None:
    for number, (steps, guidance) in enumerate(((4, 3.5), (8, 3.5), (16, 3.5), (8, 1.0))):
        metrics = {"fid": 10.0 - number, "gmacs_total": 100.0 * steps + guidance}
        lab.evaluate(metrics, samples=key_of(number), num_steps=steps, guidance_scale=guidance, **{"input.model": "train/same"})
    found = lab.compare()
    lines = {s.line: [(round(p.x or 0.0, 4), p.y) for p in s.points] for s in _cost(found.sections[0]).series if s.line}
    assert lines == {"solid": [(0.4035, 10.0), (0.8035, 9.0), (1.6035, 8.0)], "dot": [(0.801, 7.0), (0.8035, 9.0)]}
    traces = _page(found).charts["A cost"]["data"]
    assert [(trace["mode"], trace["showlegend"]) for trace in traces] == [("markers", True), ("lines", False), ("lines", False)]


def test_there_is_no_chart_without_score_or_cost(lab: Lab) -> None:
    lab.evaluate()
    (section,) = lab.compare(published="auto").sections
    for metrics in ({"fid": 2.0}, {"gmacs_total": 3.0}, {}, {"fid": 2.0, "gmacs_total": 0.0}):
        assert cost_chart(replace(section, rows=(replace(section.rows[0], metrics=metrics),))) is None


# Names ---------------------------------------------------------------------------------------------------------------------


def test_a_row_has_one_name_in_tables_charts_and_samples(lab: Lab) -> None:
    """Different models with equal names get the name of their run as well."""
    image = Image.new("RGB", (4, 4))
    for number, name in enumerate(("monday", "tuesday")):
        lab.evaluate(samples=key_of(number), parent=lab.start(name), **{"input.model": f"train/{number}"})
    lab.evaluate(samples=key_of(5), num_steps=4, variant="fast", **{"input.model": "train/0"})
    found = lab.compare()
    names = {row.name for row in found.rows}
    assert names == {"enat-l-imagenet", "enat-l-imagenet (fast)", "enat-l-imagenet, tuesday"}
    assert {row.model_name for row in found.rows} == {"enat-l-imagenet", "enat-l-imagenet, tuesday"}
    page = Page.parse(compare.make_files(found, "compare-test", Grids(tuple((row, image) for row in found.rows))).page)
    shown = [row[0] for row in page.rows]
    assert names <= set(shown) and {alt.split(", 8 steps")[0].split(", 4 steps")[0] for alt in page.images} == {
        f"samples of {name}" for name in names
    }
    assert page.series("A cost").keys() == {row.model_name for row in found.rows}
    assert {text.split("<br>")[0] for trace in page.charts["A cost"]["data"] for text in trace["hovertext"]} == names


@pytest.mark.slow
def test_any_name_can_be_drawn_and_is_text(lab: Lab) -> None:
    names = ("$x$ $\\frac$", "_hidden", "a" * 250, "模型 ^{", HOSTILE, '<a href="https://x.example">b</a>')
    for number, name in enumerate(names):
        protocol = {**PROTOCOL, "extractor": name, "reference": name}
        tags = {"model": name, "dataset": name, "input.model": "train/x", "protocol": protocol}
        for steps in (4, 8):
            metrics = {"frechet_distance": 5.0 - steps / 8, "gmacs_total": 9.0}
            lab.evaluate(metrics, samples=key_of(100 * number + steps), num_steps=steps, **tags)
    found = lab.compare()
    assert len(found.sections) == len(names)
    files = compare.make_files(found, "compare-test", Grids())
    assert files.figures is not None
    charts = Page.parse(files.page).charts
    assert len(charts) == 2 * len(names)
    for text in (trace["name"] for chart in charts.values() for trace in chart["data"]):
        assert "<" not in text, "Plotly would read a tag"
    assert not [text for chart in charts.values() for trace in chart["data"] for text in trace["hovertext"] if "<a" in text]


# Sweeps --------------------------------------------------------------------------------------------------------------------


def test_a_sweep_joins_rows_that_differ_in_one_setting_only(lab: Lab) -> None:
    settings = [(4, 2.0, 1.5), (8, 2.0, 1.5), (16, 2.0, 1.5), (8, 3.0, 1.5), (12, 2.0, 9.0)]
    for number, (steps, guidance, temperature) in enumerate(settings):
        lab.generate(key_of(number), num_steps=steps, guidance_scale=guidance, remask_temperature=temperature)
        tags = {"num_steps": steps, "guidance_scale": guidance, "variant": f"v{number}", "input.model": "train/same"}
        lab.evaluate({"fid": 10.0 - steps / 4}, samples=key_of(number), **tags)
    lab.generate(key_of(20), num_steps=32, guidance_scale=2.0, remask_temperature=1.5)
    tags = {"model": "another", "num_steps": 32, "guidance_scale": 2.0, "input.model": "train/other"}
    lab.evaluate({"fid": 1.0}, samples=key_of(20), **tags)
    (section,) = lab.compare().sections
    sweeps = {sweep.setting: sweep for sweep in find_sweeps(section)}
    assert [row.num_steps for row in sweeps["num_steps"].rows] == [4, 8, 16], "another temperature, another model: not joined"
    assert [row.guidance_scale for row in sweeps["guidance_scale"].rows] == [2.0, 3.0] and len(sweeps) == 2
    steps, guidance = sweep_charts(section)
    (curve,) = steps.series
    assert curve.name == "enat-l-imagenet, guidance 2" and curve.line == "solid"
    assert [(point.x, point.y) for point in curve.points] == [(4, 9.0), (8, 8.0), (16, 6.0)]
    assert (steps.x_title, guidance.x_title) == ("steps of the sampler", "guidance scale")


def test_lengths_of_the_average_of_weights_are_a_sweep(lab: Lab) -> None:
    for number, length in enumerate((None, 0.1, 0.05, 0.075)):
        lab.generate(key_of(number), ema_length=length)
        lab.evaluate({"fid": 3.0 + (length or 0)}, samples=key_of(number), variant=f"v{number}", **{"input.model": "train/same"})
    (section,) = lab.compare().sections
    (chart,) = sweep_charts(section)
    assert chart.x_title == "relative length of the average of weights"
    assert [(point.x, point.y) for point in chart.series[0].points] == [(0.05, 3.05), (0.075, 3.075), (0.1, 3.1)]
    assert "EMA length" in (text := text_of(lab.compare())) and "0.075" in text


def test_one_run_or_two_with_one_setting_are_not_a_sweep(lab: Lab) -> None:
    for number, steps in enumerate((8, 8, 16)):
        lab.evaluate(samples=key_of(number), num_steps=steps, **{"input.model": "train/same"})
    (section,) = lab.compare().sections
    assert find_sweeps(section) == [] == sweep_charts(section)


def test_one_step_decoding_is_drawn_over_the_mask_ratio_with_published_curves(lab: Lab) -> None:
    for number, (ratio, fid) in enumerate(((0.2, 3.5), (0.4, 6.7))):
        lab.generate(key_of(number), mask_ratio=ratio, num_steps=1)
        protocol = {**PROTOCOL, "labels": "token map rows"}
        metrics = {"fid": fid, "gmacs_total": 100.0}
        lab.evaluate(metrics, samples=key_of(number), num_steps=1, protocol=protocol, **{"input.model": "train/same"})
        (section,) = lab.compare(published="auto").sections
        assert cost_chart(section) is None, "the score depends on the mask ratio"
        assert len(sweep_charts(section)) == 1, "for a single ratio as well"
    (chart,) = sweep_charts(section)
    assert [(s.name, s.line, s.is_quoted, [p.y for p in s.points]) for s in chart.series] == [
        ("enat-l-imagenet, 1 step, guidance 3.5", "solid", False, [3.5, 6.7]),
        ("ENAT, quoted from publications", "dash", True, [3.48, 6.74, 16.04, 45.51]),
        ("MaskGIT, quoted from publications", "dot", True, [3.89, 8.23, 19.2, 48.78]),
    ]
    assert chart.x_title == "share of the real codes that is masked" and chart.is_log_y


# Drawing -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of matplotlib before they are rendered."""
    figures: list[Figure] = []
    original = Figure.__init__

    def remember(figure: Figure, *arguments: object, **options: object) -> None:
        original(figure, *arguments, **options)  # type: ignore[arg-type]
        figures.append(figure)

    monkeypatch.setattr(Figure, "__init__", remember)
    return figures


def _chart() -> Chart:
    models = [Series(name=f"model-{n}", points=(Point(1.0 + n, 2.0 + n, f"model-{n}\n1 < 2"),)) for n in range(30)]
    line = Series(name="model-0", points=(models[0].points[0], models[9].points[0]), line="dot", has_markers=False)
    quoted = Series(name="quoted", points=(Point(3.0, 4.0), Point(None, 7.5)), is_quoted=True)
    titles = {"x_title": "cost", "y_title": "score", "title": "$a$", "strip_title": "cost not known"}
    return Chart(series=(*models, line, quoted), is_log_y=True, **titles)


def test_the_png_has_the_points_and_names_of_the_description(drawn: list[Figure]) -> None:
    chart = _chart()
    png = Image.open(io.BytesIO(png_of([chart, replace(chart, series=chart.series[:2])])))
    assert np.asarray(png).std() > 1 and png.width > 1000 and png.height > png.width
    parts = drawn[0].subfigs
    (axes, strip), (second,) = parts[0].axes, parts[1].axes
    found = {tuple(point) for marks in axes.collections for point in marks.get_offsets().tolist()}
    assert found == {(1.0 + n, 2.0 + n) for n in range(30)} | {(3.0, 4.0)} and len(second.collections) == 2
    assert [tuple(p) for marks in strip.collections for p in marks.get_offsets().tolist()] == [(0.0, 7.5)]
    hollow = [marks.get_offsets().tolist() for marks in axes.collections if not marks.get_facecolor().size]
    assert hollow == [[[3.0, 4.0]]]
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == ":"] == [[[1.0, 2.0], [10.0, 11.0]]]
    names = [text.get_text() for text in parts[0].legends[0].get_texts()]
    assert names == [*(f"model-{n}" for n in range(30)), "quoted"] and axes.get_yscale() == "log" and axes.get_xscale() == "linear"


def test_series_of_one_name_share_a_look_and_no_look_repeats_early() -> None:
    figure = plotly_figure(_chart())
    looks = [(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in figure["data"] if trace["name"].startswith("model")]
    assert looks[30] == looks[0] and len(set(looks[:30])) == 30
    quoted = [trace for trace in figure["data"] if trace["name"] == "quoted"]
    assert [(trace["xaxis"], trace["y"], trace["showlegend"]) for trace in quoted] == [("x", [4.0], True), ("x2", [7.5], False)]
    assert figure["data"][0]["hovertext"] == ["model-0<br>1 &lt; 2"] and figure["layout"]["yaxis"]["type"] == "log"
    assert all(before["y"] < after["y"] for before, after in pairwise(figure["data"][:30]))
