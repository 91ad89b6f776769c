"""For notebooks and scripts: open and show artifacts, and sample from models. `guide/digits.ipynb` demonstrates everything.

    from pipelines import notebook as enat

    enat.ls("train")                                # a table: size, age, key, dataset, description
    model = enat.open_model("train/3f2a")           # or name@alias of MLflow's registry
    enat.show(enat.sample(model, labels="0-9", num_images=40))  # a picture, which is shown if a cell ends with it

A store is a folder or s3://bucket/prefix. An artifact is named by its stage, a slash and a prefix of its key. Errors are a
ValueError with one sentence.

Shape legend: B images, L codes, N steps, H x W pixels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.tree import Tree
from torch import Tensor

from enat.sampler_config import SamplerConfig
from enat.text import TextEncoder
from pipelines.artifacts import lineage as artifacts_lineage
from pipelines.artifacts.inventory import Query, list_artifacts, list_table
from pipelines.artifacts.last_used import record_read
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_existing
from pipelines.artifacts.store import ArtifactStore
from pipelines.data import inspection
from pipelines.data.token_map import TokenMap
from pipelines.sampling import models, pictures
from pipelines.sampling import request as sampling_request
from pipelines.sampling import sample as sampling_sample
from pipelines.sampling.models import Generator
from pipelines.storage.s3_client import S3Config
from pipelines.tracking import run as tracking
from pipelines.workflow.config import merge

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm's, in notebooks without ipywidgets

_STORE = "runs/store"

Store = ArtifactStore | str | Path


@dataclass(frozen=True)
class Artifact(JupyterMixin):
    """One artifact of a store. A cell that ends with it shows its content."""

    store: ArtifactStore
    manifest: Manifest

    def __rich__(self) -> Table:
        return inspection.facts_table(self.store, self.manifest)

    def path(self, name: str) -> Path:
        """One of its files, on this machine. Raises StorageError if it has no file of that name."""
        return self.store.fetch(self.manifest, name)

    def input(self, name: str) -> Artifact:
        """One of its inputs, by the name in the manifest: "token_map", "tokenizer", ..."""
        if name not in self.manifest.inputs:
            raise ValueError(f"{self.manifest.stage} is made from {', '.join(self.manifest.inputs) or 'nothing'}, not from {name}")
        return Artifact(self.store, inspection.input_of(self.store, self.manifest, name))

    def lineage(self) -> Tree:
        """Two branches: its inputs, and what was made from it."""
        from pipelines.run import graph  # imports all stages, which takes seconds

        found, both = artifacts_lineage.Lineage(self.store.manifests(), graph.describe), Tree("", hide_root=True)
        both.children += artifacts_lineage.trees(found, self.manifest)
        return both

    def contact_sheet(self, num_images: int = 32) -> Image.Image:
        """For a token map: source images, each with its reconstruction to the right."""
        return inspection.contact_sheet(self.store, self.manifest, num_images)


@dataclass(frozen=True)
class SampledImages:
    """images: uint8 (B, 3, H, W).   codes: int64 (B, L).   steps: uint8 (N + 1, B, 3, H, W), the known codes after each step."""

    request: sampling_request.SampleRequest
    images: Tensor
    codes: Tensor
    steps: Tensor

    def strip(self, num_images: int = 8) -> Image.Image:
        """How the first images were generated: a row per image, a column per step."""
        return pictures.strip(self.steps[:, :num_images], pictures.scale_for(self.images.shape[-1]))

    def animation(self, columns: int = 8) -> bytes:
        """The same for all images, as a GIF."""
        return pictures.animation(self.steps, min(columns, len(self.images)), pictures.scale_for(self.images.shape[-1]))


def ls(*stages: str, dataset: str | None = None, store: Store = _STORE) -> Table:
    """List the artifacts of some or all stages, newest first. Raises ValueError for an unknown stage."""
    from pipelines.run import graph  # imports all stages, which takes seconds

    graph.check_stages(stages)
    opened = _open(store)
    query = Query(stages=stages, datasets=(dataset,) if dataset else ())
    found = list_artifacts(opened.manifests(), query, now=time.time(), describe=graph.describe, dataset_name=graph.dataset_name)
    return list_table(found)


def open_artifact(name: str, store: Store = _STORE) -> Artifact:
    """name: "token_map/3f2a"."""
    opened = _open(store)
    found = inspection.find(opened, name)
    record_read(opened, found)
    return Artifact(opened, found)


def open_token_map(name: str | Artifact, store: Store = _STORE) -> TokenMap:
    """Codes, labels and captions of all rows, in memory. name: "3f2a", "token_map/3f2a", or the artifact."""
    found = name if isinstance(name, Artifact) else open_artifact(name if "/" in name else f"token_map/{name}", store)
    if found.manifest.stage != "token_map":
        raise ValueError(f"{found.manifest.stage}/{found.manifest.key[:12]} is not a token map; list them with ls('token_map')")
    return TokenMap.open(found.store, found.manifest)


def open_model(name: str, store: Store | None = None, tracking_uri: str | None = None) -> Generator:
    """A model with its tokenizer: "train/3f2a", or a registered model: name@alias, models:/name/version.

    store: the default is runs/store, or the store that the registered version names.   tracking_uri: the default is
    MLFLOW_TRACKING_URI, or runs/mlflow.db.
    """
    if not models.is_registered(name):
        return models.from_artifact(_open(store or _STORE), name)
    uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), Path("runs"))
    return models.from_registry(uri, name, _open(store) if store else None, S3Config())


def sample(
    generator: Generator,
    *,
    labels: str | Sequence[int] = (),
    captions: Sequence[str] = (),
    encoder: TextEncoder | None = None,
    num_images: int | None = None,
    seed: int = 0,
    device: str = "auto",
    **sampler: Any,
) -> SampledImages:
    """Images of a model. `enat sample` and stage generate make the same images with the same seed.

    labels: as for `enat sample`, such as "207,360-362 x2", or numbers.   captions, encoder: for a model of captions.
    num_images: the default is the number of labels or captions, or 16.   sampler: values that replace those of the model's
    SamplerConfig, such as num_steps=12; a list replaces the scalar.
    """
    config = generator.model.config
    numbers = (
        sampling_request.parse_labels(labels, config.num_classes, generator.class_names)
        if isinstance(labels, str)
        else tuple(labels)
    )
    if wrong := [label for label in numbers if not isinstance(label, Integral)]:
        raise ValueError(f"labels holds {wrong[0]!r}, which is not a class number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    own = ("the model's sampler", generator.sampler.values_beside(sampler))
    request = sampling_request.SampleRequest(
        num_images=(len(numbers) or len(captions) or 16) if num_images is None else num_images,
        sampler=merge(SamplerConfig, [own, (f"sampler {sampler}", sampler)]),
        labels=numbers,
        captions=tuple(captions),
        seed=seed,
        device=sampling_request.choose_device(device),
    )
    batches = [batch for batch, _ in sampling_sample.sample_batches(generator, request, encoder)]
    steps = [pictures.step_images(generator.vqgan, batch.trajectory, batch.codes, config.mask_id) for batch in batches]
    images, codes = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "codes"))
    return SampledImages(request, images, codes, torch.cat(steps, dim=1))


def show(images: SampledImages | Tensor) -> Image.Image:
    """A grid of samples, with one column per requested label or caption; or of uint8 (B, 3, H, W)."""
    if isinstance(images, Tensor):
        return pictures.grid_of(images)
    return pictures.grid_of(images.images, images.request.num_asked)


def _open(store: Store) -> ArtifactStore:
    return store if isinstance(store, ArtifactStore) else open_existing(str(store), S3Config())
