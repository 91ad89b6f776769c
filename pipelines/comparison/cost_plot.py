"""The figure of a comparison: score against cost.

Measured runs are filled and coloured. Published numbers are hollow and gray with italic labels, so the two cannot be confused.
Published systems with an unknown or distant cost are in a strip beside the plot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.comparison.canvas import (
    DPI,
    INK,
    QUOTED,
    UNNAMED,
    Axes,
    Figure,
    Handle,
    clipped,
    draw_grid,
    draw_legend,
    handle,
    legend_height,
    looks,
    new_figure,
    plain_numbers,
    quiet,
    score_title,
    set_score_limits,
    to_image,
)
from pipelines.comparison.columns import short, short_count
from pipelines.comparison.labels import Label, write_labels
from pipelines.comparison.published import PublishedResult
from pipelines.comparison.sections import Row, Section, by_model
from pipelines.comparison.sweep_plot import find_sweeps
from pipelines.workflow.stage import MAIN

_WIDTH = 10.0  # inches of a figure
_LABEL_LENGTH = 26
_LEGEND_LENGTH = 70
_MAX_LABELLED = 4  # points of one model
_MAX_NAMED = 20  # models; the others are in the table
_STRIP_FONT = 7.0
_FAR = 4.0  # a quoted cost beyond the measured ones by more than this factor would leave them no room
_LOG_RATIO = 8.0  # costs that differ by more than this factor are drawn on a log axis
_QUOTED_AREA = 46.0  # square points


@dataclass(frozen=True)
class _Model:
    """Rows of one model that have score and cost, with their style."""

    name: str
    rows: tuple[Row, ...]
    color: str
    shape: str
    is_named: bool

    @property
    def legend(self) -> str:
        size = f" · {short_count(self.rows[0].parameters)}" if self.rows[0].parameters else ""
        return f"{clipped(self.name, _LEGEND_LENGTH)}{size}"


def cost_figure(section: Section) -> Image.Image | None:
    """None if no measured row has both score and cost, and for completed codes, whose score depends on the mask ratio."""
    with quiet():
        return None if section.begins_with_codes else _cost_figure(section)


def _cost_figure(section: Section) -> Image.Image | None:
    distance = section.distance
    points = [row for row in section.rows if distance in row.metrics and row.metrics.get("gmacs_total", 0.0) > 0]
    if not points or distance is None:
        return None
    models = _models(section, points)
    placed = [result for result in section.published if result.fid is not None and _is_near(result, points)]
    beside = [result for result in section.published if result.fid is not None and not _is_near(result, points)]
    giga = not placed and max(row.metrics["gmacs_total"] for row in points) < 100
    scale = 1.0 if giga else 1e-3
    handles = _handles(models, has_quoted=bool(section.published))
    figure, axes, strip = _canvas(section, len(beside), legend_height([str(entry.get_label()) for entry in handles], _WIDTH))
    xs = [row.metrics["gmacs_total"] * scale for row in points] + [result.tflops or 0.0 for result in placed]
    scores = [row.metrics[distance] for row in points] + [result.fid or 0.0 for result in (*placed, *beside)]
    _style(axes, section, "GMACs" if giga else "TFLOPs", xs, scores)
    _draw_sweeps(axes, section, models, scale)
    labels = _draw_measured(axes, models, distance, scale) + _draw_quoted(axes, placed)
    draw_legend(figure, handles, _WIDTH, loc="outside lower center")
    if strip is not None:
        _draw_strip(strip, beside)
    write_labels(axes, labels)
    return to_image(figure)


def _is_near(result: PublishedResult, points: Sequence[Row]) -> bool:
    costs = [row.metrics["gmacs_total"] / 1e3 for row in points]
    return result.tflops is not None and min(costs) / _FAR <= result.tflops <= max(costs) * _FAR


def _models(section: Section, points: Sequence[Row]) -> list[_Model]:
    """Models in order of size. If there are many, only those with the best scores are named."""
    drawn = {row.run_ids[0] for row in points}
    groups = {name: [row for row in rows if row.run_ids[0] in drawn] for name, rows in by_model(section.rows).items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    best = sorted(groups, key=lambda name: min(row.metrics[str(section.distance)] for row in groups[name]))
    named = set(best[:_MAX_NAMED])
    look = looks()
    models = []
    for name, rows in groups.items():
        color, shape = next(look) if name in named else (UNNAMED, "o")
        by_cost = sorted(rows, key=lambda row: (row.metrics["gmacs_total"], -row.metrics[str(section.distance)]))
        models.append(_Model(name, tuple(by_cost), color, shape, name in named))
    return models


def _handles(models: Sequence[_Model], *, has_quoted: bool) -> list[Handle]:
    """One entry per model, then the shared entries."""
    handles = [handle(model.legend, model.color, model.shape) for model in models if model.is_named]
    if unnamed := sum(not model.is_named for model in models):
        handles.append(handle(f"{unnamed} more, which the table names", UNNAMED, "o"))
    handles.append(handle("measured here; larger: more parameters", INK, "o"))
    return handles + ([handle("quoted from publications", QUOTED, "D", is_quoted=True)] if has_quoted else [])


def _canvas(section: Section, num_beside: int, legend: float) -> tuple[Figure, Axes, Axes | None]:
    if not num_beside:
        figure = new_figure(section, _WIDTH, 4.4 + legend)
        return figure, figure.subplots(), None
    figure = new_figure(section, _WIDTH, max(4.8, 1.3 + 0.16 * num_beside) + legend)
    axes, strip = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3.2, 1.0), "wspace": 0.02})
    return figure, axes, strip


def _style(axes: Axes, section: Section, unit: str, xs: Sequence[float], scores: Sequence[float]) -> None:
    axes.set_xlabel(f"{unit} per image (multiply-accumulates, guidance and decoder included)", color=INK)
    axes.set_ylabel(score_title(section), color=INK)
    draw_grid(axes)
    _cost_limits(axes, xs)
    set_score_limits(axes, scores)


def _cost_limits(axes: Axes, xs: Sequence[float]) -> None:
    """Leave room around all points, labelled or not. Costs that are far apart get a log axis. Ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(xs), max(xs)
    if high / low > _LOG_RATIO:
        axes.set_xscale("log")
        reach = max(0.15, 0.08 * math.log10(high / low))
        axes.set_xlim(low / 10**reach, high * 10 ** (reach + 0.1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.12 * (high - low) or 0.4 * high
        axes.set_xlim(max(0.0, low - margin), high + 1.6 * margin)
    axes.xaxis.set_major_formatter(plain_numbers())


# Points --------------------------------------------------------------------------------------------------------------------


def _draw_sweeps(axes: Axes, section: Section, models: Sequence[_Model], scale: float) -> None:
    """Draw a line through each sweep: solid if the steps differ, dotted for another setting."""
    colors: Mapping[str, str] = {row.run_ids[0]: model.color for model in models for row in model.rows}
    for sweep in find_sweeps(section):
        rows = [row for row in sweep.rows if row.run_ids[0] in colors]
        x, y = [row.metrics["gmacs_total"] * scale for row in rows], [row.metrics[str(section.distance)] for row in rows]
        if len(rows) > 1:
            style = "-" if sweep.setting == "num_steps" else ":"
            axes.plot(x, y, color=colors[rows[0].run_ids[0]], linewidth=1.2, linestyle=style, alpha=0.45, zorder=3, gid="sweep")


def _draw_measured(axes: Axes, models: Sequence[_Model], distance: str, scale: float) -> list[Label]:
    """Points of one model share colour and shape."""
    labels = []
    for model in sorted(models, key=lambda model: model.is_named):  # named models on top
        x, y = [row.metrics["gmacs_total"] * scale for row in model.rows], [row.metrics[distance] for row in model.rows]
        areas = [_area(row.parameters) for row in model.rows]
        axes.scatter(x, y, s=areas, marker=model.shape, color=model.color, edgecolors="white", linewidths=1.0, zorder=4)
        best = min(range(len(model.rows)), key=y.__getitem__)
        texts = _texts(model, best) if model.is_named else [""] * len(model.rows)
        labels += [Label(*point) for point in zip(x, y, texts, [model.color] * len(x), map(_radius, areas), strict=True)]
    return labels


def _draw_quoted(axes: Axes, results: Sequence[PublishedResult]) -> list[Label]:
    labels = []
    for result in results:
        assert result.tflops is not None and result.fid is not None
        point = (result.tflops, result.fid)
        axes.scatter(*point, marker="D", s=_QUOTED_AREA, facecolors="none", edgecolors=QUOTED, linewidths=1.4, zorder=5)
        labels.append(Label(*point, _quoted_label(result, _unlike_axis(result)), QUOTED, _radius(_QUOTED_AREA), is_quoted=True))
    return labels


def _area(parameters: int | None) -> float:
    """Area in square points, by the square root of the size: 10 M and 1 B are both visible."""
    return 60.0 if not parameters else 30.0 + 200.0 * min(4.0, math.sqrt(parameters / 1e9))


def _radius(area: float) -> float:
    """Radius in points of a marker with this area in square points."""
    return math.sqrt(area) / 2 + 1.0


def _texts(model: _Model, best: int) -> list[str]:
    """Label each point of a model with its differing settings, and one of them with name and size. Of many, only the best."""
    rows = model.rows
    settings = [(row.num_steps, row.guidance_scale) for row in rows]
    has_steps, has_guidance = (len(set(values)) > 1 for values in zip(*settings, strict=True))
    has_variant = len(set(settings)) < len(rows) > 1
    is_crowded = len(rows) > _MAX_LABELLED
    texts = []
    for number, row in enumerate(rows):
        is_named = number == (best if is_crowded else 0)
        parts = [_short_name(model)] if is_named else []
        parts += [short_count(row.parameters)] if is_named and row.parameters else []
        parts += [f"{row.num_steps} steps"] if has_steps and row.num_steps else []
        parts += [f"guidance {row.guidance_scale:g}"] if has_guidance and row.guidance_scale is not None else []
        parts += [clipped(row.variant, _LABEL_LENGTH)] if has_variant else []
        texts.append("" if is_crowded and not is_named else " · ".join(parts))
    return texts


def _short_name(model: _Model) -> str:
    """Only the variant of a long name. The legend has the full name."""
    variants = {row.variant for row in model.rows}
    if len(model.name) > _LABEL_LENGTH and len(variants) == 1 and variants != {MAIN}:
        return clipped(variants.pop(), _LABEL_LENGTH)
    return clipped(model.name, _LABEL_LENGTH)


def _quoted_label(result: PublishedResult, *remarks: str) -> str:
    parts = [result.label, short_count(result.params_millions * 1e6) if result.params_millions else "", *remarks]
    return " · ".join(part for part in parts if part)


def _unlike_axis(result: PublishedResult) -> str:
    return "" if result.has_decoder or result.tflops is None else "without decoder"


# The strip -----------------------------------------------------------------------------------------------------------------


def _draw_strip(strip: Axes, results: Sequence[PublishedResult]) -> None:
    """Draw a short line at each score with its label, moved up or down to keep clear of its neighbours."""
    strip.set_xlim(0, 1)
    strip.set_xticks([])
    strip.tick_params(which="both", left=False, labelleft=False)
    strip.spines[["top", "right", "bottom"]].set_visible(False)
    strip.spines["left"].set_color("#d9dce1")
    has_far = any(result.tflops is not None for result in results)
    title = f"quoted, cost not known{' or far off' if has_far else ''}"
    strip.set_xlabel(title, color=QUOTED, fontsize=8.5, style="italic", labelpad=10)
    ordered = sorted(results, key=lambda result: result.fid or 0.0)
    to_height = strip.transAxes.inverted()
    heights = [float(to_height.transform(strip.transData.transform((0, result.fid or 0.0)))[1]) for result in ordered]
    figure = strip.get_figure()
    figure.draw_without_rendering()
    line_height = 1.3 * _STRIP_FONT / 72 * DPI / strip.get_window_extent().height
    gap = min(line_height, 0.98 / max(1, len(ordered)))
    for result, height, place in zip(ordered, heights, spread(heights, gap), strict=True):
        strip.plot([0.0, 0.05], [height] * 2, color=QUOTED, linewidth=1.4, transform=strip.transAxes)
        strip.plot([0.05, 0.15], [height, place], color=QUOTED, linewidth=0.5, alpha=0.7, transform=strip.transAxes)
        cost = f"{short(result.tflops)} TFLOPs" if result.tflops is not None else ""
        words = f"{result.fid:.2f}  {_quoted_label(result, cost, _unlike_axis(result))}"
        text = strip.text(0.17, place, words, transform=strip.transAxes, parse_math=False)
        text.set(fontsize=_STRIP_FONT, color=QUOTED, style="italic", va="center")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending positions in [0, 1], at least `gap` apart, with the least squared distance to the ascending heights."""
    from sklearn.isotonic import isotonic_regression

    steps = gap * np.arange(len(heights))
    if not len(heights):
        return []
    nearest = isotonic_regression(np.asarray(heights) - steps)
    return list(map(float, np.clip(nearest, 0.0, max(0.0, 1.0 - steps[-1])) + steps))
