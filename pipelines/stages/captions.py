"""Stage captions: a text encoder's features of every caption of a dataset, and of the empty caption."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from enat.config import check_in
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.cluster.data_stream import map_by_workers, stream_records
from pipelines.cluster.resources import Execution
from pipelines.data.captions import EMPTY, CaptionFeaturesInfo, CaptionsSummary, captions_name, write_captions, write_empty
from pipelines.data.dataset import INDEX, Dataset
from pipelines.data.sources.config import DatasetConfig
from pipelines.storage.external import folder_digest, local_folder
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import set_by
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    import ray.data

_CLIP_POSITIONS, _CLIP_WIDTH, _CLIP_LAYERS = 77, 768, 12  # of the text model of ViT-L/14


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Features of every caption of a dataset, from a CLIP text model."""

    encoder: str | None = None
    """CLIP text model: a folder that all workers see, s3:// or hf://owner/name. Null makes no features."""
    shard_size: int = 1024
    """Captions per file, at least 1. 1,024 captions of ViT-L/14 take 121 MB. Unit: captions."""
    dataset: DatasetConfig | None = set_by("dataset")
    """Dataset with the captions."""
    s3: S3Config | None = set_by("s3 or buckets")
    """Access to the bucket of `encoder`."""
    execution: Execution = field(default_factory=Execution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "shard_size")

    def identity(self) -> dict[str, Any]:
        assert self.encoder is not None
        return {"encoder": folder_digest(self.folder()), "shard_size": self.shard_size}

    def folder(self) -> Path:
        assert self.encoder is not None
        return local_folder(self.encoder, "captions.encoder", self.s3)


def run(config: CaptionsConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the index of a dataset with captions, and the text encoder that the config names.

    Writes files of caption features (see pipelines.data.captions), one part each, and the features of the empty caption. Measures
    the number of captions and their mean number of tokens. Raises ValueError if the dataset has no captions.
    """
    import ray.data

    from enat.text import load_text_encoder

    assert config.dataset is not None
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    if not dataset.num_captions:
        raise ValueError(f"dataset {dataset.name} has no captions; leave captions.encoder out, or use kind coco")
    encoder = load_text_encoder(config.folder())
    info = CaptionFeaturesInfo(
        num_captions=dataset.num_captions,
        captions_per_file=config.shard_size,
        num_positions=encoder.num_positions,
        width=encoder.width,
        encoder_digest=folder_digest(config.folder()),
    )
    empty = context.write(EMPTY, lambda path: write_empty(path, info, encoder.encode([""])))
    done = context.store.resume_parts(context.stage, context.key)
    todo = [row for row in _plan(dataset, info) if captions_name(row["part"]) not in done]
    if todo:
        context.connect_for(config.execution, "captions")

        def job(rows: list[dict[str, int]]) -> ray.data.Dataset:
            arguments = (config, dataset, info, context.for_workers())
            planned = ray.data.from_items(rows, override_num_blocks=len(rows))
            return map_by_workers(planned, _Encode, arguments, config.execution, len(rows), is_alone=context.is_alone)

        with context.bar(info.num_captions, "captions") as bar:
            bar.update(sum(record["captions"] for record in done.values()))
            for record in stream_records(todo, job):
                bar.advance(record["captions"])
    records = context.store.read_parts(context.stage, context.key)
    assert len(records) == info.num_files, "a planned file has no record"
    seconds = sum(record["seconds"] for record in records.values())
    return StageResult(
        files=[*(FileRecord(**record["file"]) for record in records.values()), empty],
        summary=CaptionsSummary(info=info, dataset_digest=inputs["dataset"].digest),
        metrics={"captions": info.num_captions, "mean_tokens": sum(r["tokens"] for r in records.values()) / info.num_captions},
        worker_seconds=seconds,
        device_seconds=config.execution.device_seconds(seconds),
        work=[Done(work := _encoding(config, info), seconds, work.num_workers)],
    )


def foresee(config: CaptionsConfig, inputs: Mapping[str, Any]) -> Foreseen:
    """For CLIP's ViT-L/14: its weights need not be here."""
    info = CaptionFeaturesInfo(
        num_captions=inputs["dataset"].num_captions,
        captions_per_file=config.shard_size,
        num_positions=_CLIP_POSITIONS,
        width=_CLIP_WIDTH,
        encoder_digest="",
    )
    return Foreseen(
        summary=CaptionsSummary(info=info, dataset_digest=""),
        work=[_encoding(config, info)],
        size=2 * info.num_captions * info.num_positions * info.width,
        num_parts=info.num_files,
    )


def _encoding(config: CaptionsConfig, info: CaptionFeaturesInfo) -> Work:
    per_token = 12 * _CLIP_LAYERS * info.width**2
    return Work(
        name="encoding",
        count=info.num_captions,
        macs=per_token * info.num_positions,
        workers=config.execution,
        num_pieces=info.num_files,
    )


def _plan(dataset: Dataset, info: CaptionFeaturesInfo) -> list[dict[str, int]]:
    """One row per file, with its first caption and the rows of the index that contain its captions."""
    firsts = pq.read_table(dataset.store.fetch(dataset.manifest, INDEX), columns=["first_caption"])["first_caption"].to_numpy()
    rows = []
    for part in range(info.num_files):
        start = part * info.captions_per_file
        stop = start + info.captions_from(start)
        # Rows without captions have the number of the next row; starting with them is harmless.
        first_row = int(np.searchsorted(firsts, start, side="right")) - 1
        rows.append({"part": part, "start": start, "first_row": first_row, "last_row": int(np.searchsorted(firsts, stop))})
    return rows


class _Encode:
    """File -> the features of its captions in the store. One actor holds one text encoder."""

    def __init__(self, config: CaptionsConfig, dataset: Dataset, info: CaptionFeaturesInfo, context: WorkerContext) -> None:
        import torch

        from enat.text import load_text_encoder

        torch.set_num_threads(config.execution.num_threads)
        self.dataset, self.info, self.context = dataset, info, context
        self.encoder = load_text_encoder(config.folder()).to(config.execution.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        row = {name: int(values[0]) for name, values in batch.items()}
        table = self.dataset.index(row["first_row"], row["last_row"])
        captions = [caption for captions in table["captions"].to_pylist() for caption in captions]
        skipped = row["start"] - table["first_caption"][0].as_py()
        count = self.info.captions_from(row["start"])
        features = self.encoder.encode(captions[skipped : skipped + count])
        name = captions_name(row["part"])
        file = self.context.write(name, lambda path: write_captions(path, self.info, row["start"], features))
        record = {
            "part": row["part"],
            "captions": count,
            "tokens": int(features.num_tokens.sum()),
            "file": asdict(file),
            "seconds": time.monotonic() - started,
        }
        self.context.store.put_part(self.context.stage, self.context.key, name, record)
        return {"record": [record]}


def _describe(manifest: Manifest) -> str:
    info = CaptionsSummary.read(manifest).info
    return f"{info.num_captions:,} captions, {info.num_positions} x {info.width} features"


STAGE = Stage(
    "captions",
    1,
    run,
    reads={"dataset": Input(("dataset",))},
    config=CaptionsConfig,
    summary=CaptionsSummary,
    foresee=foresee,
    kind="tokenizing",
    files=("captions-*.safetensors", EMPTY),
    external=("encoder",),
    workers=lambda config: config.execution if config.encoder is not None else None,
    describe=_describe,
    reevaluation="conditions",
)
