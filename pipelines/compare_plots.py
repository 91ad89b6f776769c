"""The figure of a comparison: score against cost.

Measured runs are filled and coloured, quoted numbers hollow and gray with labels in italics, so that nobody takes one for the
other. Quoted systems whose cost is not known stand in a strip of their own beside the plot.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from pipelines.compare_table import heading, protocol_sentence, short_count
from pipelines.comparison import Row, Section, by_model
from pipelines.published import PublishedResult

Axes = Any  # matplotlib's, which is imported where something is drawn
Figure = Any

_COLORS = ("#0b6e99", "#d1495b", "#3a7d44", "#8f5db7", "#c77d0a", "#2f4b7c", "#a23b72", "#5b8c00", "#00798c", "#7a4419")
_SHAPES = ("o", "s", "^", "D", "v", "P")
QUOTED = "#8a8f98"
INK = "#2b2f36"
DPI = 150
_WIDTH = 10.0  # inches of a figure
_HEAD = 0.62  # inches of it for the title
_LABEL_LENGTH = 30
_MAX_LABELLED = 4  # points of one model
_STRIP_FONT = 7.0
_TITLES = {"fid": "FID", "frechet_distance": "Fréchet distance"}
_LOG_RATIO = 4.0  # scores that differ by more than this factor are drawn on a log axis


# Score against cost --------------------------------------------------------------------------------------------------------


def cost_figure(section: Section) -> Image.Image | None:
    """None where no measured row has both a score and a cost."""
    with quiet():
        return _cost_figure(section)


def _cost_figure(section: Section) -> Image.Image | None:
    distance = section.distance
    points = [row for row in section.rows if distance in row.metrics and row.metrics.get("gmacs_total", 0.0) > 0]
    if not points or distance is None:
        return None
    placed = [result for result in section.published if result.fid is not None and result.tflops is not None]
    unplaced = [result for result in section.published if result.fid is not None and result.tflops is None]
    giga = not placed and max(row.metrics["gmacs_total"] for row in points) < 100
    figure, axes, strip = _canvas(section, len(unplaced))
    _style(axes, section, "GMACs" if giga else "TFLOPs")
    scale = 1.0 if giga else 1e-3
    xs = [row.metrics["gmacs_total"] * scale for row in points] + [result.tflops or 0.0 for result in placed]
    scores = [row.metrics[distance] for row in points] + [result.fid or 0.0 for result in (*placed, *unplaced)]
    _limits(axes, xs, scores)
    labels = _draw_quoted(axes, placed) + _draw_measured(axes, points, distance, scale)
    if strip is not None:
        _draw_strip(strip, axes, unplaced)
    _write_labels(axes, labels)
    _legend(axes, has_quoted=bool(section.published))
    return to_image(figure)


def _draw_quoted(axes: Axes, results: Sequence[PublishedResult]) -> list[_Label]:
    labels = []
    for result in results:
        assert result.tflops is not None and result.fid is not None
        axes.scatter(result.tflops, result.fid, marker="D", s=46, facecolors="none", edgecolors=QUOTED, linewidths=1.4, zorder=5)
        labels.append(_Label(result.tflops, result.fid, _quoted_label(result), QUOTED, is_quoted=True))
    return labels


def _draw_measured(axes: Axes, rows: Sequence[Row], distance: str, scale: float) -> list[_Label]:
    """Points of one model share colour and shape; those that differ in the number of steps alone are joined."""
    labels = []
    for (label, group), (color, shape) in zip(by_model(rows).items(), looks(), strict=False):
        line = sorted(group, key=lambda row: (row.metrics["gmacs_total"], -row.metrics[distance]))
        x, y = [row.metrics["gmacs_total"] * scale for row in line], [row.metrics[distance] for row in line]
        if len({row.guidance_scale for row in line}) == 1 and len({row.num_steps for row in line}) == len(line):
            axes.plot(x, y, color=color, linewidth=1.2, alpha=0.4, zorder=3)
        sizes = [_area(row.parameters) for row in line]
        axes.scatter(x, y, s=sizes, marker=shape, color=color, edgecolors="white", linewidths=1.0, zorder=4)
        best = min(range(len(line)), key=y.__getitem__)
        texts = _texts(label, line, best)
        labels += [_Label(*at, text, color, is_quoted=False) for at, text in zip(zip(x, y, strict=True), texts, strict=True)]
    return labels


def _canvas(section: Section, num_unplaced: int) -> tuple[Figure, Axes, Axes | None]:
    if not num_unplaced:
        figure = new_figure(section, _WIDTH, 5.2)
        return figure, figure.subplots(), None
    figure = new_figure(section, _WIDTH, max(5.6, 1.9 + 0.16 * num_unplaced))
    axes, strip = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3.2, 1.0), "wspace": 0.02})
    return figure, axes, strip


def _style(axes: Axes, section: Section, unit: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(f"{unit} per image (multiply-accumulates, guidance and decoder included)", color=INK)
    axes.set_ylabel(score_title(section), color=INK)
    draw_grid(axes)


def score_title(section: Section) -> str:
    """Of an axis. A $ in the extractor's name is text: only two of them would be a formula."""
    assert section.distance is not None
    is_named = section.distance != "fid" and "extractor" in section.protocol
    features = f" on {clipped(str(section.protocol['extractor']), 24)} features".replace("$", r"\$") if is_named else ""
    return f"{_TITLES[section.distance]}{features}, lower is better"


def draw_grid(axes: Axes) -> None:
    axes.grid(which="major", color="#d9dce1", linewidth=0.7)
    axes.grid(which="minor", color="#eef0f2", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5bac2")
    axes.tick_params(which="both", colors="#5b626d", labelsize=9)


def _limits(axes: Axes, xs: Sequence[float], scores: Sequence[float]) -> None:
    """Room around all points, whatever is labelled; a log axis for scores that lie far apart. Ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    reach = max(0.15, 0.08 * math.log10(max(xs) / min(xs))) if max(xs) > min(xs) else 0.5
    axes.set_xlim(min(xs) / 10**reach, max(xs) * 10 ** (reach + 0.1))
    ratio = max(xs) / min(xs)
    if ratio < 30:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)))
    axes.xaxis.set_major_formatter(plain_numbers())
    axes.xaxis.set_minor_formatter(NullFormatter())
    set_score_limits(axes, scores)


def set_score_limits(axes: Axes, scores: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(scores), max(scores)
    if low > 0 and high / low > _LOG_RATIO:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** 0.07)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(plain_numbers())


def plain_numbers() -> Any:
    """Ticks without powers of ten."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def _area(parameters: int | None) -> float:
    """Square points. By the root of the size, so that 10 M and 1 B can both be seen."""
    return 60.0 if not parameters else 30.0 + 200.0 * min(4.0, math.sqrt(parameters / 1e9))


def _texts(label: str, rows: Sequence[Row], best: int) -> list[str]:
    """A label for each point of one model, what differs in it; name and size at one. Of many points the best alone is labelled."""
    settings = [(row.num_steps, row.guidance_scale) for row in rows]
    has_steps, has_guidance = (len(set(values)) > 1 for values in zip(*settings, strict=True))
    has_variant = len(set(settings)) < len(rows) > 1
    is_crowded = len(rows) > _MAX_LABELLED
    texts = []
    for number, row in enumerate(rows):
        is_named = number == (best if is_crowded else 0)
        parts = [clipped(label, _LABEL_LENGTH)] if is_named else []
        parts += [short_count(row.parameters)] if is_named and row.parameters else []
        parts += [f"{row.num_steps} steps"] if has_steps and row.num_steps else []
        parts += [f"guidance {row.guidance_scale:g}"] if has_guidance and row.guidance_scale is not None else []
        parts += [clipped(row.variant, _LABEL_LENGTH)] if has_variant else []
        texts.append("" if is_crowded and not is_named else " · ".join(parts))
    return texts


def _quoted_label(result: PublishedResult) -> str:
    size = f" · {short_count(result.params_millions * 1e6)}" if result.params_millions else ""
    return f"{result.name}{size}"


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def looks() -> Iterator[tuple[str, str]]:
    """Colour and shape of one model after the other, each pair once before any comes again."""
    return cycle((color, shape) for shape in _SHAPES for color in _COLORS)


@dataclass(frozen=True)
class _Label:
    x: float
    y: float
    text: str
    color: str
    is_quoted: bool


def _write_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Each beside its point, at the first of eight places where it covers no point and no other label, else nowhere."""
    figure = axes.get_figure()
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = []
    places = [(9, 0), (-9, 0), (0, 10), (0, -10), (8, 8), (-8, 8), (8, -8), (-8, -8), (0, 20), (0, -20), (14, 16), (14, -16)]
    for label in sorted(labels, key=lambda label: label.is_quoted):  # what was measured chooses first
        if not label.text:
            continue
        for dx, dy in places:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=8,
                color=label.color,
                style="italic" if label.is_quoted else "normal",
                fontweight="normal" if label.is_quoted else "bold",
                parse_math=False,
                zorder=5,
            )
            box = text.get_window_extent(renderer)
            is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if is_inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*point) for point in points):
                taken.append(box)
                break
            text.remove()


def _draw_strip(strip: Axes, axes: Axes, results: Sequence[PublishedResult]) -> None:
    """A short line at each score, and its label beside it, moved up or down as far as neighbours ask for."""
    strip.set_xlim(0, 1)
    strip.set_xticks([])
    strip.tick_params(which="both", left=False, labelleft=False)
    strip.spines[["top", "right", "bottom"]].set_visible(False)
    strip.spines["left"].set_color("#d9dce1")
    strip.set_xlabel("quoted, cost not known", color=QUOTED, fontsize=8.5, style="italic", labelpad=10)
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
        text = strip.text(0.17, place, f"{_quoted_label(result)}  {result.fid:.2f}", transform=strip.transAxes, parse_math=False)
        text.set(fontsize=_STRIP_FONT, color=QUOTED, style="italic", va="center")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1] that are at least gap apart and, together, as near to the ascending heights as can be."""
    from sklearn.isotonic import isotonic_regression

    steps = gap * np.arange(len(heights))
    if not len(heights):
        return []
    nearest = isotonic_regression(np.asarray(heights) - steps)
    return list(map(float, np.clip(nearest, 0.0, max(0.0, 1.0 - steps[-1])) + steps))


def _legend(axes: Axes, *, has_quoted: bool) -> None:
    from matplotlib.lines import Line2D

    def marker(shape: str, face: str, edge: str, label: str) -> Line2D:
        return Line2D([], [], marker=shape, linestyle="", markerfacecolor=face, markeredgecolor=edge, markersize=7, label=label)

    handles = [marker("o", _COLORS[0], "white", "measured here; larger: more parameters")]
    handles += [marker("D", "white", QUOTED, "quoted from publications")] if has_quoted else []
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


# Figures --------------------------------------------------------------------------------------------------------------------


def new_figure(section: Section, width: float, height: float) -> Figure:
    """Inches, with the section as its title. Without pyplot, which keeps figures and looks for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.98 - _HEAD / height))
    figure = Figure(figsize=(width, height), dpi=DPI, layout=engine, facecolor="white")
    FigureCanvasAgg(figure)
    left, top = 0.15 / width, 1 - 0.14 / height
    title = figure.text(left, top, clipped(heading(section), 90), parse_math=False)
    title.set(fontsize=12, fontweight="bold", color=INK, va="top")
    below = figure.text(left, top - 0.24 / height, clipped(protocol_sentence(section.protocol), 150), parse_math=False)
    below.set(fontsize=8, color="#6b727c", va="top")
    return figure


@contextmanager
def quiet() -> Iterator[None]:
    """A letter that the font lacks is drawn as a box; nobody needs to hear of it."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph")
        yield


def to_image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """One below the other, on white."""
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole
