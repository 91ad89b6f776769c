"""Stage audit: images that a token map holds twice, and how far its images are from each other.

Rows are compared by their codes, also with mirrored images. Rows that are equal are found among all. Near-duplicates are looked for
around rows that are drawn evenly, each against all others, exactly. How far real images are from each other also tells how near to
them a sample may come (stage memorization).

Shape legend: R rows of the map, A audited rows, L codes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from enat.config import check_in
from enat.images import png_bytes
from enat.metrics.hamming import NearestRows, first_equal_rows
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.resources import Execution
from pipelines.data.token_map import TokenMap, read_columns
from pipelines.evaluation import nearest
from pipelines.evaluation.features import drawn_evenly
from pipelines.evaluation.nearest import AuditSummary
from pipelines.evaluation.scores import TaskPool
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult
from pipelines.workflow.work import Done, Foreseen

EQUAL, NEAREST = "equal.parquet", "nearest.parquet"
_QUANTILE = 0.01
_BYTES_OF_ROW = 40


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Duplicates in the token map."""

    num_rows: int = 10_000
    """Rows whose nearest other row is looked for, drawn evenly, at least 2. Unit: images."""
    near: float = 0.5
    """Share of the codes in which near-duplicates differ at most, in [0, 1]."""
    seed: int | None = None
    """Seed of the draw. Null takes the run's seed."""
    execution: Execution = field(default_factory=Execution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[2, inf)", "num_rows")
        check_in(self, "[0, 1]", "near")


def run(config: AuditConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads a token map and its tokenizer.

    Writes the rows that equal an earlier one (in codes or in bytes), the nearest other row of each audited one, and a picture of
    the closest pairs. Measures how many there are. Raises ValueError for a token map of fewer than two rows.
    """
    token_map = inputs["token_map"]
    tokens = TokenMap.open_shared(context.store, token_map)
    if len(tokens) < 2:
        raise ValueError(f"the token map has {len(tokens)} rows; duplicates need at least 2")
    assert config.seed is not None
    audited = drawn_evenly(len(tokens), config.num_rows, config.seed)
    context.connect_for(config.execution, "audit")
    pool = TaskPool(config.execution, lambda total: context.bar(total, "parts of the map"))
    queries = tokens.codes[audited, 0]
    found = nearest.nearest_in_map(queries, token_map, context.store, pool, own=audited)
    rows = read_columns(context.store, token_map, ("key", "label", "source_sha256"))
    equal = _equal_rows(tokens, rows)
    picture = nearest.picture_of_pairs(queries, found, tokens.codes, inputs["tokenizer"], context.store)
    length = tokens.codes.shape[2]
    is_other_label = equal["label"].to_numpy() != equal["first_label"].to_numpy()
    return StageResult(
        files=[
            context.write(EQUAL, lambda path: pq.write_table(equal, path, compression="zstd")),
            context.write(NEAREST, lambda path: pq.write_table(_table(audited, found, rows), path, compression="zstd")),
        ],
        records=[context.write(nearest.PICTURE, lambda path: path.write_bytes(png_bytes(picture)))],
        summary=AuditSummary(
            rows=len(tokens),
            num_audited=len(audited),
            close_distance=int(np.quantile(found.distances, _QUANTILE, method="lower")),
        ),
        metrics={
            "equal_rows": float(len(equal)),
            "equal_files": float(equal["is_equal_file"].to_numpy().sum()),
            "equal_rows_with_other_label": float(is_other_label.sum()),
            "near_duplicates": float((found.distances <= config.near * length).mean()),
            "nearest_distance": float(found.distances.mean()) / length,
        },
        worker_seconds=pool.seconds,
        device_seconds=config.execution.device_seconds(pool.seconds),
        work=[Done(work := nearest.nearest_work(len(audited), len(tokens), config.execution), pool.seconds, work.num_workers)],
    )


def foresee(config: AuditConfig, inputs: Mapping[str, Any]) -> Foreseen:
    rows = inputs["token_map"].rows
    num_audited = min(config.num_rows, rows)
    return Foreseen(
        summary=AuditSummary(rows=rows, num_audited=num_audited, close_distance=0),
        work=[nearest.nearest_work(num_audited, rows, config.execution)],
        size=_BYTES_OF_ROW * num_audited,
    )


def _equal_rows(tokens: TokenMap, rows: pa.Table) -> pa.Table:
    """Rows whose codes equal those of an earlier row, with that row. rows: key, label and source_sha256."""
    first = first_equal_rows(tokens.codes)
    later = np.flatnonzero(first != np.arange(len(first)))
    digests = [rows["source_sha256"].take(each).to_pylist() for each in (later, first[later])]
    return pa.table(
        {
            "row": later,
            **{name: rows[name].take(later) for name in ("key", "label")},
            "first_row": first[later],
            **{f"first_{name}": rows[name].take(first[later]) for name in ("key", "label")},
            "is_equal_file": [own == other for own, other in zip(*digests, strict=True)],
        },
        schema=pa.schema(
            [
                *((f"{of}{name}", kind) for of in ("", "first_") for name, kind in _ROW.items()),
                ("is_equal_file", pa.bool_()),
            ]
        ),
    )


_ROW = {"row": pa.int64(), "key": pa.string(), "label": pa.int32()}


def _table(audited: np.ndarray, found: NearestRows, rows: pa.Table) -> pa.Table:
    return pa.table(
        {
            "row": audited,
            **{name: rows[name].take(audited) for name in ("key", "label")},
            "distance": found.distances,
            "nearest_row": found.rows,
            **{f"nearest_{name}": rows[name].take(found.rows) for name in ("key", "label")},
            "is_flipped": found.flipped,
        }
    )


def _describe(manifest: Manifest) -> str:
    found, summary = manifest.metrics, AuditSummary.read(manifest)
    return (
        f"{found['equal_rows']:,.0f} of {summary.rows:,} images equal to another, {100 * found['near_duplicates']:.2g}% of "
        f"{summary.num_audited:,} near one"
    )


STAGE = Stage(
    "audit",
    1,
    run,
    reads={"token_map": Input(("token_map",)), "tokenizer": Input(("tokenizer",))},
    config=AuditConfig,
    summary=AuditSummary,
    foresee=foresee,
    kind="evaluation",
    files=(EQUAL, NEAREST, nearest.PICTURE),
    describe=_describe,
    publish=nearest.publish,
)
