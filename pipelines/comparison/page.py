"""A comparison as one self-contained HTML page: tables, charts and samples."""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import datetime

from PIL import Image

from enat.images import png_bytes
from pipelines.comparison import sentences
from pipelines.comparison.charts import cost_chart, sweep_charts, training_charts
from pipelines.comparison.columns import MISSING, measured_table, quoted_table
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Row
from pipelines.pages import page
from pipelines.pages.chart import Chart
from pipelines.storage.redaction import without_credentials

_GRID_WIDTH = 1200  # pixels; larger grids are scaled down for the page
_LARGEST_PNG = 400_000  # bytes; a larger grid becomes a JPEG
_RUNS_SHOWN = 8
_TILE, _LOGGED_TILE = 96, 64  # pixels of a small sample on the page, and in the grids that stage evaluate logs


@dataclass(frozen=True)
class Grids:
    """shown: samples of rows, in order.   num_left_out: sets of samples that were not read because there are too many."""

    shown: tuple[tuple[Row, Image.Image], ...] = ()
    num_left_out: int = 0


def render(comparison: Comparison, grids: Grids, *, title: str, created: datetime) -> str:
    charts: dict[str, Chart] = {}
    for section in comparison.sections:
        cost, sweeps = cost_chart(section), sweep_charts(section)
        charts |= {f"{section.name} cost": cost} if cost is not None else {}
        charts |= {f"{section.name} sweep {number}": chart for number, chart in enumerate(sweeps)}
    charts |= {f"training {number}": chart for number, chart in enumerate(training_charts(comparison.curves))}
    letters, different = sentences.differences(comparison)
    return page.render(
        "pipelines.comparison",
        "compare.html.j2",
        charts,
        title=title,
        created=f"{created:%Y-%m-%d %H:%M} UTC",
        comparison=comparison,
        uri=without_credentials(comparison.uri),
        sentences=sentences,
        measured_table=measured_table,
        quoted_table=quoted_table,
        missing=MISSING,
        letters=letters,
        differences=different,
        grids=[
            {"row": row, "details": ", ".join(sentences.details(row)), "picture": _picture(row, image)}
            for row, image in grids.shown
        ],
        grids_sentence=grids_sentence(grids),
        runs_shown=_RUNS_SHOWN,
    )


def grids_sentence(grids: Grids) -> str:
    """Whether the images can be compared one by one, and how many are missing."""
    seeds = {row.generated.get("seed") if row.generated else None for row, _ in grids.shown}
    if not seeds:
        return ""
    if None in seeds:
        sentence = "The first samples of each run. The seeds of some are unknown."
    elif len(seeds) > 1:
        sentence = f"The first samples of each run, drawn with different seeds ({', '.join(sorted(map(str, seeds)))})."
    else:
        sentence = f"The first samples of each run, with equal seeds at equal positions (run seed {seeds.pop()})."
    if grids.num_left_out:
        sentence += f" {grids.num_left_out:,} more sets of samples are not shown. Compare fewer runs to see them."
    return sentence


def _picture(row: Row, image: Image.Image) -> page.Picture:
    """Small images are enlarged. Large grids become JPEG: as PNG, grids of photographs take many megabytes."""
    side = row.resolution or _LOGGED_TILE
    zoom = max(1.0, _TILE / (side * max(1, _LOGGED_TILE // side)))
    if image.width > _GRID_WIDTH:
        image = image.resize((_GRID_WIDTH, max(1, round(image.height * _GRID_WIDTH / image.width))), Image.Resampling.LANCZOS)
    shown = page.picture(image, zoom)
    if len(png_bytes(image)) <= _LARGEST_PNG:
        return shown
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return page.Picture(page.data_uri(buffer.getvalue(), "jpeg"), shown.width)
