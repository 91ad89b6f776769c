"""What folders and buckets have in common: a Folder of StoredFiles, digests, and the errors that name a place."""

from __future__ import annotations

import builtins
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


class StoreError(ValueError):
    """The store cannot do what was asked: a place that cannot be written, a file that is not what its manifest says."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value, for hashing. NaN is refused, because it equals nothing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StorageError(ValueError):
    """A place cannot be read or written; the sentence names it and says what to do."""


@dataclass(frozen=True)
class StoredFile:
    """name: relative to the folder, with /.   size: bytes.   version: changes when the content does (of a bucket: the ETag).
    modified: seconds since 1970."""

    name: str
    size: int
    version: str
    modified: float = field(default=0.0, compare=False)


class Folder(ABC):
    uri: str

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        """Files at any depth, in the order of their names' UTF-8 bytes. prefix: of names, a folder with its / or nothing."""

    @abstractmethod
    def entries(self) -> builtins.list[str]:
        """Names of what lies directly in the folder, sorted; those of folders end in /."""

    def folders(self) -> builtins.list[str]:
        """Names of the direct sub-folders, sorted."""
        return sorted(name.rstrip("/") for name in self.entries() if name.endswith("/"))

    @abstractmethod
    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes start..start+length-1 of a file. Raises StorageError where they are not there."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to seek and read in; what is not asked for is not transferred."""

    @abstractmethod
    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        """What names the content of each file: its sha256, or the bucket's own ETag."""
