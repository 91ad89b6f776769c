"""Stage token_map: every image of a dataset as codes, in Parquet.

The driver plans one row per output file; Ray Data carries each row through decoding (tasks) and encoding (actors), and the
actor writes the file. So a file's bytes do not depend on how many workers there are, and a file that was committed before a
crash is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray.data
import torch

from enat.checkpoint import load_vqgan
from enat.images import ImageError, center_crop, decode_image, to_array, to_float
from pipelines import cluster, token_map
from pipelines.artifacts import FileRecord, Manifest
from pipelines.sources import DatasetConfig, Source, open_source
from pipelines.stream import actor_pool, feeding_tasks, stream_records
from pipelines.token_map import TokenMapInfo
from pipelines.workflow import Execution, Stage, StageContext, StageResult, WorkerContext


@dataclass(frozen=True, kw_only=True)
class TokenMapConfig:
    """shard_size: images per Parquet file, which is also what a crash can lose.

    max_quarantine_share: of images that cannot be read, in [0, 1]; more fails the stage.
    """

    shard_size: int = 2048
    max_quarantine_share: float = 0.01
    dataset: DatasetConfig | None = None
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"token_map.shard_size is {self.shard_size}; it must be at least 1")
        if not 0 <= self.max_quarantine_share <= 1:
            raise ValueError(f"token_map.max_quarantine_share is {self.max_quarantine_share}; it must be in [0, 1]")


def run(config: TokenMapConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    assert config.dataset is not None
    source = open_source(config.dataset)
    tokenizer = inputs["tokenizer"]
    info = TokenMapInfo(
        dataset=config.dataset.title,
        resolution=tokenizer.summary["config"]["resolution"],
        grid_size=_grid_size(tokenizer),
        codebook_size=tokenizer.summary["config"]["codebook_size"],
        num_classes=len(source.class_names),
        tokenizer_digest=tokenizer.digest,
    )
    plan = [
        {"part": part, "start": start, "stop": min(start + config.shard_size, len(source))}
        for part, start in enumerate(range(0, len(source), config.shard_size))
    ]
    done = context.store.read_parts(context.stage, context.key)
    todo = [row for row in plan if _part_name(row["part"]) not in done]
    if todo:
        context.connect()
        cluster.require(config.execution, "token_map")
        with context.bar(len(source), "images") as bar:
            bar.update(sum(record["rows"] + len(record["quarantined"]) for record in done.values()))
            for record in stream_records(todo, lambda rows: _job(rows, config, info, tokenizer, context)):
                bar.advance(record["rows"] + len(record["quarantined"]))
    return _collect(config, context, source, info)


def _grid_size(tokenizer: Manifest) -> int:
    config = tokenizer.summary["config"]
    return int(config["resolution"]) // 2 ** (len(config["channel_multipliers"]) - 1)


def _job(
    rows: list[dict[str, int]], config: TokenMapConfig, info: TokenMapInfo, tokenizer: Manifest, context: StageContext
) -> ray.data.Dataset:
    arguments = (context.for_workers(), info, tokenizer, config.execution)
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(_Decode(config.dataset, info.resolution), **feeding_tasks(config.execution))
        .map_batches(_Encode, fn_constructor_args=arguments, **actor_pool(config.execution, len(rows)))
    )


class _Decode:
    """Plan row -> the same row with pixels uint8 (R, 3, H, W), and what could not be read."""

    def __init__(self, dataset: DatasetConfig | None, resolution: int) -> None:
        self.dataset, self.resolution = dataset, resolution

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        assert self.dataset is not None
        keys, pixels, labels, digests, quarantined = [], [], [], [], []
        for row in open_source(self.dataset).read(int(batch["start"][0]), int(batch["stop"][0])):
            try:
                pixels.append(to_array(center_crop(decode_image(row.data), self.resolution)))
            except ImageError as error:
                quarantined.append([row.key, str(error)])
                continue
            keys.append(row.key)
            labels.append(row.label)
            digests.append(hashlib.sha256(row.data).digest())
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, self.resolution, self.resolution), np.uint8)
        decoded = {"keys": keys, "pixels": stacked, "labels": labels, "digests": digests, "quarantined": quarantined}
        return {"part": [int(batch["part"][0])], "decoded": [decoded]}


class _Encode:
    """Row with pixels -> a Parquet file in the store, and a record of it. One actor holds one tokenizer."""

    def __init__(self, context: WorkerContext, info: TokenMapInfo, tokenizer: Manifest, execution: Execution) -> None:
        torch.set_num_threads(execution.num_threads)
        self.context, self.info, self.execution = context, info, execution
        self.vqgan = load_vqgan(context.store.fetch(tokenizer, "vqgan.safetensors")).to(execution.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        name, decoded = _part_name(int(batch["part"][0])), batch["decoded"][0]
        codes, flipped = self._encode(decoded["pixels"]), self._encode(decoded["pixels"][..., ::-1].copy())
        columns = {"keys": decoded["keys"], "labels": decoded["labels"], "source_sha256": decoded["digests"]}
        file = self.context.write(
            name, lambda path: token_map.write_part(path, self.info, codes=codes, codes_flipped=flipped, **columns)
        )
        record = {
            "part": int(batch["part"][0]),
            "rows": len(codes),
            "file": asdict(file),
            "quarantined": decoded["quarantined"],
            "code_counts": np.bincount(np.concatenate([codes, flipped]).ravel(), minlength=self.info.codebook_size).tolist(),
            "seconds": time.monotonic() - started,
        }
        self.context.store.put_part(self.context.stage, self.context.key, name, record)
        return {"record": [record]}

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        encoded = [
            self.vqgan.encode(to_float(part.to(self.execution.device))).flatten(1).cpu()
            for part in torch.from_numpy(pixels).split(self.execution.batch_size)
        ]
        return torch.cat(encoded).numpy() if encoded else np.empty((0, self.info.grid_size**2), np.int64)


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _collect(config: TokenMapConfig, context: StageContext, source: Source, info: TokenMapInfo) -> StageResult:
    num_images = len(source)
    records = context.store.read_parts(context.stage, context.key)
    assert len(records) == -(-num_images // config.shard_size), "a planned part has no record"
    rows = sum(record["rows"] for record in records.values())
    quarantined = [(key, reason) for record in records.values() for key, reason in record["quarantined"]]
    assert rows + len(quarantined) == num_images, "rows + quarantined = inputs"
    if len(quarantined) > config.max_quarantine_share * num_images:
        key, reason = quarantined[0]
        raise ValueError(
            f"{len(quarantined)} of {num_images} images cannot be read, more than token_map.max_quarantine_share "
            f"{config.max_quarantine_share:g} allows; the first is {key}: {reason}"
        )
    quarantine = context.write(token_map.QUARANTINE, lambda path: token_map.write_quarantine(path, quarantined))
    counts = np.array([record["code_counts"] for record in records.values()], dtype=np.float64).sum(axis=0)
    probs = counts[counts > 0] / counts.sum()
    seconds = sum(record["seconds"] for record in records.values())
    return StageResult(
        files=[*(FileRecord(**record["file"]) for record in records.values()), quarantine],
        summary={
            "info": dataclasses.asdict(info),
            "rows": rows,
            "quarantined": len(quarantined),
            "class_names": list(source.class_names),
        },
        metrics={
            "rows": rows,
            "quarantined": len(quarantined),
            "code_usage": float((counts > 0).mean()),
            "code_perplexity": float(np.exp(-(probs * np.log(probs)).sum())),
        },
        worker_seconds=seconds,
        device_seconds=seconds if config.execution.gpus_per_worker else 0.0,
    )


STAGE = Stage("token_map", 1, run)
