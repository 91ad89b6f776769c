"""Feature extractors as references store them: kind, weights, and version of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from enat.metrics.extractors import BUILT_IN, ExtractorFactory, FeatureExtractor, extractor_factory
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.workflow.summary import Summary

# Raised whenever the same images and weights give other features. 2: DINOv2's positions are resampled as published, and spatial
# features depend on their own image only, also if passes run in parallel.
FEATURES_VERSION = 2
EXTRACTOR_FILE = "extractor.safetensors"  # of a reference


@dataclass(frozen=True, kw_only=True)
class ReferenceSummary(Summary):
    """outputs: number of features by name.   of: description of the real images.   resolution: pixels, None if unknown.

    num_images: None if published statistics do not give it.   num_kept: images whose own features are stored.
    features_version: see FEATURES_VERSION.
    """

    extractor: str
    extractor_digest: str
    outputs: Mapping[str, int]
    images_per_pass: int
    of: str
    dataset: str
    resolution: int | None
    num_images: int | None
    num_kept: int = 0
    rounding: str = "uint8"
    is_imported: bool = False
    features_version: int = 1


class ExtractorSource(Protocol):
    """Where workers get an extractor from."""

    def load(self) -> FeatureExtractor: ...


@dataclass(frozen=True)
class ExtractorFile:
    """An extractor's weights in a store. The artifact need not be committed yet.

    factory: opens the file on a worker, because a worker does not know the kinds that were registered on the driver. None for a
    built-in kind.
    """

    store: ArtifactStore
    kind: str
    stage: str
    key: str
    file: FileRecord
    factory: ExtractorFactory | None

    @classmethod
    def of(cls, store: ArtifactStore, kind: str, stage: str, key: str, file: FileRecord) -> ExtractorFile:
        """Raises ValueError if this process does not know the kind."""
        factory = extractor_factory(kind)
        return cls(store, kind, stage, key, file, None if kind in BUILT_IN else factory)

    @classmethod
    def of_reference(cls, store: ArtifactStore, reference: Manifest) -> ExtractorFile:
        """The extractor of a reference."""
        file = reference.file(EXTRACTOR_FILE)
        return cls.of(store, ReferenceSummary.read(reference).extractor, reference.stage, reference.key, file)

    def load(self) -> FeatureExtractor:
        factory = self.factory or extractor_factory(self.kind)
        return factory(self.store.fetch_file(self.stage, self.key, self.file))


def require_same_features(reference: Manifest) -> None:
    """Raises ValueError if this program would compute the features of a reference differently."""
    if (found := ReferenceSummary.read(reference).features_version) != FEATURES_VERSION:
        raise ValueError(
            f"reference/{reference.key[:12]} has features of version {found}, but this program computes version "
            f"{FEATURES_VERSION}. Distances between versions are meaningless. Compute the reference again from its config"
        )
