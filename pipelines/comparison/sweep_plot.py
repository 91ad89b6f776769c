"""Sweeps: runs of one model that differ in one setting of the sampler, with the figure of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from pipelines.comparison.canvas import (
    INK,
    QUOTED,
    UNNAMED,
    Axes,
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
from pipelines.comparison.published import PublishedResult
from pipelines.comparison.sections import Row, Section, by_model

# Setting -> title, parameter of stage generate, and text for labels if the setting does not differ.
_SETTINGS = {
    "num_steps": ("steps of the sampler", "sampler.num_steps", "{} steps"),
    "guidance_scale": ("guidance scale", "sampler.guidance_scale", "guidance {:g}"),
    "mask_ratio": ("share of the real codes that is masked", "mask_ratio", "mask ratio {:g}"),
}
_MAX_TICKS = 12
_MAX_NAMED = 8  # sweeps of a panel; the best
_PANEL = 5.0  # inches
_ONE_PANEL = 7.0
_LABEL_LENGTH = 60


@dataclass(frozen=True)
class Sweep:
    """setting: the only difference between the rows: num_steps, guidance_scale or mask_ratio.   rows: in its order."""

    setting: str
    label: str
    rows: tuple[Row, ...]


def find_sweeps(section: Section) -> list[Sweep]:
    """Sweeps of at least two rows. If the parameters of the samples are known, all but the setting must be equal."""
    sweeps = []
    for model, rows in by_model(section.rows).items():
        for setting in _SETTINGS:
            groups: dict[tuple[Any, ...], list[Row]] = {}
            for row in rows:
                if getattr(row, setting) is not None and section.distance in row.metrics:
                    groups.setdefault(_fixed(row, setting), []).append(row)
            for group in groups.values():
                values = {getattr(row, setting) for row in group}
                if len(values) == len(group) > 1:  # two rows at one value differ in something unknown
                    sweeps.append(_sweep(model, setting, group))
    return sweeps


def _fixed(row: Row, setting: str) -> tuple[Any, ...]:
    """Everything that must be equal in a sweep."""
    generated: Mapping[str, str] = row.generated or {}
    others = tuple(sorted((name, value) for name, value in generated.items() if name != _SETTINGS[setting][1]))
    return (row.train_steps, *(getattr(row, name) for name in _SETTINGS if name != setting), row.generated is None, others)


def _sweep(model: str, setting: str, rows: Sequence[Row]) -> Sweep:
    rest = {name: getattr(rows[0], name) for name in _SETTINGS if name != setting}
    words = [_SETTINGS[name][2].format(value) for name, value in rest.items() if value is not None]
    label = ", ".join([model, *words]).replace(", 1 steps", ", 1 step")
    return Sweep(setting, label, tuple(sorted(rows, key=lambda row: getattr(row, setting))))


# The figure ----------------------------------------------------------------------------------------------------------------


def sweep_figure(section: Section) -> Image.Image | None:
    """One panel per swept setting, or None without a sweep. Published curves are drawn with one-step decoding."""
    sweeps = find_sweeps(section) + _single_ratios(section)
    settings = [setting for setting in _SETTINGS if any(sweep.setting == setting for sweep in sweeps)]
    if not settings:
        return None
    panels = [_Panel.of(section, setting, sweeps) for setting in settings]
    width = _PANEL if len(panels) > 1 else _ONE_PANEL
    legend = max(legend_height([str(entry.get_label()) for entry in panel.handles], width - 0.5) for panel in panels)
    with quiet():
        figure = new_figure(section, width * len(panels), 3.6 + legend)
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            _draw(axes, section, panel)
            draw_legend(axes, panel.handles, width - 0.5, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        return to_image(figure)


def _single_ratios(section: Section) -> list[Sweep]:
    """Rows of one-step decoding outside any sweep. Published curves are drawn with a single row as well."""
    if not any(result.mask_ratio is not None for result in section.published):
        return []
    swept = {row.run_ids[0] for sweep in find_sweeps(section) if sweep.setting == "mask_ratio" for row in sweep.rows}
    rows = [row for row in section.rows if row.mask_ratio is not None and section.distance in row.metrics]
    return [Sweep("mask_ratio", row.label, (row,)) for row in rows if row.run_ids[0] not in swept]


@dataclass(frozen=True)
class _Curve:
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: str
    shape: str
    line: str
    is_quoted: bool = False


@dataclass(frozen=True)
class _Panel:
    """curves: named ones last, to draw them on top."""

    setting: str
    curves: tuple[_Curve, ...]
    handles: tuple[Handle, ...]

    @classmethod
    def of(cls, section: Section, setting: str, sweeps: Sequence[Sweep]) -> _Panel:
        mine = sorted((sweep for sweep in sweeps if sweep.setting == setting), key=lambda sweep: min(_scores(section, sweep)))
        named = [sweep for sweep in sweeps if sweep in mine[:_MAX_NAMED]]
        unnamed = [_curve(section, sweep, UNNAMED, "o") for sweep in mine[_MAX_NAMED:]]
        curves = [_curve(section, sweep, *look) for sweep, look in zip(named, looks(), strict=False)]
        quoted = _quoted_curves(section.published) if setting == "mask_ratio" else []
        handles = [handle(c.label, c.color, c.shape, line=c.line, is_quoted=c.is_quoted) for c in (*curves, *quoted)]
        handles += [handle(f"{len(unnamed)} more, which the table names", UNNAMED, "o", line="-")] if unnamed else []
        return cls(setting, (*unnamed, *quoted, *curves), tuple(handles))


def _scores(section: Section, sweep: Sweep) -> list[float]:
    return [row.metrics[str(section.distance)] for row in sweep.rows]


def _curve(section: Section, sweep: Sweep, color: str, shape: str) -> _Curve:
    x = tuple(getattr(row, sweep.setting) for row in sweep.rows)
    return _Curve(clipped(sweep.label, _LABEL_LENGTH), x, tuple(_scores(section, sweep)), color, shape, "-")


def _quoted_curves(results: Sequence[PublishedResult]) -> list[_Curve]:
    """One curve per system, hollow and gray as all published points."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.mask_ratio is not None and result.fid is not None:
            points.setdefault(result.name, []).append((result.mask_ratio, result.fid))
    curves = []
    for name, line in zip(sorted(points), cycle(("--", ":", "-."))):
        x, y = zip(*sorted(points[name]), strict=True)
        curves.append(_Curve(f"{name}, quoted from publications", x, y, QUOTED, "D", line, is_quoted=True))
    return curves


def _draw(axes: Axes, section: Section, panel: _Panel) -> None:
    for curve in panel.curves:
        face, edge = ("white", QUOTED) if curve.is_quoted else (curve.color, "white")
        (line,) = axes.plot(curve.x, curve.y, marker=curve.shape, color=curve.color, linestyle=curve.line, linewidth=1.6)
        line.set(markersize=7, markerfacecolor=face, markeredgecolor=edge)
    ticks = sorted({x for curve in panel.curves for x in curve.x})
    axes.set_xticks(ticks[:: -(-len(ticks) // _MAX_TICKS)])
    axes.xaxis.set_major_formatter(plain_numbers())
    set_score_limits(axes, [y for curve in panel.curves for y in curve.y])
    axes.set_xlabel(_SETTINGS[panel.setting][0], color=INK)
    axes.set_ylabel(score_title(section), color=INK)
    draw_grid(axes)
