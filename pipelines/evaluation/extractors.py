"""Feature extractors as references store them: kind, weights, and version of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from enat.metrics.extractors import BUILT_IN, ExtractorFactory, FeatureExtractor, extractor_factory
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.workflow.summary import Summary

if TYPE_CHECKING:
    from torch import Tensor

# Raised whenever the same images and weights give other features. 2: DINOv2's positions are resampled as published, and spatial
# features depend on their own image only, also if passes run in parallel.
FEATURES_VERSION = 2
EXTRACTOR_FILE = "extractor.safetensors"  # of a reference


@dataclass(frozen=True, kw_only=True)
class ReferenceSummary(Summary):
    """outputs: number of features by name.   of: description of the real images.   resolution: pixels, None if unknown.

    num_images: None if published statistics do not give it.   num_kept: images whose own features are stored.
    features_version: see FEATURES_VERSION.   precision: number format of the extractor.
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
    precision: str = "fp32"


class ExtractorSource(Protocol):
    """Where workers get an extractor from. One that is not in fp32 has a method `exact`, which returns one that is."""

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
    precision: str = "fp32"

    @classmethod
    def of(
        cls, store: ArtifactStore, kind: str, stage: str, key: str, file: FileRecord, *, precision: str = "fp32"
    ) -> ExtractorFile:
        """Raises ValueError if this process does not know the kind."""
        factory = extractor_factory(kind)
        return cls(store, kind, stage, key, file, None if kind in BUILT_IN else factory, precision)

    @classmethod
    def of_reference(cls, store: ArtifactStore, reference: Manifest) -> ExtractorFile:
        """The extractor of a reference."""
        file, summary = reference.file(EXTRACTOR_FILE), ReferenceSummary.read(reference)
        return cls.of(store, summary.extractor, reference.stage, reference.key, file, precision=summary.precision)

    def load(self) -> FeatureExtractor:
        factory = self.factory or extractor_factory(self.kind)
        extractor = factory(self.store.fetch_file(self.stage, self.key, self.file))
        return extractor if self.precision == "fp32" else LowPrecision(extractor, self.precision)

    def exact(self) -> ExtractorFile:
        """The same in fp32, itself if it is."""
        return self if self.precision == "fp32" else replace(self, precision="fp32")


class LowPrecision:
    """An extractor whose network computes in a number format other than fp32. Its outputs are float32."""

    def __init__(self, extractor: FeatureExtractor, precision: str) -> None:
        self.outputs = extractor.outputs
        self.takes_float = getattr(extractor, "takes_float", False)
        self.is_thread_safe = getattr(extractor, "is_thread_safe", False)
        self._extractor, self._precision = extractor, precision

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        from enat.execution.precision import computing_in

        with computing_in(self._precision, images.device.type):
            outputs = self._extractor(images)
        return {name: values.float() for name, values in outputs.items()}

    def to(self, device: str) -> LowPrecision:
        self._extractor = self._extractor.to(device)
        return self


def require_same_features(reference: Manifest) -> None:
    """Raises ValueError if this program would compute the features of a reference differently."""
    if (found := ReferenceSummary.read(reference).features_version) != FEATURES_VERSION:
        raise ValueError(
            f"reference/{reference.key[:12]} has features of version {found}, but this program computes version "
            f"{FEATURES_VERSION}. Distances between versions are meaningless. Compute the reference again from its config"
        )
