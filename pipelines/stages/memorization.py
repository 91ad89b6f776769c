"""Stage memorization: how near samples come to the images that the model was trained on.

For each sample, the nearest image of the token map by the codes in which both differ, also mirrored, exactly. A sample is close if
it is nearer than 99 of 100 real images are to any other real image (stage audit).

Shape legend: N samples, L codes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from enat.config import check_in
from enat.images import png_bytes
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.resources import Execution
from pipelines.data.samples import SamplesSummary, read_samples
from pipelines.data.token_map import TokenMap, read_columns
from pipelines.evaluation import nearest
from pipelines.evaluation.nearest import AuditSummary, MemorizationSummary
from pipelines.evaluation.scores import TaskPool
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult
from pipelines.workflow.work import Done, Foreseen

NEAREST = "nearest.parquet"
_BYTES_OF_ROW = 40


@dataclass(frozen=True, kw_only=True)
class MemorizationConfig:
    """Samples that are copies of images of the token map."""

    num_samples: int = 10_000
    """Samples to compare, the first ones. If there are fewer, all are. At least 2. Unit: images."""
    execution: Execution = field(default_factory=Execution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[2, inf)", "num_samples")


def run(config: MemorizationConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads samples, the token map that their model was trained on, its tokenizer and its audit.

    Writes the nearest row of each sample, and a picture of the closest pairs. Measures how near and how many they are.
    """
    from enat.metrics.errors import standard_error

    store, token_map = context.store, inputs["token_map"]
    made = SamplesSummary.read(inputs["samples"])
    samples = read_samples(store, inputs["samples"], 0, min(config.num_samples, made.num_samples))
    tokens = TokenMap.open_shared(store, token_map)
    context.connect_for(config.execution, "memorization")
    pool = TaskPool(config.execution, lambda total: context.bar(total, "parts of the map"))
    found = nearest.nearest_in_map(samples.codes, token_map, store, pool)
    length, distance = tokens.codes.shape[2], AuditSummary.read(inputs["audit"]).close_distance
    rows = read_columns(store, token_map, ("key", "label")).take(found.rows)
    table = pa.table(
        {
            "index": samples.index,
            "label": samples.labels,
            "distance": found.distances,
            "nearest_row": found.rows,
            "nearest_key": rows["key"],
            "nearest_label": rows["label"],
            "is_flipped": found.flipped,
        }
    )
    picture = nearest.picture_of_pairs(samples.codes, found, tokens.codes, inputs["tokenizer"], store)
    labels = None if made.labels == "captions" else samples.labels
    metrics: dict[str, float] = {}
    for name, values in {
        "nearest_distance": found.distances / length,
        "copies": (found.distances == 0).astype(float),
        "close_copies": (found.distances < distance).astype(float),
    }.items():
        metrics |= {name: float(values.mean()), f"{name}_se": standard_error(values, labels)}
    return StageResult(
        files=[context.write(NEAREST, lambda path: pq.write_table(table, path, compression="zstd"))],
        records=[context.write(nearest.PICTURE, lambda path: path.write_bytes(png_bytes(picture)))],
        summary=MemorizationSummary(num_samples=len(samples.index), rows=len(tokens), close_distance=distance),
        metrics=metrics,
        worker_seconds=pool.seconds,
        device_seconds=config.execution.device_seconds(pool.seconds),
        work=[Done(work := nearest.nearest_work(len(found.rows), len(tokens), config.execution), pool.seconds, work.num_workers)],
    )


def foresee(config: MemorizationConfig, inputs: Mapping[str, Any]) -> Foreseen:
    num_samples, rows = min(config.num_samples, inputs["samples"].num_samples), inputs["token_map"].rows
    return Foreseen(
        summary=MemorizationSummary(num_samples=num_samples, rows=rows, close_distance=0),
        work=[nearest.nearest_work(num_samples, rows, config.execution)],
        size=_BYTES_OF_ROW * num_samples,
    )


def _describe(manifest: Manifest) -> str:
    summary, found = MemorizationSummary.read(manifest), manifest.metrics
    return (
        f"{100 * found['copies']:.2g}% of {summary.num_samples:,} samples are copies, {100 * found['nearest_distance']:.3g}% of "
        "the codes differ from the nearest image's"
    )


STAGE = Stage(
    "memorization",
    1,
    run,
    reads={
        "samples": Input(("generate",)),
        "token_map": Input(("token_map",)),
        "tokenizer": Input(("tokenizer",)),
        "audit": Input(("audit",)),
    },
    config=MemorizationConfig,
    does_without_ray=True,
    summary=MemorizationSummary,
    foresee=foresee,
    kind="evaluation",
    files=(NEAREST, nearest.PICTURE),
    describe=_describe,
    publish=nearest.publish,
)
