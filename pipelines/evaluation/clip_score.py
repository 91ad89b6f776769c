"""CLIP scores of samples that were made for captions: embeddings of the images by compute_features, of the captions by Ray tasks.

Shape legend: N samples of a set, F width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.data.dataset import INDEX
from pipelines.evaluation.features import FeatureSet, FeatureSpec, compute_features, read_rows
from pipelines.evaluation.readers import BlockReader
from pipelines.evaluation.scores import TaskPool
from pipelines.storage.external import local_folder
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.stage import StageContext

if TYPE_CHECKING:
    from enat.metrics.extractors import FeatureExtractor

PREFIX = "clip-"  # of the files with embeddings of images
_CAPTIONS_AT_ONCE = 1024  # in one task, which loads the model


@dataclass(frozen=True)
class ClipFolder:
    """Where workers get CLIP from. place: a folder that all of them see, s3:// or hf://."""

    place: str
    s3: S3Config | None = None

    def path(self) -> Path:
        return local_folder(self.place, "evaluate.clip_score", self.s3)

    def load(self) -> FeatureExtractor:
        from enat.metrics.clip_score import ClipImages

        return ClipImages.read(self.path())


def captions_of(numbers: np.ndarray, store: ArtifactStore, captions: Manifest) -> list[str]:
    """The texts of captions, by their numbers in the dataset, int64 (N,). captions: the artifact of stage captions.

    Raises ValueError if the index of the dataset is no longer in the store.
    """
    index = store.read_input(captions, "dataset")
    if index is None:
        raise ValueError(
            f"the texts of the captions are not known: the store no longer has the dataset of captions/{captions.key[:12]}. Leave "
            "evaluate.clip_score out, or run without the captions, which are made again with their dataset"
        )
    texts = pc.list_flatten(pq.read_table(store.fetch(index, INDEX), columns=["captions"])["captions"])
    found: list[str] = texts.take(pa.array(numbers)).to_pylist()
    return found


def embed_captions(texts: Sequence[str], clip: ClipFolder, pool: TaskPool) -> np.ndarray:
    """float32 (N, F)"""
    parts = [texts[start : start + _CAPTIONS_AT_ONCE] for start in range(0, len(texts), _CAPTIONS_AT_ONCE)]
    with pool.bar(len(parts)) as bar:
        return np.concatenate(pool.run(_embed, [(clip, part) for part in parts], bar))


def _embed(clip: ClipFolder, texts: Sequence[str], *, device: str) -> np.ndarray:
    from enat.metrics.clip_score import caption_embeddings

    return caption_embeddings(clip.path(), texts, device=device)


def embed_images(
    reader: BlockReader, spec: FeatureSpec, clip: ClipFolder, execution: Execution, context: StageContext
) -> tuple[np.ndarray, FeatureSet]:
    """float32 (N, F), and their files. spec: with PREFIX in its prefix."""
    job = compute_features(reader, spec, clip, execution, context)
    return read_rows(context.store, context.stage, context.key, job.files, "features"), job
