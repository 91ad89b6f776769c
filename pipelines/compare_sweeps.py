"""Sweeps: runs of one model that differ in one setting of the sampler, and the figure of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.compare_plots import (
    INK,
    Axes,
    clipped,
    draw_grid,
    looks,
    new_figure,
    plain_numbers,
    quiet,
    score_title,
    set_score_limits,
    to_image,
)
from pipelines.comparison import Row, Section, by_model

_TITLES = {"num_steps": "steps of the sampler", "guidance_scale": "guidance scale"}
_MAX_TICKS = 12


@dataclass(frozen=True)
class Sweep:
    """setting: the one in which the rows differ, num_steps or guidance_scale.   rows: in its order."""

    setting: str
    label: str
    rows: tuple[Row, ...]


def find_sweeps(section: Section) -> list[Sweep]:
    """Those of at least two rows. Where it is known how the samples were made, all but the setting must be equal."""
    sweeps = []
    for model, rows in by_model(section.rows).items():
        for setting in _TITLES:
            groups: dict[tuple[Any, ...], list[Row]] = {}
            for row in rows:
                if getattr(row, setting) is not None and section.distance in row.metrics:
                    groups.setdefault(_fixed(row, setting), []).append(row)
            for group in groups.values():
                values = {getattr(row, setting) for row in group}
                if len(values) == len(group) > 1:  # of two rows at one value it is not known what else differs
                    sweeps.append(_sweep(model, setting, group))
    return sweeps


def _fixed(row: Row, setting: str) -> tuple[Any, ...]:
    """All that must be equal in a sweep."""
    generated: Mapping[str, str] = row.generated or {}
    others = tuple(sorted((name, value) for name, value in generated.items() if name != f"sampler.{setting}"))
    return (row.train_steps, getattr(row, _other(setting)), row.generated is None, others)


def _other(setting: str) -> str:
    return "guidance_scale" if setting == "num_steps" else "num_steps"


def _sweep(model: str, setting: str, rows: Sequence[Row]) -> Sweep:
    rest = getattr(rows[0], _other(setting))
    fixed = "" if rest is None else f", {rest} steps" if setting == "guidance_scale" else f", guidance {rest:g}"
    return Sweep(setting, model + fixed, tuple(sorted(rows, key=lambda row: getattr(row, setting))))


def sweep_figure(section: Section) -> Image.Image | None:
    """A panel for the number of steps, one for guidance; None where nothing was swept."""
    sweeps = find_sweeps(section)
    settings = [setting for setting in _TITLES if any(sweep.setting == setting for sweep in sweeps)]
    if not settings:
        return None
    with quiet():
        figure = new_figure(section, 5.0 * len(settings), 4.4)
        for axes, setting in zip(np.atleast_1d(figure.subplots(1, len(settings))), settings, strict=True):
            _draw(axes, section, [sweep for sweep in sweeps if sweep.setting == setting])
        return to_image(figure)


def _draw(axes: Axes, section: Section, sweeps: Sequence[Sweep]) -> None:
    """One panel. All sweeps are of the same setting."""
    setting, handles, scores = sweeps[0].setting, [], []
    for sweep, (color, shape) in zip(sweeps, looks(), strict=False):
        x = [getattr(row, setting) for row in sweep.rows]
        y = [row.metrics[str(section.distance)] for row in sweep.rows]
        handles += axes.plot(x, y, marker=shape, color=color, markersize=7, markeredgecolor="white", linewidth=1.6)
        scores += y
    ticks = sorted({getattr(row, setting) for sweep in sweeps for row in sweep.rows})
    axes.set_xticks(ticks[:: -(-len(ticks) // _MAX_TICKS)])
    axes.xaxis.set_major_formatter(plain_numbers())
    set_score_limits(axes, scores)
    axes.set_xlabel(_TITLES[setting], color=INK)
    axes.set_ylabel(score_title(section), color=INK)
    draw_grid(axes)
    legend = axes.legend(handles, [""] * len(handles), fontsize=8, frameon=False)
    for text, sweep in zip(legend.get_texts(), sweeps, strict=True):
        text.set_parse_math(False)  # a name may hold a $
        text.set_text(clipped(sweep.label, 44))
