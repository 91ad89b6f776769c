"""Images made by other generators, to be scored like this program's samples: a folder, tar files, Parquet files, or ADM's .npz.

The images stay in place; the stage `images` makes an index of them. Nothing is resized, because scores depend on how images are
resized: they must have the size at which they are scored. Images are numbered in the order of their names, those of .npz and
Parquet files by position.

Shape legend: R images of a range, H x W pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from enat.images import ImageError, decode_image, to_array
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import MAX_FILE_BYTES, Dataset
from pipelines.data.labels import UNKNOWN, check_stated, scheme_of_labels, stated_scheme
from pipelines.data.sources.base import MAX_LABEL, Entry, Findings
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.data.sources.names import is_foreign, is_image
from pipelines.storage.base import Folder, StorageError, StoredFile, digest_of
from pipelines.storage.external import content_digest, local_file
from pipelines.storage.open import open_folder, pinned
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.summary import Summary

if TYPE_CHECKING:
    import torch

    from enat.metrics.adm import AdmSamples


KINDS = ("auto", "folder", "tar", "npz", "parquet")
_JPEG = b"\xff\xd8\xff"  # how such files begin
_SOURCE_KINDS = {"folder": "images", "tar": "tar", "parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class ImageSetConfig:
    """Images that another generator made.

    path: a folder or file, or an address as of a dataset.   name: the generator's name in scores.
    kind: "folder" of JPEG or PNG files at any depth (labels are known if all images are in folders named by class numbers), "tar"
    and "parquet" as for datasets, "npz" in the format of ADM's evaluator: uint8 (N, H, W, 3) `arr_0`, labels in `arr_1` if any.
    "auto" finds out the kind.   labels: how the labels of images without labels were chosen, in the words of labels.STATED; None if
    that is not known.   s3: None takes the run's.
    """

    path: str
    name: str
    kind: str = "auto"
    labels: str | None = None
    s3: S3Config | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"images {self.name}: kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not self.path or not self.name:
            raise ValueError("images need a path and a name; scores refer to them by the name")
        if self.labels is not None:
            check_stated(self.labels)

    def pinned(self) -> Self:
        """With the commit of an address on the Hugging Face hub."""
        return replace(self, path=pinned(self.path))

    def identity(self) -> dict[str, Any]:
        return {"labels": self.labels, "content": self.digest()}

    def digest(self) -> str:
        """sha256 over the names, bytes and order of the images."""
        kind = self.found_kind()
        if kind == "npz":
            content = content_digest(self.path, f"images {self.name}", self.s3)
        else:
            with _named_in_errors(self):
                content = open_source(self.as_dataset()).fingerprint()
        return digest_of({"kind": kind, "content": content})

    def found_kind(self) -> str:
        """The kind; if it is "auto", determined from the files. Raises ValueError if the files do not determine it."""
        if self.kind != "auto":
            return self.kind
        suffix = PurePosixPath(self.path).suffix.lower().removeprefix(".")
        if suffix in ("npz", "tar", "parquet"):
            return suffix
        try:
            kinds = kinds_in(open_folder(self.path, self.s3 or S3Config()))
        except StorageError as error:
            raise ValueError(f"images {self.name}: {error}") from error
        if len(kinds) == 1:
            return next(iter(kinds))
        found = " and ".join(f"{count:,} of kind {kind}" for kind, count in sorted(kinds.items()))
        advice = f"holds {found}; choose one with `kind`" if kinds else "holds no images, tar or Parquet files; fix the path"
        raise ValueError(f"images {self.name}: {self.path} {advice}")

    def as_dataset(self) -> DatasetConfig:
        """The images as a dataset; its sources read all kinds but npz."""
        return DatasetConfig(kind=_SOURCE_KINDS[self.found_kind()], name=self.name, path=self.path, s3=self.s3)


def kinds_in(folder: Folder) -> Counter[str]:
    """How many images ("folder"), tar files ("tar") and Parquet files ("parquet") a folder holds, at any depth."""
    kinds = Counter(_kind_of(file) for file in folder.list())
    del kinds[""]
    return kinds


def _kind_of(file: StoredFile) -> str:
    if is_image(file.name):
        return "folder"
    suffix = "" if is_foreign(file.name) else PurePosixPath(file.name).suffix.lower()
    return suffix.removeprefix(".") if suffix in (".tar", ".parquet") else ""


def scan(config: ImageSetConfig, findings: Findings) -> list[Entry]:
    """List all images in order. Raises ValueError if the set is empty or a file is not valid."""
    kind = config.found_kind()
    if kind == "npz":
        return _npz_entries(config)
    with _named_in_errors(config):
        source = open_source(config.as_dataset())
        entries = [entry for unit in source.units() for entry in source.scan(unit, findings)]
    if kind != "parquet":
        entries.sort(key=lambda entry: entry.key.encode())
    if not entries:
        raise ValueError(f"images {config.name}: {config.path} holds no images; fix the path")
    return _labelled_by_folder(entries) if kind == "folder" else entries


@contextmanager
def _named_in_errors(config: ImageSetConfig) -> Iterator[None]:
    """Name these images in errors of a source, which names the key dataset.path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("dataset.path", f"images {config.name}")) from error


def _labelled_by_folder(entries: list[Entry]) -> list[Entry]:
    folders = [entry.key.partition("/")[0] for entry in entries]
    if not all(re.fullmatch(r"[0-9]{1,6}", folder) for folder in folders):
        return entries
    return [replace(entry, label=int(folder)) for entry, folder in zip(entries, folders, strict=True)]


def find_resolution(config: ImageSetConfig) -> int:
    """H = W of the first image. Raises ValueError if the set is empty."""
    return resolution_of(config, scan(config, Findings()))


def resolution_of(config: ImageSetConfig, entries: Sequence[Entry]) -> int:
    """H = W of the first image; all images must have the same size."""
    if config.found_kind() == "npz":
        return _npz(config).height
    first = next(iter(open_source(config.as_dataset()).read(entries[:1])))
    return square_pixels(config.name, entries[0].key, first, None).shape[1]


def label_scheme(config: ImageSetConfig, entries: Sequence[Entry]) -> str:
    """Describe the labels (labels.py). Raises ValueError if the config's statement contradicts the labels of the images."""
    found = scheme_of_labels([entry.label for entry in entries])
    if config.labels is None:
        return found
    stated = stated_scheme(config.labels, len(entries))
    if found not in (UNKNOWN, stated):
        raise ValueError(f"images {config.name} have labels: {found}; the config states {stated}")
    return stated


def check_images(config: ImageSetConfig, entries: Sequence[Entry], resolution: int) -> int:
    """Read some of the images. Returns how many of them are JPEG. Raises ValueError for the first image that cannot be read or has
    another size.

    All images of an .npz are read, since it stores them in one piece.
    """
    if config.found_kind() == "npz":
        _npz(config).verify()
        return 0
    for entry in entries:
        if entry.size > MAX_FILE_BYTES:
            raise ValueError(f"image {entry.key} of {config.name} has {entry.size:,} bytes, more than {MAX_FILE_BYTES:,}")
    num_jpeg = 0
    for entry, content in zip(entries, open_source(config.as_dataset()).read(entries), strict=True):
        square_pixels(config.name, entry.key, content, resolution)
        num_jpeg += content.startswith(_JPEG)
    return num_jpeg


@dataclass(frozen=True, kw_only=True)
class ImageSetSummary(Summary):
    """What is known of images that another generator made. labels: how they were chosen; see pipelines.data.labels.

    num_classes: 0 if the labels are not known.   other_files: files beside the images, which are ignored.
    num_jpeg: images that are stored as JPEG, with losses.
    """

    name: str
    kind: str
    num_images: int
    resolution: int
    content_digest: str
    labels: str
    num_classes: int = 0
    other_files: int = 0
    num_jpeg: int = 0


@dataclass(frozen=True)
class ImageSet:
    """The images indexed by an artifact of stage `images`, read from the path in the config. Can be pickled for workers."""

    config: ImageSetConfig
    store: ArtifactStore
    manifest: Manifest

    @cached_property
    def summary(self) -> ImageSetSummary:
        return ImageSetSummary.read(self.manifest)

    def __len__(self) -> int:
        return self.summary.num_images

    @property
    def resolution(self) -> int:
        return self.summary.resolution

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        """Images start..stop-1, uint8 (R, 3, H, W). Raises ValueError for an image that has changed since it was indexed."""
        import torch

        stop = min(stop, len(self))
        if self.summary.kind == "npz":
            return _npz(self.config).read(start, stop).to(device)
        images = np.empty((stop - start, 3, self.resolution, self.resolution), np.uint8)
        for slot, row in enumerate(self._dataset().read(start, stop)):
            images[slot] = square_pixels(self.config.name, row.key, row.data, self.resolution)
        return torch.from_numpy(images).to(device)

    def labels(self) -> np.ndarray:
        """int64 (N,); -1 for an unknown label."""
        values: np.ndarray = self._dataset().index(0, len(self))["label"].to_numpy().astype(np.int64)
        return values

    def _dataset(self) -> Dataset:
        """The images as a dataset. Its index is valid for every kind; it cannot read the images of an .npz."""
        config = replace(self.config, kind=self.summary.kind)  # workers need not determine it again
        return Dataset(DatasetConfig(kind="digits") if config.kind == "npz" else config.as_dataset(), self.store, self.manifest)


def square_pixels(name: str, key: str, data: bytes, resolution: int | None) -> np.ndarray:
    """Decode an image, uint8 (3, H, W). Raises ValueError if it is not readable, not square or not of the resolution."""
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ImageError(f"the file has {len(data):,} bytes, more than {MAX_FILE_BYTES:,}")
        pixels = to_array(decode_image(data))
    except ImageError as error:
        raise ValueError(
            f"image {key} of {name} cannot be read ({error}). Replace it: a score without it would not be comparable"
        ) from error
    _check_size(name, key, pixels.shape[2], pixels.shape[1], resolution)
    return pixels


def _check_size(name: str, key: str, width: int, height: int, resolution: int | None) -> None:
    expected = resolution or min(width, height)
    if (width, height) != (expected, expected):
        others = f"others have {expected} x {expected}" if resolution else "images must be square"
        raise ValueError(
            f"image {key} of {name} has {width} x {height} pixels, but {others}. Images are not resized; give them all one size"
        )


@lru_cache(maxsize=4)  # workers read one block after the other
def _npz(config: ImageSetConfig) -> AdmSamples:
    """Open the file; one in a bucket is copied to the cache first. Raises ValueError if its images are not square."""
    from enat.metrics.adm import AdmSamples

    images = AdmSamples(local_file(config.path, f"images {config.name}", config.s3))
    _check_size(config.name, "0", images.width, images.height, None)
    return images


def _npz_entries(config: ImageSetConfig) -> list[Entry]:
    images, file = _npz(config), PurePosixPath(config.path).name
    labels = np.full(images.num_images, -1) if images.labels is None else images.labels
    if labels.min() < -1 or labels.max() > MAX_LABEL:
        raise ValueError(
            f"images {config.name} have labels from {labels.min()} to {labels.max()}; class numbers are 0 to {MAX_LABEL:,}"
        )
    return [Entry(f"{number:08d}", file, number, 0, label) for number, label in enumerate(labels.tolist())]
