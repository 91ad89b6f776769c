"""Folders of files, on a file system or in a bucket, as sources read them: listed in order, read by ranges, never written.

A Folder is sendable to Ray workers. `open_folder` turns a path or s3:// URI into one.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipelines.storage.base import Folder, StorageError, StoredFile
from pipelines.storage.cache import DigestCache

if TYPE_CHECKING:
    pass

_HASHING_THREADS = 8  # sha256 lets other threads run, and most of the time is spent waiting for a disk
_HASHED_AT_ONCE = 4096


class LocalFolder(Folder):
    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        if not self.root.is_dir():
            raise StorageError(f"{self.root} is no folder; correct the path, or fetch what belongs there")

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        start = self.root / prefix
        if start.is_dir():
            way = [start, *takewhile(lambda folder: folder != self.root.parent, start.parents)] if prefix else [start]
            ancestors = tuple(_identity(folder.stat()) for folder in way)
            if len(set(ancestors)) == len(ancestors):  # else a link has already led round in a circle
                yield from _walk(start, prefix, ancestors)

    def file(self, name: str) -> StoredFile:
        """One file, without listing its folder."""
        return _stored(name, (self.root / name).stat())

    def entries(self) -> builtins.list[str]:
        return sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in self.root.iterdir())

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with (self.root / name).open("rb") as file:
                file.seek(start)
                content = file.read(-1 if length is None else length)
        except OSError as error:
            raise StorageError(f"{self.root / name} cannot be read ({error.strerror})") from error
        if length is not None and len(content) != length:
            raise StorageError(f"{self.root / name} ends after {start + len(content)} bytes; {start + length} were expected")
        return content

    def open(self, name: str) -> BinaryIO:
        try:
            return (self.root / name).open("rb")
        except OSError as error:
            raise StorageError(f"{self.root / name} cannot be read ({error.strerror})") from error

    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        with DigestCache() as digests, ThreadPoolExecutor(_HASHING_THREADS) as pool:
            remaining = iter(files)
            while some := builtins.list(islice(remaining, _HASHED_AT_ONCE)):
                try:
                    found = digests.sha256([(self.root / file.name, file.size, file.version) for file in some], pool)
                except OSError as error:
                    raise StorageError(f"{error.filename or self.root} cannot be read ({error.strerror})") from error
                yield from found


def _stored(name: str, status: os.stat_result) -> StoredFile:
    return StoredFile(name, status.st_size, f"{status.st_mtime_ns}-{status.st_ino}", status.st_mtime)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(folder: Path, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[StoredFile]:
    """Depth first with / counted in, which is the order of whole names. Links are followed, but not round in circles."""
    try:
        entries = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in os.scandir(folder)]
    except OSError as error:
        raise StorageError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    for name, entry in sorted(entries, key=lambda pair: os.fsencode(pair[0])):
        try:
            status = entry.stat()
            (prefix + name).encode()
        except UnicodeEncodeError as error:
            raise StorageError(f"the name {prefix + name!r} in {folder} is not UTF-8; rename it") from error
        except OSError as error:
            raise StorageError(f"{folder / entry.name} cannot be read ({error.strerror})") from error
        if not name.endswith("/"):
            yield _stored(prefix + name, status)
        elif _identity(status) not in ancestors:
            yield from _walk(folder / entry.name, prefix + name, (*ancestors, _identity(status)))
