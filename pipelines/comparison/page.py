"""A comparison as one self-contained HTML page: tables, figures and samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import Image

from enat.images import png_bytes
from pipelines.comparison.columns import (
    MAIN_RANK,
    MISSING,
    Column,
    Record,
    best_values,
    by_score,
    cell,
    columns_of,
    quoted_columns,
    quoted_record,
    record,
)
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Row, Section
from pipelines.comparison.sentences import (
    CONVENTION,
    alike_sentence,
    differences,
    differences_sentence,
    heading,
    protocol_sentence,
    published_sentence,
)
from pipelines.storage.redaction import without_credentials

_GRID_WIDTH = 1200  # pixels; larger grids are scaled down for the page
_LARGEST_PNG = 400_000  # bytes; a larger grid becomes a JPEG
_RUNS_SHOWN = 8
_LONG = 36  # letters; a longer cell may be broken into lines
_NAMES = ("model", "variant", "num_steps", "guidance_scale", "mask_ratio")  # columns that identify a row


@dataclass(frozen=True)
class Figures:
    """Figures of one section, None if there is nothing to draw."""

    cost: Image.Image | None
    sweep: Image.Image | None


@dataclass(frozen=True)
class Grids:
    """shown: samples of rows, in order.   num_left_out: sets of samples that were not read because there are too many."""

    shown: tuple[tuple[Row, Image.Image], ...] = ()
    num_left_out: int = 0


def render(
    comparison: Comparison,
    figures: Sequence[Figures],
    grids: Grids,
    *,
    title: str,
    created: datetime,
) -> str:
    """Render the page. figures: one entry per section."""
    import jinja2

    loader = jinja2.PackageLoader("pipelines.comparison", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows, quoted = comparison.rows, comparison.quoted
    letters, different = differences(comparison)
    return environment.get_template("compare.html.j2").render(
        title=title,
        created=f"{created:%Y-%m-%d %H:%M} UTC",
        count=f"{len(rows)} evaluation{'s' if len(rows) > 1 else ''}",
        uri=without_credentials(comparison.uri),
        query=str(comparison.query),
        notes=comparison.notes,
        sections=[
            {**_section(section, drawn), "quoted": _quoted(quoted[section.name]) if section.name in quoted else None}
            for section, drawn in zip(comparison.sections, figures, strict=True)
        ],
        letters=letters,
        differences=different,
        differences_sentence=differences_sentence(letters),
        grids=[_grid(row, image) for row, image in grids.shown],
        grids_sentence=grids_sentence(grids),
        small_grids=all(image.width < _GRID_WIDTH / 2 for _, image in grids.shown),
        convention=CONVENTION,
        missing=MISSING,
        runs=[_run(row) for row in rows],
    )


def _section(section: Section, figures: Figures) -> dict[str, Any]:
    """Values of a section. Its less common columns form a second table, which names the rows as well."""
    columns = columns_of(section)
    best = best_values(section, columns)
    names = [column for column in columns if column.key in _NAMES]
    others = [column for column in columns if column.rank > MAIN_RANK]
    return {
        "name": section.name,
        "heading": heading(section),
        "protocol": protocol_sentence(section.protocol),
        "digest": section.protocol_digest,
        "alike": alike_sentence(section),
        "table": _table(section, [column for column in columns if column.rank <= MAIN_RANK], best),
        "more": _table(section, [*names, *others], best) if others else None,
        "more_titles": ", ".join(column.title for column in others),
        "cost_figure": None if figures.cost is None else _png_uri(figures.cost),
        "sweep_figure": None if figures.sweep is None else _png_uri(figures.sweep),
    }


def _table(section: Section, columns: Sequence[Column], best: Mapping[str, float]) -> dict[str, Any]:
    rows = [[_cell(record(row), column, best) for column in columns] for row in section.rows]
    return {"columns": _titles(columns), "rows": rows}


def _quoted(sections: Sequence[Section]) -> dict[str, Any]:
    """Published results, once for all sections that they can be compared with."""
    published = sections[0].published
    columns = quoted_columns(published)
    rows = [[_cell(quoted_record(result), column, {}) for column in columns] for result in by_score(published)]
    return {
        "beside": ", ".join(section.name for section in sections),
        "sentence": published_sentence(sections),
        "table": {"columns": _titles(columns), "rows": rows},
    }


def _titles(columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [{"title": column.title, "is_text": column.shown is str} for column in columns]


def _cell(values: Record, column: Column, best: Mapping[str, float]) -> dict[str, str]:
    styles = ["text"] if column.shown is str else []
    styles += ["long"] if len(str(values.get(column.key, ""))) > _LONG else []
    styles += ["missing"] if column.key not in values else []
    styles += ["best"] if column.key in best and values.get(column.key) == best[column.key] else []
    return {"text": cell(values, column), "title": column.title, "style": " ".join(styles)}


def _grid(row: Row, image: Image.Image) -> dict[str, str]:
    details = [f"{row.num_steps} steps"] if row.num_steps else []
    details += [f"guidance {row.guidance_scale:g}"] if row.guidance_scale is not None else []
    for key, name in (("fid", "FID"), ("frechet_distance", "Fréchet distance")):
        details += [f"{name} {row.metrics[key]:.4g}"] if key in row.metrics else []
    return {"title": row.label, "detail": ", ".join(details), "image": _grid_uri(image)}


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


def _run(row: Row) -> dict[str, Any]:
    ids = [*row.run_ids[:_RUNS_SHOWN]]
    more = len(row.run_ids) - len(ids)
    return {"label": row.label, "samples": row.samples or MISSING, "ids": [*ids, f"and {more} more"] if more else ids}


def _grid_uri(image: Image.Image) -> str:
    """Large grids become JPEG: as PNG, grids of photographs take many megabytes."""
    if image.width > _GRID_WIDTH:
        image = image.resize((_GRID_WIDTH, max(1, round(image.height * _GRID_WIDTH / image.width))), Image.Resampling.LANCZOS)
    content = png_bytes(image)
    if len(content) <= _LARGEST_PNG:
        return _data_uri(content, "png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return _data_uri(buffer.getvalue(), "jpeg")


def _png_uri(image: Image.Image) -> str:
    return _data_uri(png_bytes(image), "png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
