"""What a source is: images that can be listed in a fixed order, named by their content, and read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import tee
from pathlib import PurePosixPath

from pipelines.storage.base import Folder, StoredFile

# What counts as an image by its name. Only JPEG and PNG can be read; the others are no less images of the dataset for that, so
# they are inputs which end in quarantine by name and reason.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_LABEL = 999_999  # a larger number is a mistake, and every class up to the largest has a name in the index
_READING_THREADS = 16  # a bucket answers in tens of milliseconds, many times longer than it takes to decode
_READ_AT_ONCE = 64
_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Entry:
    """Where one image lies.

    key: unique within the dataset.   file: name in the dataset's folder.   label: class number, -1 where there is none.
    position, size: bytes of the file that are the image (in a Parquet file: its row, and 0).
    """

    key: str
    file: str
    position: int
    size: int
    label: int = -1
    captions: tuple[str, ...] = ()


@dataclass
class Findings:
    """What is odd about a dataset, by kind: the names of what is concerned. Stands in the stage's report."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.names.setdefault(kind, []).append(name)

    def merge(self, names: dict[str, list[str]]) -> None:
        for kind, some in names.items():
            self.names.setdefault(kind, []).extend(some)


class Source(ABC):
    """reads_to_scan: whether listing the images means reading files, which is then done by the cluster's workers."""

    reads_to_scan = False

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over content and order: equal fingerprints mean equal images."""

    @abstractmethod
    def units(self) -> Sequence[str]:
        """Pieces that can be scanned apart, in the dataset's order."""

    @abstractmethod
    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        """The images of a piece, in order. Raises ValueError for a piece that cannot be understood."""

    @abstractmethod
    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The bytes of each entry. Raises StorageError where they are not what they were when the dataset was scanned."""

    def known_classes(self) -> Sequence[str] | None:
        """Names of the classes by number; None where only the labels of a full scan tell."""
        return None


class RangeSource(Source):
    """A source whose images are byte ranges of files in a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            for some in _pieces(entries):
                yield from pool.map(lambda entry: self.folder.read(entry.file, entry.position, entry.size), some)


def _pieces(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """What is read ahead of whoever decodes: a number of images, but of large ones no more than a certain memory."""
    piece: list[Entry] = []
    for entry in entries:
        if piece and (len(piece) == _READ_AT_ONCE or sum(e.size for e in piece) + entry.size > _BYTES_AT_ONCE):
            yield piece
            piece = []
        piece.append(entry)
    if piece:
        yield piece


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def content_digest(folder: Folder, files: Iterable[StoredFile]) -> str:
    """sha256 over names and fingerprints of files in order, without holding them all."""
    digest = hashlib.sha256()
    named, fingerprinted = tee(files)
    for file, fingerprint in zip(named, folder.fingerprints(fingerprinted), strict=True):
        digest.update(f"{file.name}\0{fingerprint}\n".encode())
    return digest.hexdigest()
