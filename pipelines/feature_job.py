"""Moments of the features of many images, computed on Ray.

The images are cut into blocks of fixed size by sample index. A block's moments are computed by whoever is free and merged in
index order, so the result does not depend on workers, batch size or which block came first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray.data
import torch

from enat.checkpoint import load_vqgan
from enat.features import FeatureExtractor, load_extractor
from enat.images import to_uint8
from enat.metrics import FeatureMoments
from pipelines.artifacts import ArtifactStore, FileRecord, Manifest
from pipelines.dataset import Dataset
from pipelines.progress import Bar
from pipelines.samples import read_codes
from pipelines.stream import actor_pool, stream_records
from pipelines.workflow import Execution

BLOCK_SIZE = 256


class ImageReader(Protocol):
    """Where images come from. read: uint8 (R, 3, H, W) of sample indices start..stop-1; may leave out unreadable ones."""

    def read(self, start: int, stop: int, device: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class SourceImages:
    """The real images of a dataset, cropped as the token map crops them. Unreadable ones, which it quarantines, are left out."""

    dataset: Dataset
    resolution: int

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        return torch.from_numpy(self.dataset.load_images(self.resolution, start, stop)[0]).to(device)


class DecodedSamples:
    """Generated codes, decoded by the tokenizer and rounded to uint8."""

    def __init__(self, store: ArtifactStore, samples: Manifest, tokenizer: Manifest, batch_size: int) -> None:
        self._store, self._samples, self._tokenizer, self._batch_size = store, samples, tokenizer, batch_size
        self._vqgan: Any = None

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        if self._vqgan is None:
            self._vqgan = load_vqgan(self._store.fetch(self._tokenizer, "vqgan.safetensors")).to(device)
        codes = torch.from_numpy(read_codes(self._store, self._samples, start, stop).codes)
        side = self._vqgan.config.grid_size
        parts = codes.view(-1, side, side).split(self._batch_size)
        return torch.cat([to_uint8(self._vqgan.decode(part.to(device))) for part in parts])


@dataclass(frozen=True)
class ExtractorFile:
    """Where an extractor's weights lie, also before its artifact is committed."""

    store: ArtifactStore
    kind: str
    stage: str
    key: str
    file: FileRecord

    def load(self) -> FeatureExtractor:
        return load_extractor(self.kind, self.store.fetch_file(self.stage, self.key, self.file))


@dataclass(frozen=True)
class FeatureJob:
    """moments of all images, and the seconds that workers spent."""

    moments: FeatureMoments
    worker_seconds: float


def compute_moments(reader: ImageReader, num_images: int, extractor: ExtractorFile, execution: Execution, bar: Bar) -> FeatureJob:
    """Features of the images 0..num_images-1 that the reader gives, num_images at least 1."""
    rows = [
        {"part": block, "start": start, "stop": min(start + BLOCK_SIZE, num_images)}
        for block, start in enumerate(range(0, num_images, BLOCK_SIZE))
    ]

    def job(todo: list[dict[str, int]]) -> ray.data.Dataset:
        return ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _BlockMoments, fn_constructor_args=(reader, extractor, execution), **actor_pool(execution, len(todo))
        )

    records: dict[int, dict[str, Any]] = {}
    with bar:
        for record in stream_records(rows, job):
            records[record["part"]] = record
            bar.advance(record["images"])
    assert sorted(records) == list(range(len(rows)))
    merged = FeatureMoments(len(records[0]["moments"].mean))
    for block in range(len(rows)):
        merged.merge(records[block]["moments"])
    return FeatureJob(merged, sum(record["seconds"] for record in records.values()))


class _BlockMoments:
    """One actor holds one extractor."""

    def __init__(self, reader: ImageReader, extractor: ExtractorFile, execution: Execution) -> None:
        torch.set_num_threads(execution.num_threads)
        self.reader, self.execution = reader, execution
        self.extractor = extractor.load().to(execution.device)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        started = time.monotonic()
        images = self.reader.read(int(batch["start"][0]), int(batch["stop"][0]), self.execution.device)
        moments = FeatureMoments(self.extractor.num_features)
        features = [self.extractor(part) for part in images.split(self.execution.batch_size)]
        if features:
            moments.add(torch.cat(features))
        record = {
            "part": int(batch["part"][0]),
            "images": int(batch["stop"][0] - batch["start"][0]),
            "moments": moments,
            "seconds": time.monotonic() - started,
        }
        return {"record": [record]}
