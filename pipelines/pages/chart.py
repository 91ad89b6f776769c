"""Charts: one description, which Plotly draws on a page and matplotlib as a PNG."""

from __future__ import annotations

import html
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

QUOTED_COLOR = "#8a8f98"
_COLORS = ("#4c8dd6", "#e0663f", "#3fa45b", "#a571d0", "#c98a1b", "#22a6a6", "#d0578d", "#7d8f2e", "#9a7560", "#6c79d9")
_SYMBOLS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
}  # Plotly, matplotlib
_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # Plotly, matplotlib
_NAME_LENGTH = 60  # of a name in a legend
_TEXT_WIDTH = 80  # letters of a line beside the pointer
_TITLE_WIDTH, _STRIP_WIDTH = 50, 11  # letters of a line beside an axis, and below the strip
_WIDTH, _HEIGHT, _LEGEND_ROW = 9.0, 5.0, 0.2  # inches of a PNG
_LEGEND_PIXELS = 22  # a row of a legend on a page
_DPI = 130


@dataclass(frozen=True)
class Point:
    """x: None if it is unknown; such points are in a strip beside the axes.   text: shown beside the pointer.

    size: of the marker, in points.   error: half of the length of a bar, 0 for none.
    """

    x: float | None
    y: float
    text: str = ""
    size: float = 7.0
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """Series of one name share a colour, a symbol and an entry of the legend.

    line: "" (none), "solid", "dash", "dot" or "dashdot".   is_quoted: gray, with hollow markers.
    """

    name: str
    points: tuple[Point, ...]
    line: str = ""
    has_markers: bool = True
    is_quoted: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """title, note: in the PNG only, because a page has them as text.   strip_title: of the strip of points without x."""

    x_title: str
    y_title: str
    series: tuple[Series, ...]
    title: str = ""
    note: str = ""
    strip_title: str = ""
    is_log_x: bool = False
    is_log_y: bool = False

    @property
    def has_strip(self) -> bool:
        return any(point.x is None for series in self.series for point in series.points)

    def looks(self) -> dict[str, tuple[str, str]]:
        """Colour and symbol by name. No pair repeats before all were used."""
        free = cycle((color, symbol) for symbol in _SYMBOLS for color in _COLORS)
        found: dict[str, tuple[str, str]] = {}
        for series in self.series:
            if series.name not in found:
                found[series.name] = (QUOTED_COLOR, "diamond") if series.is_quoted else next(free)
        return found


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


# Plotly --------------------------------------------------------------------------------------------------------------------


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """Data and layout of Plotly without colours of the page, which its script adds. Plotly places the legend and the ticks."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "none"})
    looks, named = chart.looks(), set()
    for series in chart.series:
        color, symbol = looks[series.name]
        for is_beside in (False, True):
            points = [point for point in series.points if (point.x is None) == is_beside]
            if not points:
                continue
            mode = "+".join(["lines"] * bool(series.line) + ["markers"] * series.has_markers)
            figure.add_scatter(
                name=_plain(clipped(series.name, _NAME_LENGTH)),
                legendgroup=series.name,
                showlegend=series.name not in named,
                mode=mode,
                x=[0 if point.x is None else point.x for point in points],
                y=[point.y for point in points],
                xaxis="x2" if is_beside else "x",
                hovertext=[_wrapped(point.text, _TEXT_WIDTH) for point in points],
                hoverinfo="text" if points[0].text else None,
                error_y={"array": [point.error for point in points], "thickness": 1, "visible": any(p.error for p in points)},
                line={"color": color, "dash": series.line or None},
                marker={
                    "color": color,
                    "symbol": "line-ew-open" if is_beside else f"{symbol}-open" if series.is_quoted else symbol,
                    "size": [point.size for point in points],
                    "opacity": 1,
                },
            )
            named.add(series.name)
    figure.update_layout(
        height=420 + _LEGEND_PIXELS * min(12, len(named)),
        margin={"l": 60, "r": 10, "t": 20, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom", "yref": "container", "traceorder": "normal"},
        hoverlabel={"align": "left"},
        hovermode="closest",
        showlegend=True,
    )
    figure.update_layout(xaxis=_axis(chart.x_title, chart.is_log_x), yaxis=_axis(chart.y_title, chart.is_log_y))
    if chart.has_strip:
        title = {"text": _wrapped(chart.strip_title, _STRIP_WIDTH), "font": {"size": 11}}
        strip = {"title": title, "domain": [0.87, 1], "showticklabels": False, "showgrid": False, "zeroline": False}
        figure.update_layout(xaxis={"domain": [0, 0.84]}, xaxis2=strip)
    return figure.to_plotly_json()


def _axis(title: str, is_log: bool) -> dict[str, Any]:
    return {
        "title": {"text": _wrapped(title, _TITLE_WIDTH)},
        "automargin": True,
        **({"type": "log", "dtick": "D2"} if is_log else {}),
    }


def _plain(text: str) -> str:
    """Plotly reads some tags in text, such as <a> and <br>."""
    return html.escape(text, quote=False)


def _wrapped(text: str, width: int) -> str:
    """Lines of a width. Line breaks of the text stay."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    return "<br>".join(map(_plain, lines))


# PNG -----------------------------------------------------------------------------------------------------------------------


def png_of(charts: Sequence[Chart]) -> bytes:
    """All charts, one below the other. Does not use pyplot, which needs a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_HEIGHT + _LEGEND_ROW * len(chart.looks()) / 2 for chart in charts]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=_DPI, layout="constrained")
    parts = figure.subfigures(len(charts), 1, squeeze=False, height_ratios=heights)
    for part, chart in zip(parts[:, 0], charts, strict=True):
        _draw(part, chart)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph")  # letters that the font lacks are drawn as boxes
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw(part: Any, chart: Chart) -> None:
    """part: a (sub)figure of matplotlib."""
    axes, strip = part.subplots(1, 2, sharey=True, width_ratios=(6, 1)) if chart.has_strip else (part.subplots(), None)
    looks, named = chart.looks(), set()
    for series in chart.series:
        color, symbol = looks[series.name]
        marker, face = _SYMBOLS[symbol], "none" if series.is_quoted else color
        points = [point for point in series.points if point.x is not None]
        x, y = [point.x for point in points], [point.y for point in points]
        if series.line:
            axes.plot(x, y, color=color, linestyle=_LINES[series.line], linewidth=1.5)
        if series.has_markers:
            axes.scatter(x, y, s=[point.size**2 for point in points], marker=marker, facecolors=face, edgecolors=color)
        if any(point.error for point in points):
            axes.errorbar(x, y, [point.error for point in points], fmt="none", ecolor=color, elinewidth=1, capsize=3)
        if strip is not None:
            beside = [point.y for point in series.points if point.x is None]
            strip.scatter([0] * len(beside), beside, s=80, marker="_", color=color)
        if series.name not in named:
            entry = axes.plot([], [], color=color, label=_text(clipped(series.name, _NAME_LENGTH)))[0]
            entry.set(linestyle=_LINES.get(series.line, ""), marker=marker if series.has_markers else "", markerfacecolor=face)
            named.add(series.name)
    axes.set(xlabel=_text(chart.x_title), ylabel=_text(chart.y_title))
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    _set_scale(axes, "x", chart.is_log_x)
    _set_scale(axes, "y", chart.is_log_y)
    if strip is not None:
        strip.set_xlabel(textwrap.fill(chart.strip_title, _STRIP_WIDTH), fontsize=8)
        strip.set_xticks([])
        strip.tick_params(labelleft=False)
    part.suptitle(_text(chart.title), x=0.01, ha="left", weight="bold")
    axes.set_title(_text(textwrap.fill(chart.note, 120)), fontsize=8, loc="left")
    part.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _set_scale(axes: Any, name: str, is_log: bool) -> None:
    """Ticks are plain numbers, without powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    if is_log:
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:g}")


def _text(text: str) -> str:
    """$ starts no formula, and a leading underscore does not hide a name from the legend."""
    invisible = "\u200b" if text.startswith("_") else ""
    return invisible + text.replace("$", r"\$")
