"""Shared parts of the figures of a comparison: page, axes, colours of models, legends."""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from PIL import Image

from pipelines.comparison.sections import Section
from pipelines.comparison.sentences import heading, protocol_sentence

Axes = Any  # of matplotlib, which is imported when something is drawn
Figure = Any
Handle = Any

_COLORS = ("#0b6e99", "#d1495b", "#3a7d44", "#8f5db7", "#c77d0a", "#2f4b7c", "#a23b72", "#5b8c00", "#00798c", "#7a4419")
_SHAPES = ("o", "s", "^", "D", "v", "P")
QUOTED = "#8a8f98"
UNNAMED = "#b9c6d2"  # models that the legend has no room for
INK = "#2b2f36"
DPI = 150
LEGEND_FONT = 8.0
_TITLES = {"fid": "FID", "frechet_distance": "Fréchet distance"}
_LOG_RATIO = 4.0  # scores that differ by more than this factor are drawn on a log axis
_LETTERS_PER_INCH = 15.0  # of the sentence below the title, and of legends
_MAX_LINES = 4  # of that sentence


def new_figure(section: Section, width: float, height: float) -> Figure:
    """A figure titled with the section. width, height: inches without the title. Does not use pyplot, which needs a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(
        protocol_sentence(section.protocol), int(width * _LETTERS_PER_INCH), max_lines=_MAX_LINES, placeholder=" …"
    )
    head = 0.46 + 0.16 * len(lines)
    height += head
    engine = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.98 - head / height))
    figure = Figure(figsize=(width, height), dpi=DPI, layout=engine, facecolor="white")
    FigureCanvasAgg(figure)
    left, top = 0.15 / width, 1 - 0.14 / height
    title = figure.text(left, top, clipped(heading(section), int(width * 9)), parse_math=False)
    title.set(fontsize=12, fontweight="bold", color=INK, va="top")
    below = figure.text(left, top - 0.24 / height, "\n".join(lines), parse_math=False)
    below.set(fontsize=8, color="#6b727c", va="top")
    return figure


def score_title(section: Section) -> str:
    """Title of a score axis. A $ in the name of an extractor is escaped: two of them would be a formula."""
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


def set_score_limits(axes: Axes, scores: Sequence[float]) -> None:
    """Leave room around all scores. Scores that are far apart get a log axis. Ticks are plain numbers."""
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


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def looks() -> Iterator[tuple[str, str]]:
    """Colours and shapes of successive models. No pair repeats before all were used."""
    return cycle((color, shape) for shape in _SHAPES for color in _COLORS)


# Legends -------------------------------------------------------------------------------------------------------------------


def handle(label: str, color: str, shape: str, *, is_quoted: bool = False, line: str = "") -> Handle:
    """An entry of a legend. line: a line style of matplotlib."""
    from matplotlib.lines import Line2D

    face, edge = ("white", color) if is_quoted else (color, "white")
    return Line2D(
        [], [], color=color, marker=shape, linestyle=line, markerfacecolor=face, markeredgecolor=edge, markersize=7, label=label
    )


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Number of columns that fit into `width` inches."""
    return max(1, min(4, len(labels), int(width / (0.45 + max(map(len, labels)) / _LETTERS_PER_INCH))))


def legend_height(labels: Sequence[str], width: float) -> float:
    """Height of a legend in inches."""
    return 0.25 + 0.185 * -(-len(labels) // legend_columns(labels, width))


def draw_legend(place: Figure | Axes, handles: Sequence[Handle], width: float, **where: Any) -> None:
    """Draw a legend in a figure or axes. Names are plain text: $ starts no formula and a leading underscore hides nothing."""
    labels = [str(entry.get_label()) for entry in handles]
    legend = place.legend(
        handles, [""] * len(handles), fontsize=LEGEND_FONT, frameon=False, ncols=legend_columns(labels, width), **where
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


# Pictures ------------------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings about letters that the font lacks. They are drawn as boxes."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph")
        yield


def to_image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically on white."""
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole
