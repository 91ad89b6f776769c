"""The nearest rows of a token map to given codes, by Ray tasks over parts of the map, and pictures of the nearest pairs.

Shape legend: N queries, R rows, L codes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from enat.metrics.hamming import NearestRows, nearest_of, nearest_rows
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import tasks
from pipelines.cluster.resources import Execution
from pipelines.data.token_map import TokenMap
from pipelines.evaluation.scores import TaskPool
from pipelines.workflow.costs import cost_metrics
from pipelines.workflow.stage import PublishContext
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Work

if TYPE_CHECKING:
    from PIL import Image


PICTURE = "pairs.png"
_PARTS_PER_WORKER = 4
_FEWEST_ROWS = 1 << 15  # of a task
_SHOWN = 24  # pairs
_COLUMNS = 6  # pairs in a row
_PAIR_SECONDS = 5e-9  # of 256 codes on one CPU


@dataclass(frozen=True, kw_only=True)
class AuditSummary(Summary):
    """What stage audit tells stage memorization and the report.

    rows: R.   num_audited: rows whose nearest other row was looked for.   close_distance: number of codes; one of 100 of these rows
    differs in fewer from another one.
    """

    rows: int
    num_audited: int
    close_distance: int


@dataclass(frozen=True, kw_only=True)
class MemorizationSummary(Summary):
    """What stage memorization tells the report.

    num_samples: that were compared.   rows: R.   close_distance: close samples differ in fewer codes.
    """

    num_samples: int
    rows: int
    close_distance: int


def nearest_in_map(
    queries: np.ndarray, token_map: Manifest, store: ArtifactStore, pool: TaskPool, own: np.ndarray | None = None
) -> NearestRows:
    """The nearest row of a token map to each query, on either side. Equal for any number of workers.

    queries: integers (N, L).   own: int64 (N,), the row that a query is itself, and which does not count.
    """
    num_rows = len(TokenMap.open_shared(store, token_map))
    size = _rows_of_part(num_rows, pool.execution)
    parts = [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
    given = tasks.put(queries.astype(np.uint16)), own if own is None else tasks.put(own)
    with pool.bar(len(parts)) as bar:
        return nearest_of(pool.run(_nearest, [(store, token_map, *given, part) for part in parts], bar))


def nearest_work(num_queries: int, num_rows: int, execution: Execution) -> Work:
    """The work of nearest_in_map, in pairs of codes. Both sides of a row are compared."""
    pieces = -(-num_rows // _rows_of_part(num_rows, execution))
    return Work(
        name="nearest",
        count=2.0 * num_queries * num_rows,
        cpu_seconds=_PAIR_SECONDS,
        workers=execution,
        num_pieces=pieces,
        on_cpus=not execution.gpus_per_worker,
    )


def _rows_of_part(num_rows: int, execution: Execution) -> int:
    return max(_FEWEST_ROWS, -(-num_rows // (_PARTS_PER_WORKER * execution.count)))


def _nearest(
    store: ArtifactStore, token_map: Manifest, queries: np.ndarray, own: np.ndarray | None, rows: range, *, device: str
) -> NearestRows:
    codes = TokenMap.open_shared(store, token_map).codes[rows.start : rows.stop]
    return nearest_rows(queries, codes, own, first_row=rows.start)


def picture_of_pairs(
    queries: np.ndarray, found: NearestRows, codes: np.ndarray, tokenizer: Manifest, store: ArtifactStore
) -> Image.Image:
    """The closest pairs, decoded, the query to the left. codes: integers (R, 2, L), of the token map."""
    import torch

    from enat.checkpoint import load_vqgan
    from enat.images import make_grid
    from pipelines.sampling.pictures import decode_codes, scale_for

    closest = np.argsort(found.distances, kind="stable")[:_SHOWN]
    rows = codes[found.rows[closest], found.flipped[closest].astype(np.intp)]
    pairs = np.stack([queries[closest], rows], axis=1).reshape(-1, queries.shape[1]).astype(np.int64)
    vqgan = load_vqgan(store.fetch(tokenizer, "vqgan.safetensors"))
    return make_grid(decode_codes(vqgan, torch.from_numpy(pairs)), columns=2 * _COLUMNS, scale=scale_for(vqgan.config.resolution))


def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Log the picture, and the cost of the artifact and all its inputs: no evaluation reads it, so no other total includes it."""
    if context.is_recorded:
        return
    context.run.log_bytes(context.store.fetch(manifest, PICTURE).read_bytes(), PICTURE)
    context.run.log_metrics(cost_metrics(context.store, manifest, context.stages, context.prices))
    if context.prices is not None:
        context.run.set_tags({"enat.currency": context.prices.currency})
