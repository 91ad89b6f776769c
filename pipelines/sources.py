"""Datasets as rows of (key, image bytes, label), read shard by shard.

A source is opened on the driver, which makes the shard plan; workers open it again from its config and read their shards.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from enat.images import ImageError, center_crop, decode_image, png_bytes, to_array
from pipelines.artifacts import digest_of, file_digest

KINDS = ("digits", "image_folder")
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """kind: "digits" (scikit-learn's, 1,797 images of 8 x 8) or "image_folder" (path/<class>/**/*.jpg|jpeg|png).

    name: stands in token maps and models made from it, so it is part of keys.
    path: of an image folder; its content's digest is part of keys, the path is not.
    """

    kind: str = "digits"
    name: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"dataset.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind == "image_folder" and not self.path:
            raise ValueError("dataset.kind is image_folder, so dataset.path must say where the images lie")

    @property
    def title(self) -> str:
        return self.name or self.kind

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.title, "digest": open_source(self).digest}


@dataclass(frozen=True)
class ImageRow:
    """key: unique within the dataset.   label: class number, -1 where there is none."""

    key: str
    data: bytes
    label: int


class Source(ABC):
    class_names: Sequence[str]

    @abstractmethod
    def __len__(self) -> int:
        """Images, readable or not."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over content and order: equal digests mean equal rows."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Rows start..stop-1 of the dataset's fixed order."""


class DigitsSource(Source):
    """scikit-learn's handwritten digits: real 8 x 8 scans with 17 levels of gray, as PNG bytes."""

    class_names = tuple(map(str, range(10)))

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int32)

    def __len__(self) -> int:
        return len(self._digits[0])

    @property
    def digest(self) -> str:
        images, labels = self._digits
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        images, labels = self._digits
        for index in range(start, min(stop, len(images))):
            yield ImageRow(f"digit-{index:04d}", png_bytes(Image.fromarray(images[index])), int(labels[index]))


class ImageFolderSource(Source):
    """One folder per class, images at any depth below it; classes are numbered in the order of their sorted names."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()
        if not self.root.is_dir():
            raise ValueError(f"dataset.path {self.root} is no folder; give one that holds a folder of images per class")
        self.class_names = tuple(sorted(entry.name for entry in self.root.iterdir() if entry.is_dir()))
        self._paths = [path for name in self.class_names for path in _image_files(self.root / name)]
        if not self._paths:
            raise ValueError(f"dataset.path {self.root} has no images in class folders ({', '.join(_SUFFIXES)})")
        self._label = {name: label for label, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._paths)

    @cached_property
    def digest(self) -> str:
        return digest_of([[path.relative_to(self.root).as_posix(), file_digest(path)] for path in self._paths])

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        for path in self._paths[start:stop]:
            relative = path.relative_to(self.root)
            yield ImageRow(relative.as_posix(), path.read_bytes(), self._label[relative.parts[0]])


def _image_files(folder: Path) -> list[Path]:
    """Images at any depth, following links, in the order of their paths."""
    found = [Path(parent) / name for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted((path for path in found if path.suffix.lower() in _SUFFIXES), key=lambda path: path.as_posix())


@cache
def open_source(config: DatasetConfig) -> Source:
    """Raises ValueError where the dataset is not there."""
    if config.kind == "digits":
        return DigitsSource()
    assert config.path is not None
    return ImageFolderSource(Path(config.path))


def load_images(config: DatasetConfig, resolution: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The readable images among rows start..stop-1, cropped: uint8 (R, 3, H, W), labels int64 (R,).

    Unreadable ones are left out; the token map's quarantine names them.
    """
    arrays, labels = [], []
    for row in open_source(config).read(start, stop):
        try:
            arrays.append(to_array(center_crop(decode_image(row.data), resolution)))
        except ImageError:
            continue
        labels.append(row.label)
    return np.stack(arrays) if arrays else np.empty((0, 3, resolution, resolution), np.uint8), np.array(labels, np.int64)
