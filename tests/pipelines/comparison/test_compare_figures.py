"""Figures of a comparison: positions of points, lines and labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from compare_lab import HOSTILE, PROTOCOL, Lab, key_of
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.transforms import Bbox
from PIL import Image

from pipelines.comparison import cost_plot, sections
from pipelines.comparison.cost_plot import cost_figure, spread
from pipelines.comparison.sweep_plot import find_sweeps, sweep_figure

# Figures -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures before they are rendered."""
    figures: list[Any] = []
    original = cost_plot.to_image

    def to_image(figure: Any) -> Image.Image:
        figures.append(figure)
        return original(figure)

    monkeypatch.setattr(cost_plot, "to_image", to_image)
    monkeypatch.setattr("pipelines.comparison.sweep_plot.to_image", to_image)
    return figures


def _points(parts: Iterable[Any]) -> set[tuple[float, float]]:
    return {(round(x, 4), round(y, 4)) for part in parts for x, y in part.get_offsets().tolist()}


def _words(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_points_are_at_the_coordinates_of_their_numbers(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate({"fid": 2.9, "gmacs_total": 350.0})
    lab.evaluate({"fid": 4.9, "gmacs_total": 136.0}, samples=key_of(2), model="enat-s-imagenet", parameters=98_100_000)
    lab.evaluate({"fid": 4.0}, samples=key_of(3), model="no-cost")
    image = cost_figure(lab.compare(published="auto").sections[0])
    assert image is not None and np.asarray(image).std() > 1
    axes, strip = drawn[0].axes
    measured, quoted = {(0.35, 2.9), (0.136, 4.9)}, {(0.136, 4.97), (0.347, 2.79), (0.532, 2.48)}
    assert _points(axes.collections) == measured | quoted
    hollow = [part for part in axes.collections if not part.get_facecolor().size]
    assert _points(hollow) == quoted, "published points are hollow"
    words = _words(drawn[0])
    assert "enat-l-imagenet · 574M" in words and "ENAT-XL · 1.04B" in words and "quoted from publications" in words
    beside = {text.get_text() for text in strip.texts}
    assert beside >= {"1.55  MAR-H", "6.18  MaskGIT · 227M", "11.10  MAGE-B (unconditional)"} and len(beside) == 22


def test_a_distant_published_cost_does_not_stretch_the_axis(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate({"fid": 2.9, "gmacs_total": 350.0})
    cost_figure(lab.compare(published="auto").sections[0])
    axes, strip = drawn[0].axes
    assert axes.get_xlim()[1] < 2 and axes.get_xscale() == "linear"
    assert "2.27  DiT-XL/2 · 675M · 59.5 TFLOPs · without decoder" in [text.get_text() for text in strip.texts]
    lab.evaluate({"fid": 2.0, "gmacs_total": 40_000.0}, samples=key_of(2), model="large")
    cost_figure(lab.compare(published="auto").sections[0])
    assert drawn[1].axes[0].get_xscale() == "log" and (59.5, 2.27) in _points(drawn[1].axes[0].collections)
    assert "DiT-XL/2 · 675M · without decoder" in _words(drawn[1]), "the axis includes decoders"


def test_a_figure_of_small_models_uses_gmacs_and_no_published_points(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate({"frechet_distance": 6.5, "gmacs_total": 0.0123}, dataset="digits", resolution=16)
    assert cost_figure(lab.compare(published="auto").sections[0]) is not None
    (axes,) = drawn[0].axes
    assert _points(axes.collections) == {(0.0123, 6.5)} and axes.get_xlabel().startswith("GMACs per image")
    assert "quoted from publications" not in _words(drawn[0])


def _boxes(figure: Any, texts: Iterable[Any]) -> list[Any]:
    return [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]


def test_every_label_is_drawn_and_covers_no_marker_and_no_other_label(lab: Lab, drawn: list[Any]) -> None:
    """Points too close for their labels: a label without room beside its marker is further away with a line to it."""
    for number in range(12):
        metrics = {"fid": 5.0 + 0.02 * (number % 4), "gmacs_total": 300.0 + number // 4}
        lab.evaluate(metrics, samples=key_of(number), model=f"model-{number:02}-imagenet", parameters=300_000_000)
    lab.evaluate({"fid": 3.0, "gmacs_total": 500.0}, samples=key_of(20), model="another")
    cost_figure(lab.compare().sections[0])
    (axes,) = drawn[0].axes
    labels = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in labels} >= {f"model-{number:02}-imagenet · 300M" for number in range(12)}
    boxes = _boxes(drawn[0], labels)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    reach = cost_plot._radius(cost_plot._area(300_000_000)) * cost_plot.DPI / 72 - 1
    for x, y in axes.transData.transform(sorted(_points(axes.collections))):
        marker = Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
        assert not [box for box in boxes if box.overlaps(marker)]
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert any(line.get_gid() == "leader" for line in axes.lines)


def test_the_legend_names_each_model_once_with_its_size(lab: Lab, drawn: list[Any]) -> None:
    long = "enat-1.92M-4e1d-digits-decoder_attention-full"
    for number, steps in enumerate((4, 8)):
        lab.evaluate(
            {"fid": 3.0, "gmacs_total": 300.0 + steps}, samples=key_of(number), num_steps=steps, **{"input.model": "train/l"}
        )
    lab.evaluate({"fid": 4.0, "gmacs_total": 200.0}, samples=key_of(5), model=long, variant="mae", parameters=1_920_000)
    cost_figure(lab.compare().sections[0])
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"{long} (mae) · 1.92M", "enat-l-imagenet · 574M", "measured here; larger: more parameters"]
    assert "mae · 1.92M" in [text.get_text() for text in drawn[0].axes[0].texts], "a long name is shortened to its variant"


def test_of_many_models_the_best_are_named_and_the_others_counted(lab: Lab, drawn: list[Any]) -> None:
    lab.evaluate()
    (row,) = lab.rows()
    rows = tuple(
        replace(row, run_ids=(str(number),), model=f"model-{number}", metrics={"fid": 2.0 + number, "gmacs_total": 300.0 + number})
        for number in range(30)
    )
    assert cost_figure(replace(lab.compare().sections[0], rows=rows)) is not None
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert "model-19 · 574M" in names and "model-20 · 574M" not in names and "10 more, which the table names" in names


def test_points_of_a_sweep_are_joined_among_other_runs(lab: Lab, drawn: list[Any]) -> None:
    for number, (steps, guidance) in enumerate(((4, 3.5), (8, 3.5), (16, 3.5), (8, 1.0))):
        metrics = {"fid": 10.0 - number, "gmacs_total": 100.0 * steps + guidance}
        lab.evaluate(metrics, samples=key_of(number), num_steps=steps, guidance_scale=guidance, **{"input.model": "train/same"})
    cost_figure(lab.compare().sections[0])
    lines = {
        line.get_linestyle(): [tuple(point) for point in line.get_xydata().round(4)]
        for line in drawn[0].axes[0].lines
        if line.get_gid() == "sweep"
    }
    assert lines["-"] == [(0.4035, 10.0), (0.8035, 9.0), (1.6035, 8.0)] and lines[":"] == [(0.801, 7.0), (0.8035, 9.0)]


def test_there_is_no_figure_without_score_or_cost(lab: Lab) -> None:
    lab.evaluate()
    (section,) = lab.compare(published="auto").sections
    for metrics in ({"fid": 2.0}, {"gmacs_total": 3.0}, {}, {"fid": 2.0, "gmacs_total": 0.0}):
        assert cost_figure(replace(section, rows=(replace(section.rows[0], metrics=metrics),))) is None


def test_any_name_can_be_drawn(lab: Lab) -> None:
    names = ("$x$ $\\frac$", "_hidden", "a" * 250, "模型 ^{", HOSTILE)
    for number, name in enumerate(names):
        protocol = {**PROTOCOL, "extractor": name, "reference": name}
        tags = {"model": name, "dataset": name, "input.model": "train/x", "protocol": protocol}
        for steps in (4, 8):
            metrics = {"frechet_distance": 5.0 - steps / 8, "gmacs_total": 9.0}
            lab.evaluate(metrics, samples=key_of(100 * number + steps), num_steps=steps, **tags)
    sections = lab.compare().sections
    assert len(sections) == len(names)
    assert all(cost_figure(section) is not None and sweep_figure(section) is not None for section in sections)


def test_a_sweep_joins_rows_that_differ_in_one_setting_only(lab: Lab, drawn: list[Any]) -> None:
    settings = [(4, 2.0, 1.5), (8, 2.0, 1.5), (16, 2.0, 1.5), (8, 3.0, 1.5), (12, 2.0, 9.0)]
    for number, (steps, guidance, temperature) in enumerate(settings):
        lab.generate(key_of(number), num_steps=steps, guidance_scale=guidance, remask_temperature=temperature)
        tags = {"num_steps": steps, "guidance_scale": guidance, "variant": f"v{number}", "input.model": "train/same"}
        lab.evaluate({"fid": 10.0 - steps / 4}, samples=key_of(number), **tags)
    lab.generate(key_of(20), num_steps=32, guidance_scale=2.0, remask_temperature=1.5)
    lab.evaluate({"fid": 1.0}, samples=key_of(20), num_steps=32, guidance_scale=2.0, **{"input.model": "train/other"})
    (section,) = lab.compare().sections
    sweeps = {sweep.setting: sweep for sweep in find_sweeps(section)}
    assert [row.num_steps for row in sweeps["num_steps"].rows] == [4, 8, 16], "another temperature, another model: not joined"
    assert [row.guidance_scale for row in sweeps["guidance_scale"].rows] == [2.0, 3.0] and len(sweeps) == 2
    assert sweep_figure(section) is not None
    steps, guidance = drawn[0].axes
    assert [tuple(line.get_ydata()) for line in steps.lines] == [(9.0, 8.0, 6.0)]
    assert guidance.get_xlabel() == "guidance scale" and "enat-l-imagenet, guidance 2" in _words(drawn[0])


def test_a_figure_of_many_sweeps_names_eight_and_keeps_the_size_of_its_panels(lab: Lab, drawn: list[Any], recwarn: Any) -> None:
    lab.evaluate()
    (row,) = lab.rows()
    rows = tuple(
        replace(row, run_ids=(f"{guidance}/{steps}",), trained="train/same", num_steps=steps, guidance_scale=float(guidance),
                metrics={"fid": 2.0 + guidance + 1 / steps})
        for guidance in range(1, 15)
        for steps in (4, 8, 16)
    )  # fmt: skip
    assert sweep_figure(replace(lab.compare().sections[0], rows=rows)) is not None
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    for axes, names in zip(drawn[0].axes, (9, 3), strict=True):
        legend = axes.get_legend().get_window_extent()
        assert len(axes.get_legend().get_texts()) == names and legend.y1 < axes.get_window_extent().y0, "below its panel"
        assert axes.get_window_extent().height > 300
    assert "enat-l-imagenet, guidance 1" in _words(drawn[0]) and "6 more, which the table names" in _words(drawn[0])


def test_the_protocol_is_never_cut_at_the_edge(lab: Lab, drawn: list[Any]) -> None:
    for steps in (4, 8):
        protocol = {**PROTOCOL, "reference": "a dataset with quite a long name, 256 px, adm-center"}
        lab.evaluate({"fid": 9.0}, samples=key_of(steps), num_steps=steps, protocol=protocol)
    sweep_figure(lab.compare().sections[0])
    (figure,) = drawn
    sentence = next(text for text in figure.texts if text.get_text().startswith("inception features"))
    assert sentence.get_window_extent().x1 < figure.bbox.x1 and sentence.get_text().endswith("pixels as uint8")
    assert sentence.get_window_extent().y0 > figure.axes[0].get_window_extent().y1, "above the panel"


def test_one_step_decoding_is_drawn_over_the_mask_ratio_with_published_curves(lab: Lab, drawn: list[Any]) -> None:
    for number, (ratio, fid) in enumerate(((0.2, 3.5), (0.4, 6.7))):
        lab.generate(key_of(number), mask_ratio=ratio, num_steps=1)
        protocol = {**PROTOCOL, "labels": "token map rows"}
        metrics = {"fid": fid, "gmacs_total": 100.0}
        lab.evaluate(metrics, samples=key_of(number), num_steps=1, protocol=protocol, **{"input.model": "train/same"})
        (section,) = lab.compare(published="auto").sections
        assert cost_figure(section) is None, "the score depends on the mask ratio"
        assert sweep_figure(section) is not None, "for a single ratio as well"
    (axes,) = drawn[-1].axes
    curves = {
        text.get_text(): line for text, line in zip(axes.get_legend().get_texts(), axes.get_legend().get_lines(), strict=True)
    }
    assert list(curves) == [
        "enat-l-imagenet, 1 step, guidance 3.5",
        "ENAT, quoted from publications",
        "MaskGIT, quoted from publications",
    ]
    assert {tuple(line.get_ydata()) for line in axes.lines} == {
        (3.5, 6.7), (3.48, 6.74, 16.04, 45.51), (3.89, 8.23, 19.2, 48.78),
    }  # fmt: skip
    assert axes.get_xlabel() == "share of the real codes that is masked"


def test_one_run_or_two_with_one_setting_are_not_a_sweep(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1), **{"input.model": "train/same"})
    lab.evaluate(samples=key_of(2), **{"input.model": "train/same"})
    lab.evaluate(samples=key_of(3), num_steps=16, **{"input.model": "train/same"})
    (section,) = lab.compare().sections
    assert find_sweeps(section) == [] and sweep_figure(section) is None


def test_models_with_equal_names_are_separate(lab: Lab) -> None:
    for number, name in enumerate(("monday", "tuesday")):
        lab.evaluate(samples=key_of(number), parent=lab.start(name), **{"input.model": f"train/{number}"})
    lab.evaluate(samples=key_of(5), num_steps=4, variant="fast", **{"input.model": "train/0"})
    groups = sections.by_model(lab.rows())
    assert sorted(map(len, groups.values())) == [1, 2] and len(groups) == 2
    assert any("day" in name for name in groups)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=0, max_size=30), st.floats(0.001, 0.03))
def test_spread_labels_keep_their_order_and_distance(heights: list[float], gap: float) -> None:
    places = spread(sorted(heights), gap)
    assert len(places) == len(heights) and all(0 <= place <= 1 for place in places)
    assert all(above - below >= gap - 1e-9 for below, above in pairwise(places))


def test_labels_with_room_stay_in_place() -> None:
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
