"""The work of `enat compare`: read evaluations from MLflow, draw them, and write and log the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from enat.images import ImageError, decode_image
from pipelines.comparison import page as comparison_page
from pipelines.comparison import table as comparison_table
from pipelines.comparison.charts import cost_chart, sweep_charts, training_charts
from pipelines.comparison.page import Grids
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Row
from pipelines.pages.chart import png_of
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from pipelines.tracking.run import TrackingConfig

SAMPLES = "samples.png"
RUNS_TAG = "enat.compared_runs"
_log = logging.getLogger(__name__)
_MAX_GRIDS = 24
_MAX_GRID_BYTES = 64 << 20
_MAX_GRID_PIXELS = 40_000_000
_TAG_LIMIT = 5000


@dataclass(frozen=True)
class Files:
    """The files of a comparison. figures: all figures in one PNG, or None if there is nothing to draw."""

    page: str
    figures: bytes | None
    table: str


def make_files(comparison: Comparison, title: str, grids: Grids) -> Files:
    charts = [
        chart for section in comparison.sections for chart in (cost_chart(section), *sweep_charts(section)) if chart is not None
    ]
    charts += training_charts(comparison.curves)
    return Files(
        page=comparison_page.render(comparison, grids, title=title, created=datetime.now(UTC)),
        figures=png_of(charts) if charts else None,
        table=comparison_table.to_csv(comparison),
    )


def read_grids(comparison: Comparison) -> Grids:
    """Read the grid of samples of every row, once per set of samples and for at most _MAX_GRIDS sets.

    A file that is not an image, or is far too large, is left out with a warning: anyone may write to MLflow.
    """
    rows: dict[str, Row] = {}
    for row in comparison.rows:
        rows.setdefault(row.samples or row.run_ids[0], row)
    shown: list[tuple[Row, Image.Image]] = []
    for number, row in enumerate(rows.values()):
        if len(shown) == _MAX_GRIDS:
            return Grids(tuple(shown), len(rows) - number)
        image = _read_grid(comparison.uri, row)
        shown += [(row, image)] if image is not None else []
    return Grids(tuple(shown))


def _read_grid(uri: str, row: Row) -> Image.Image | None:
    for run_id in row.run_ids[:2]:  # an older run with the same samples may still have its files
        try:
            content = search.read_file(uri, run_id, SAMPLES, _MAX_GRID_BYTES)
            if content is not None:
                return decode_image(content, _MAX_GRID_PIXELS)
        except (ImageError, ValueError, search.TrackingError) as error:
            _log.warning("%s of run %s is left out: %s", SAMPLES, run_id, error)
    return None


def write(path: Path, content: bytes | str) -> None:
    """Write a file. Raises ValueError, naming the file, if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another path") from error


def log(comparison: Comparison, files: Files, title: str) -> str | None:
    """Log page, figures, table and the ids of the compared runs to a run in the experiment of the newest evaluation.

    Returns the id of the run, or None, with a warning, if MLflow cannot be reached.
    """
    config = TrackingConfig(experiment=comparison.experiment)
    ids = [id for row in comparison.rows for id in row.run_ids[:1]]
    tags = {
        "enat.stage": "compare",
        RUNS_TAG: _joined(ids),
        "enat.num_compared": str(len(ids)),
        "enat.protocols": _joined(dict.fromkeys(section.protocol_digest or "unknown" for section in comparison.sections)),
    }
    run = tracking.start_run(comparison.uri, config, title, tags)
    run.log_bytes(files.page.encode(), "compare.html")
    run.log_bytes(files.table.encode(), "compare.csv")
    run.log_bytes(json.dumps(comparison_table.to_json(comparison), indent=1).encode(), "compare.json")
    if files.figures is not None:
        run.log_bytes(files.figures, "compare.png")
    run.finish()
    return run.run_id


def _joined(names: Sequence[str] | dict[str, None]) -> str:
    """Names joined by commas, as many as fit into a tag. compare.json contains all of them."""
    text = ",".join(names)
    return text if len(text) <= _TAG_LIMIT else text[:_TAG_LIMIT].rpartition(",")[0]
