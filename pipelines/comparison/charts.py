"""Charts: score against cost, score over each setting of the sampler that was swept, and scores while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from pipelines.comparison.columns import short, short_count
from pipelines.comparison.curves import Curve
from pipelines.comparison.published import PublishedResult
from pipelines.comparison.sections import Row, Section, group_rows
from pipelines.comparison.sentences import DISTANCE_TITLES, details, heading, protocol_sentence
from pipelines.pages.chart import Chart, Point, Series, clipped
from pipelines.registry.influences import half_interval

# Setting -> title, parameter of stage generate, and text for names if the setting does not differ.
_SETTINGS = {
    "num_steps": ("steps of the sampler", "sampler.num_steps", "{} steps"),
    "guidance_scale": ("guidance scale", "sampler.guidance_scale", "guidance {:g}"),
    "train_steps": ("training steps", "checkpoint", "{:,} training steps"),
    "ema_length": ("relative length of the average of weights", "ema_length", "EMA length {:g}"),
    "mask_ratio": ("share of the real codes that is masked", "mask_ratio", "mask ratio {:g}"),
}
_QUOTED = "quoted from publications"
_TRAINING_TITLES = {**DISTANCE_TITLES, "sliced_distance": "sliced Wasserstein distance"}
_FAR = 4.0  # a quoted cost beyond the measured ones by more than this factor would leave them no room
_LOG_COST, _LOG_SCORE = 8.0, 4.0  # values that differ by more than this factor are on a log axis


def cost_chart(section: Section) -> Chart | None:
    """None if no measured row has both score and cost, and for completed codes, whose score depends on the mask ratio.

    Published systems with an unknown or distant cost are in the strip beside the axes.
    """
    rows = [row for row in section.rows if section.distance in row.metrics and row.metrics.get("gmacs_total", 0.0) > 0]
    if section.begins_with_codes or not rows:
        return None
    quoted = [result for result in section.published if result.fid is not None]
    costs = [row.metrics["gmacs_total"] for row in rows]
    near = [result for result in quoted if result.tflops and min(costs) / _FAR <= result.tflops * 1e3 <= max(costs) * _FAR]
    unit, giga = ("GMACs", 1.0) if not near and max(costs) < 100 else ("TFLOPs", 1e3)
    points = {row.run_ids[0]: _point(section, row, cost / giga) for row, cost in zip(rows, costs, strict=True)}
    series = [
        Series(name=name, points=tuple(points[row.run_ids[0]] for row in group))
        for name, group in group_rows(rows, lambda row: row.model_name).items()
    ]
    # A line through each sweep: solid if the steps differ, dotted for another setting of the sampler.
    for sweep in (found for found in find_sweeps(section) if found.setting != "train_steps"):
        joined = tuple(points[row.run_ids[0]] for row in sweep.rows if row.run_ids[0] in points)
        line = "solid" if sweep.setting == "num_steps" else "dot"
        series += [Series(name=sweep.rows[0].model_name, points=joined, line=line, has_markers=False)] if len(joined) > 1 else []
    placed = tuple(_quoted_point(result, result.tflops if result in near else None) for result in quoted)
    series += [Series(name=_QUOTED, points=placed, is_quoted=True)] if placed else []
    has_far = any(result.tflops is not None and result not in near for result in quoted)
    return _chart(
        section,
        series,
        x_title=f"{unit} per image (multiply-accumulates, guidance and decoder included)",
        strip_title=f"quoted, cost not known{' or far off' if has_far else ''}",
        is_log_x=_are_far_apart([point.x for one in series for point in one.points if point.x is not None], _LOG_COST),
    )


def _chart(section: Section, series: Sequence[Series], **values: Any) -> Chart:
    assert section.distance is not None
    is_named = section.distance != "fid" and "extractor" in section.protocol
    features = f" on {clipped(str(section.protocol['extractor']), 24)} features" if is_named else ""
    return Chart(
        title=heading(section),
        note=f"{protocol_sentence(section.protocol)}. Larger markers: more parameters. Bars: 95% intervals.",
        y_title=f"{DISTANCE_TITLES[section.distance]}{features}, lower is better",
        series=tuple(series),
        is_log_y=_are_far_apart([point.y for one in series for point in one.points], _LOG_SCORE),
        **values,
    )


def _are_far_apart(values: Sequence[float], factor: float) -> bool:
    return min(values) > 0 and max(values) / min(values) > factor


def _point(section: Section, row: Row, x: float) -> Point:
    """The area of a marker grows with the square root of the size: 10 M and 1 B are both visible."""
    parts = [row.name, *([f"{short_count(row.parameters)} parameters"] if row.parameters else []), *details(row)]
    parts += [f"{short(row.metrics['gmacs_total'])} GMACs per image"] if "gmacs_total" in row.metrics else []
    size = 6.0 + 9.0 * min(2.0, ((row.parameters or 50e6) / 1e9) ** 0.25)
    error = half_interval(row.metrics, str(section.distance)) or 0.0
    return Point(x, row.metrics[str(section.distance)], "\n".join(parts), size, error)


def _quoted_point(result: PublishedResult, x: float | None) -> Point:
    assert result.fid is not None
    parts = [result.label, _QUOTED, f"FID {result.fid:.2f}"]
    parts += [f"{short_count(result.params_millions * 1e6)} parameters"] if result.params_millions else []
    if result.tflops is not None:
        parts.append(f"{short(result.tflops)} TFLOPs per image{'' if result.has_decoder else ', without decoder'}")
    return Point(x, result.fid, "\n".join([*parts, result.source]))


# Sweeps --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """setting: the only difference between the rows: a name of _SETTINGS.   rows: in its order."""

    setting: str
    name: str
    rows: tuple[Row, ...]


def find_sweeps(section: Section) -> list[Sweep]:
    """Sweeps of at least two rows. If the parameters of the samples are known, all but the setting must be equal."""
    sweeps = []
    for setting in _SETTINGS:
        rows = [row for row in section.rows if getattr(row, setting) is not None and section.distance in row.metrics]
        for group in group_rows(rows, lambda row, setting=setting: _fixed(row, setting)).values():  # type: ignore[misc]
            values = {getattr(row, setting) for row in group}
            if len(values) == len(group) > 1:  # two rows at one value differ in something unknown
                sweeps.append(_sweep(setting, group))
    return sweeps


def _fixed(row: Row, setting: str) -> tuple[Any, ...]:
    """Everything that must be equal in a sweep."""
    generated: Mapping[str, str] = row.generated or {}
    others = tuple(sorted((name, value) for name, value in generated.items() if name != _SETTINGS[setting][1]))
    shared = (getattr(row, name) for name in _SETTINGS if name != setting)
    return (row.model_name, *shared, row.generated is None, others)


def _sweep(setting: str, rows: Sequence[Row]) -> Sweep:
    rest = {name: getattr(rows[0], name) for name in _SETTINGS if name != setting}
    if (rows[0].generated or {}).get("checkpoint", "None") == "None":  # of the last step, as usual
        rest.pop("train_steps", None)
    words = [_SETTINGS[name][2].format(value) for name, value in rest.items() if value is not None]
    name = ", ".join([rows[0].model_name, *words]).replace(", 1 steps", ", 1 step")
    return Sweep(setting, name, tuple(sorted(rows, key=lambda row: getattr(row, setting))))


def sweep_charts(section: Section) -> list[Chart]:
    """One chart per swept setting. Published curves are drawn with one-step decoding."""
    sweeps = find_sweeps(section) + _single_ratios(section)
    charts = []
    for setting, (title, _, _) in _SETTINGS.items():
        series = [_curve(section, sweep) for sweep in sweeps if sweep.setting == setting]
        if series:
            quoted = _quoted_curves(section.published) if setting == "mask_ratio" else []
            charts.append(_chart(section, [*series, *quoted], x_title=title))
    return charts


def _single_ratios(section: Section) -> list[Sweep]:
    """Rows of one-step decoding outside any sweep. Published curves are drawn with a single row as well."""
    if not any(result.mask_ratio is not None for result in section.published):
        return []
    swept = {row.run_ids[0] for sweep in find_sweeps(section) if sweep.setting == "mask_ratio" for row in sweep.rows}
    rows = [row for row in section.rows if row.mask_ratio is not None and section.distance in row.metrics]
    return [Sweep("mask_ratio", row.name, (row,)) for row in rows if row.run_ids[0] not in swept]


def _curve(section: Section, sweep: Sweep) -> Series:
    points = tuple(_point(section, row, getattr(row, sweep.setting)) for row in sweep.rows)
    return Series(name=sweep.name, points=points, line="solid")


def _quoted_curves(results: Sequence[PublishedResult]) -> list[Series]:
    """One curve per system."""
    points: dict[str, list[Point]] = {}
    for result in results:
        if result.fid is not None and result.mask_ratio is not None:
            points.setdefault(result.name, []).append(_quoted_point(result, result.mask_ratio))
    return [
        Series(
            name=f"{name}, {_QUOTED}",
            points=tuple(sorted(points[name], key=lambda point: point.x or 0.0)),
            line=line,
            is_quoted=True,
        )
        for name, line in zip(sorted(points), cycle(("dash", "dot", "dashdot")), strict=False)
    ]


# While training --------------------------------------------------------------------------------------------------------------


def training_charts(curves: Sequence[Curve]) -> list[Chart]:
    """One for each score, reference and number of samples: other curves are not comparable."""
    charts = []
    for reference, num_samples in dict.fromkeys((curve.reference, curve.num_samples) for curve in curves):
        together = [curve for curve in curves if (curve.reference, curve.num_samples) == (reference, num_samples)]
        for score, title in _TRAINING_TITLES.items():
            series = tuple(
                Series(name=curve.name, points=_training_points(curve, score, title), line="solid")
                for curve in together
                if any(score in found for found in curve.scores.values())
            )
            if series:
                y_title = f"{title} of {num_samples:,} samples, lower is better"
                note = f"Against {reference[:24]}, by the EMA of each step. Bars: 95% intervals."
                charts.append(Chart(title="While training", note=note, x_title="training steps", y_title=y_title, series=series))
    return charts


def _training_points(curve: Curve, score: str, title: str) -> tuple[Point, ...]:
    return tuple(
        Point(
            step,
            found[score],
            f"{curve.name}\n{title} {short(found[score])} after {step:,} steps",
            error=half_interval(found, score) or 0.0,
        )
        for step, found in curve.scores.items()
        if score in found
    )
