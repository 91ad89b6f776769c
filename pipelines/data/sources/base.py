"""The interface of a source: images that can be listed in a fixed order, fingerprinted and read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import tee

from pipelines.data.sources.names import FOREIGN, is_foreign, is_image
from pipelines.storage.base import Folder, StoredFile

MAX_LABEL = 999_999  # a larger label is taken for a mistake: every class up to the largest label has a name in the index
_READING_THREADS = 16  # a bucket answers in tens of milliseconds, many times longer than decoding takes
_READ_AT_ONCE = 64
_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Entry:
    """The location of one image.

    key: unique within the dataset.   file: name in the dataset's folder.   label: class number, -1 for an image without one.
    position, size: the image's bytes within the file (in a Parquet file: its row, and 0).
    """

    key: str
    file: str
    position: int
    size: int
    label: int = -1
    captions: tuple[str, ...] = ()


@dataclass
class Findings:
    """Irregularities of a dataset: names of files or images by kind of irregularity. The stage reports them."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.names.setdefault(kind, []).append(name)

    def check_comparison(self, folder: Folder, file: str) -> None:
        """Note a file from whose inside images are read, if nothing tells whether their bytes were damaged on their way."""
        if not folder.is_compared:
            self.add("files whose images cannot be compared with a checksum", file)

    def merge(self, names: dict[str, list[str]]) -> None:
        for kind, some in names.items():
            self.names.setdefault(kind, []).extend(some)


class Source(ABC):
    """reads_to_scan: whether scanning reads the contents of files, in which case workers of the cluster scan.

    keys_may_repeat: whether keys come from inside of files, so that two images may have the same one.
    """

    reads_to_scan = False
    keys_may_repeat = False

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over content and order. Equal fingerprints mean equal datasets."""

    def units(self) -> Sequence[str]:
        """Pieces that can be scanned independently, in the dataset's order."""
        return ("",)

    @abstractmethod
    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        """List the images of a piece in order. Raises ValueError if the piece is not valid."""

    @abstractmethod
    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The bytes of each entry. Raises StorageError if they have changed since the dataset was scanned."""

    def known_classes(self) -> Sequence[str] | None:
        """Names of the classes by number, or None if only a full scan determines the classes."""
        return ()


class RangeSource(Source):
    """A source whose images are byte ranges of files in a folder: by default the images at any depth, without labels."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def fingerprint(self) -> str:
        return content_digest(self.folder, (file for file in self.folder.list() if is_image(file.name)))

    def scan(self, unit: str, findings: Findings) -> Iterator[Entry]:
        for file in self.folder.list(unit):
            if is_image(file.name):
                yield Entry(file.name, file.name, 0, file.size)
            else:
                findings.add(FOREIGN if is_foreign(file.name) else "other files", file.name)

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            for some in _pieces(entries):
                yield from pool.map(lambda entry: self.folder.read(entry.file, entry.position, entry.size), some)


def _pieces(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Split entries into pieces to read ahead, limited by the number of images and by their total size."""
    piece: list[Entry] = []
    for entry in entries:
        if piece and (len(piece) == _READ_AT_ONCE or sum(e.size for e in piece) + entry.size > _BYTES_AT_ONCE):
            yield piece
            piece = []
        piece.append(entry)
    if piece:
        yield piece


def row_key(file: str, row: int) -> str:
    """The key of an image that has no name of its own in a file."""
    return f"{file}/{row:08d}"


def content_digest(folder: Folder, files: Iterable[StoredFile]) -> str:
    """sha256 over names and fingerprints of files in order. Does not hold all files in memory."""
    digest = hashlib.sha256()
    named, fingerprinted = tee(files)
    for file, fingerprint in zip(named, folder.fingerprints(fingerprinted), strict=True):
        digest.update(f"{file.name}\0{fingerprint}\n".encode())
    return digest.hexdigest()
