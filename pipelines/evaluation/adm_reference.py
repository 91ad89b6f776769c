"""ADM's reference statistics: an .npz file instead of a dataset's images. It may contain images as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.external import local_file
from pipelines.storage.s3_client import S3Config

if TYPE_CHECKING:
    import torch

    from enat.metrics.adm import AdmSamples
    from enat.metrics.moments import FeatureStatistics


KEY = "reference.npz"  # key of the config, for messages


@dataclass(frozen=True)
class NpzReference:
    """statistics: by output of Inception, "features" and "spatial"; empty if the file has none.

    num_images: images in the file, fewer than its statistics were computed from, or 0.   resolution: of these images.
    """

    place: str
    statistics: Mapping[str, FeatureStatistics]
    num_images: int
    resolution: int | None

    @property
    def name(self) -> str:
        return self.place.partition("@")[0].rpartition("/")[2]

    @classmethod
    def open(cls, place: str, s3: S3Config | None) -> NpzReference:
        """place: a path, s3:// or hf://. Raises ValueError if the file is damaged or has neither images nor statistics."""
        path = local_file(place, KEY, s3)
        try:
            return cls(place, *_read(path))
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error

    def check(self, extractor: str, outputs: Mapping[str, int], resolution: int) -> None:
        """Raises ValueError if the extractor does not fit the statistics, or the resolution does not fit the images."""
        if self.resolution is not None and self.resolution != resolution:
            raise ValueError(f"{KEY} {self.name} has images of {self.resolution} px, but this run makes {resolution} px")
        if not self.num_images and extractor != "inception":
            raise ValueError(f"{KEY} {self.name} has statistics of Inception's features, but no images; set extractor: inception")
        for output, found in self.statistics.items():
            if extractor == "inception" and len(found.mean) != outputs[output]:
                raise ValueError(f"{KEY} {self.name} has {len(found.mean)} {output}; Inception has {outputs[output]}")


def _read(path: Path) -> tuple[dict[str, FeatureStatistics], int, int | None]:
    from enat.metrics.adm import AdmSamples, read_reference

    reference = read_reference(path)
    found = {"features": reference.pool, "spatial": reference.spatial}
    statistics = {output: values for output, values in found.items() if values is not None}
    if not reference.has_images:
        if not statistics:
            raise ValueError(f"{path} has neither images (arr_0) nor statistics (mu, sigma)")
        return statistics, 0, None
    images = AdmSamples(path)
    images.verify()
    if images.height != images.width:
        raise ValueError(f"{path}: images of {images.height} x {images.width} pixels are not square")
    return statistics, images.num_images, images.height


@dataclass(frozen=True)
class NpzImages:
    """The images of such a file. Workers open the file at the place that the config names."""

    place: str
    s3: S3Config | None

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        images = _opened(self.place, self.s3)
        return images.read(start, min(stop, images.num_images)).to(device)


@lru_cache(maxsize=2)  # a worker reads block after block
def _opened(place: str, s3: S3Config | None) -> AdmSamples:
    from enat.metrics.adm import AdmSamples

    return AdmSamples(local_file(place, KEY, s3))
