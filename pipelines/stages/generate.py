"""Stage generate: codes for num_samples samples, classes in turn, one seed each.

One Parquet file per shard_size samples; actors take files, so the codes of a sample depend on its seed and label alone, and a
file that was committed before a crash is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray.data
import torch

from enat.checkpoint import load_enat
from enat.sampler import SamplerConfig, sample
from pipelines import cluster
from pipelines.artifacts import FileRecord, Manifest
from pipelines.samples import sample_label, sample_seed, write_samples
from pipelines.stream import actor_pool, stream_records
from pipelines.workflow import Execution, Stage, StageContext, StageResult, WorkerContext


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """shard_size: samples per Parquet file, which is also what a crash can lose."""

    num_samples: int = 50_000
    shard_size: int = 1000
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int | None = None
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.shard_size < 1:
            raise ValueError("generate.num_samples must be at least 2 and shard_size at least 1")


def run(config: GenerateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    model = inputs["model"]
    num_parts = -(-config.num_samples // config.shard_size)
    names = [_part_name(part) for part in range(num_parts)]
    done = context.store.read_parts(context.stage, context.key)
    todo = [{"part": part} for part, name in enumerate(names) if name not in done]
    if todo:
        context.connect()
        cluster.require(config.execution, "generate")

        def job(rows: list[dict[str, int]]) -> ray.data.Dataset:
            arguments = (config, model, context.for_workers())
            pool = actor_pool(config.execution, len(rows))
            return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Sample, fn_constructor_args=arguments, **pool
            )

        with context.bar(config.num_samples, "samples") as bar:
            bar.update(sum(record["rows"] for record in done.values()))
            for record in stream_records(todo, job):
                bar.advance(record["rows"])
    records = context.store.read_parts(context.stage, context.key)
    assert list(records) == names and sum(record["rows"] for record in records.values()) == config.num_samples
    seconds = sum(record["seconds"] for record in records.values())
    return StageResult(
        files=[FileRecord(**record["file"]) for record in records.values()],
        summary={
            "num_samples": config.num_samples,
            "shard_size": config.shard_size,
            "num_classes": model.summary["model"]["num_classes"],
            "sampler": asdict(config.sampler),
        },
        metrics={"samples": config.num_samples, "samples_per_worker_second": config.num_samples / seconds},
        worker_seconds=seconds,
        device_seconds=seconds if config.execution.gpus_per_worker else 0.0,
    )


class _Sample:
    """Part number -> a Parquet file in the store, and a record of it. One actor holds one model."""

    def __init__(self, config: GenerateConfig, model: Manifest, context: WorkerContext) -> None:
        torch.set_num_threads(config.execution.num_threads)
        self.config, self.context = config, context
        self.model = load_enat(context.store.fetch(model, "model.safetensors")).to(config.execution.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        part, config = int(batch["part"][0]), self.config
        assert config.seed is not None
        index = np.arange(part * config.shard_size, min((part + 1) * config.shard_size, config.num_samples))
        labels = np.array([sample_label(i, self.model.config.num_classes) for i in index.tolist()])
        seeds = np.array([sample_seed(config.seed, i) for i in index.tolist()])
        codes = []
        for first in range(0, len(index), config.execution.batch_size):
            rows = slice(first, first + config.execution.batch_size)
            codes.append(sample(self.model, torch.from_numpy(labels[rows]), config.sampler, seeds=seeds[rows].tolist()).cpu())
        stacked = torch.cat(codes).numpy()
        file = self.context.write(_part_name(part), lambda path: write_samples(path, index, labels, seeds, stacked))
        record = {"part": part, "rows": len(index), "file": asdict(file), "seconds": time.monotonic() - started}
        self.context.store.put_part(self.context.stage, self.context.key, _part_name(part), record)
        return {"record": [record]}


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


STAGE = Stage("generate", 1, run)
