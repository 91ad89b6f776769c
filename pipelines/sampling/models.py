"""Opening a model with its tokenizer: from a store, from MLflow's model registry, or from files of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from enat.checkpoint import load_enat, load_vqgan, open_enat, open_vqgan
from enat.config import ENATConfig, VQGANConfig
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from pipelines.artifacts.inventory import find
from pipelines.artifacts.last_used import record_read
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import CaptionsSummary
from pipelines.data.token_map import TokenMapSummary
from pipelines.storage.base import file_digest
from pipelines.storage.external import local_file
from pipelines.storage.s3_client import S3Config
from pipelines.tracking import search

_STAGE = "train"  # its artifacts are models, trained or imported
_PUBLISHED_VQGAN = "vqgan-256"


@dataclass(frozen=True)
class Generator:
    """A model and its tokenizer, in eval mode on the CPU.

    origin: digests and source of both, as JSON.   sampler: default settings.   class_names: by label; empty if unknown.
    captions: {"encoder", "encoder_digest"} of a text-conditional model, if known.
    """

    model: ENAT
    vqgan: VQGAN
    origin: Mapping[str, Any]
    sampler: SamplerConfig
    class_names: Sequence[str] = ()
    captions: Mapping[str, str] = field(default_factory=dict)


def is_registered(reference: str) -> bool:
    """Whether a reference has the form of MLflow's registry: models:/name@alias, models:/name/version or name@alias."""
    return "@" in reference or reference.startswith("models:/")


def from_registry(uri: str, reference: str, store: ArtifactStore | None, s3: S3Config) -> Generator:
    """Open a registered model. Raises ValueError if it does not exist."""
    made = from_manifest(*find_registered(uri, reference, store, s3))
    return replace(made, origin={**made.origin, "registered": reference})


def find_registered(uri: str, reference: str, store: ArtifactStore | None, s3: S3Config) -> tuple[ArtifactStore, Manifest]:
    """The store and the artifact of a registered model. `store`: used instead of the registered store. Raises ValueError if the
    model does not exist."""
    tags = search.find_model(uri, reference)
    missing = [name for name in ("enat.artifact", "enat.store") if name not in tags]
    if missing:
        raise ValueError(f"{reference} was not registered by this program: it has no tag {missing[0]}. Name an artifact instead")
    opened = store or open_store(tags["enat.store"], s3)
    stage, _, key = tags["enat.artifact"].partition("/")
    manifest = opened.read_manifest(stage, key)
    if manifest is None:
        raise ValueError(
            f"{reference} is {stage}/{key[:12]}, which the store {opened.uri} does not have; pass its store with --store"
        )
    return opened, manifest


def from_artifact(store: ArtifactStore, name: str) -> Generator:
    """Open an artifact; see find_model."""
    return from_manifest(store, find_model(store, name))


def find_model(store: ArtifactStore, name: str) -> Manifest:
    """`name`: the beginning of a key, or of train/key. Raises ValueError unless it names exactly one model."""
    manifest = find(store, name if "/" in name else f"{_STAGE}/{name}")
    if manifest.stage != _STAGE:
        raise ValueError(f"{manifest.stage}/{manifest.key[:12]} is not a model; models are artifacts of stage {_STAGE}")
    return manifest


def from_manifest(store: ArtifactStore, manifest: Manifest) -> Generator:
    record_read(store, manifest)
    tokenizer = store.read_input(manifest, "tokenizer")
    if tokenizer is None:
        source = manifest.inputs["tokenizer"]
        raise ValueError(f"the store {store.uri} has no {source['stage']}/{source['key'][:12]}, the tokenizer of this model")
    token_map, captions = (store.read_input(manifest, name) for name in ("token_map", "captions"))
    known = {}
    if captions is not None:
        known = {"encoder": captions.config["encoder"], "encoder_digest": CaptionsSummary.read(captions).info.encoder_digest}
    return Generator(
        model=load_enat(store.fetch(manifest, "model.safetensors")),
        vqgan=load_vqgan(store.fetch(tokenizer, "vqgan.safetensors")),
        origin={
            "artifact": f"{manifest.stage}/{manifest.key}",
            "store": store.uri,
            "model_digest": manifest.digest,
            "tokenizer_digest": tokenizer.digest,
        },
        sampler=SamplerConfig(**manifest.config["sampler"]),
        class_names=() if token_map is None else TokenMapSummary.read(token_map).class_names,
        captions=known,
    )


def from_files(weights: str, vqgan: str, *, preset: str | None, vqgan_preset: str | None, s3: S3Config) -> Generator:
    """Open files of weights: paths, s3:// or hf://. This program's files describe themselves; published ones need presets.

    Raises ValueError if a file does not hold such weights.
    """
    paths = {name: local_file(place, f"--{name}", s3) for name, place in (("weights", weights), ("vqgan", vqgan))}
    try:
        tokenizer = open_vqgan(paths["vqgan"], VQGANConfig.preset(vqgan_preset)) if vqgan_preset else load_vqgan(paths["vqgan"])
    except ValueError:
        if vqgan_preset:
            raise
        tokenizer = open_vqgan(paths["vqgan"], VQGANConfig.preset(_PUBLISHED_VQGAN))  # published files do not describe themselves
    if preset is None:
        try:
            model = load_enat(paths["weights"])
        except ValueError as error:
            raise ValueError(f"{error}; for published weights pass the architecture with --preset") from error
    else:
        sizes = {"grid_size": tokenizer.config.grid_size, "codebook_size": tokenizer.config.codebook_size}
        model = open_enat(paths["weights"], ENATConfig.preset(preset, **sizes))
    return Generator(
        model=model,
        vqgan=tokenizer,
        origin={
            "weights": weights,
            "vqgan": vqgan,
            "model_digest": f"sha256:{file_digest(paths['weights'])}",
            "tokenizer_digest": f"sha256:{file_digest(paths['vqgan'])}",
        },
        sampler=SamplerConfig(),
    )
