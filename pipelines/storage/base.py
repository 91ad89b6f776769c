"""What folders and buckets have in common: a Folder of StoredFiles, digests, and the errors that name a place."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

CHUNK = 1 << 20  # bytes that are copied or hashed at a time
_THREADS = 16  # requests to a bucket at once

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class StorageError(ValueError):
    """A place cannot be read or written, or its content is not what is expected. The message names the place and what to do."""


class AccessError(StorageError):
    """A place refuses, fails or does not answer, though nothing is wrong with its name: a failure, not bad input."""


class WrongContentError(StorageError):
    """A file has another size or sha256 than expected."""


class MissingFileError(StorageError):
    """A file does not exist."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder.

    name: relative to the folder, with /.   size: bytes.   version: changes with the content (in a bucket: the ETag).
    modified: seconds since 1970, by the clock of the place.
    """

    name: str
    size: int
    version: str
    modified: float = field(default=0.0, compare=False)


class Folder(ABC):
    """Files below a path or a URI. A folder can be sent to workers, and need not exist before something is written to it.

    is_remote: whether answers take so long that several questions should be asked at once.
    """

    uri: str
    is_remote = False

    @abstractmethod
    def list(self, prefix: str = "", *, follow_links: bool = True) -> Iterator[StoredFile]:
        """List files at any depth, in the order of the UTF-8 bytes of their names.

        prefix: a sub-folder with its trailing /, or "" for all.   follow_links: if False, nothing behind a link is listed, links
        to files count as files, and directories that cannot be read are left out.
        """

    @abstractmethod
    def entries(self, prefix: str = "") -> builtins.list[str]:
        """Names of the files and sub-folders directly in the folder, sorted; names of sub-folders end in /."""

    def folders(self, prefix: str = "") -> builtins.list[str]:
        """Names of the direct sub-folders, sorted."""
        return sorted(name.rstrip("/") for name in self.entries(prefix) if name.endswith("/"))

    @abstractmethod
    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read bytes start..start+length-1 of a file. Raises StorageError if the file ends before."""

    def read_if_exists(self, name: str) -> bytes | None:
        """Read a file, or return None if it does not exist."""
        try:
            return self.read(name)
        except MissingFileError:
            return None

    @property
    def is_compared(self) -> bool:
        """Whether parts of a file are read in a way that detects bytes that were damaged on their way."""
        return True

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking. Only the bytes that are read are transferred."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a whole file in pieces, past every cache. Raises StorageError if an object of a bucket changes meanwhile."""

    def download(self, name: str, path: Path) -> None:
        """Write a file to a local one, which is replaced, past every cache."""
        with path.open("wb") as file:
            file.writelines(self.chunks(name))

    @abstractmethod
    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """Return a local path of a file after its bytes were checked. Raises WrongContentError if they differ."""

    @abstractmethod
    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        """Identify the content of each file: by its sha256, or by the ETag of the bucket."""

    @abstractmethod
    def put_if_absent(self, name: str, source: Path | bytes, sha256: str | None = None) -> bool:
        """Write a file in one step unless its name is taken. Returns whether the name now holds exactly these bytes.

        `sha256`: of the source, if it is known. Raises OSError or StorageError if nothing can be written.
        """

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Write a small file in one step, replacing an existing one."""

    @abstractmethod
    def delete(self, names: Iterable[str], *, follow_links: bool = True) -> None:
        """Remove exactly these files, and the directories that become empty. Files that do not exist are skipped.

        follow_links: if False, a name behind a link is an error of the program.
        """


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value, for hashing. NaN is refused, because it equals nothing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(source: Path | bytes, algorithm: str = "sha256") -> str:
    """Digest of a file, or of bytes."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def in_parallel(act: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = _THREADS) -> Iterator[_Result]:
    """Yield act(item) for each item, in order. At most `threads` results are computed ahead of the reader."""
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="storage") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(act, item))
                if len(waiting) >= threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
