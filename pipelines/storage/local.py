"""Folders of a file system: listed in order, read by ranges, written in one step."""

from __future__ import annotations

import builtins
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import BinaryIO

from pipelines.storage import atomic, cache
from pipelines.storage.base import AccessError, Folder, MissingFileError, StorageError, StoredFile, WrongContentError, file_digest
from pipelines.storage.cache import DigestCache, holds

_HASHING_THREADS = 8  # sha256 lets other threads run, and most of the time is spent waiting for a disk
_HASHED_AT_ONCE = 4096


class LocalFolder(Folder):
    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def list(self, prefix: str = "", *, follow_links: bool = True) -> Iterator[StoredFile]:
        start = self.root / prefix
        if not start.is_dir() or (not follow_links and self._is_behind_link(start)):
            return
        way = [start, *takewhile(lambda folder: folder != self.root.parent, start.parents)] if prefix else [start]
        ancestors = tuple(_identity(folder.stat()) for folder in way)
        if len(set(ancestors)) == len(ancestors):  # else a link has already led round in a circle
            yield from _walk(start, prefix, ancestors, follow_links)

    def file(self, name: str) -> StoredFile:
        """One file, without listing its folder."""
        return _stored(name, (self.root / name).stat())

    def entries(self, prefix: str = "") -> builtins.list[str]:
        try:
            return sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in os.scandir(self.root / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"{self.root / prefix} cannot be read ({error.strerror})") from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with self._explained(name), (self.root / name).open("rb") as file:
            file.seek(start)
            content = file.read(-1 if length is None else length)
        if length is not None and len(content) != length:
            raise StorageError(f"{self.root / name} ends after {start + len(content)} bytes; {start + length} were expected")
        return content

    def open(self, name: str) -> BinaryIO:
        with self._explained(name):
            return (self.root / name).open("rb")

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._explained(name):
            yield from atomic.chunks_of(self.root / name)

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        path = self.root / name
        with self._explained(name):
            if not holds(path, size, sha256):
                raise WrongContentError(f"{path} does not have {size} bytes with the sha256 {sha256}")
        return path

    def fingerprints(self, files: Iterable[StoredFile]) -> Iterator[str]:
        with DigestCache() as digests, ThreadPoolExecutor(_HASHING_THREADS) as pool:
            remaining = iter(files)
            while some := builtins.list(islice(remaining, _HASHED_AT_ONCE)):
                try:
                    found = digests.sha256([(self.root / file.name, file.size, file.version) for file in some], pool)
                except OSError as error:
                    raise AccessError(f"{error.filename or self.root} cannot be read ({error.strerror})") from error
                yield from found

    def put_if_absent(self, name: str, source: Path | bytes, sha256: str | None = None) -> bool:
        target = self.root / name
        is_written = atomic.write_if_absent(target, atomic.chunks_of(source))
        return is_written or file_digest(target) == (sha256 or file_digest(source))

    def put(self, name: str, content: bytes) -> None:
        atomic.replace(self.root / name, [content])

    def delete(self, names: Iterable[str], *, follow_links: bool = True) -> None:
        for name in names:
            path = self.root / name
            assert follow_links or not self._is_behind_link(path.parent), name
            path.unlink(missing_ok=True)
            for parent in takewhile(lambda folder: folder != self.root, path.parents):
                try:
                    parent.rmdir()
                except OSError:  # not empty, or gone
                    break

    def _is_behind_link(self, path: Path) -> bool:
        return any(folder.is_symlink() for folder in takewhile(lambda folder: folder != self.root, (path, *path.parents)))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            _check_file(self.root / name, (self.root / name).stat())
            yield
        except OSError as error:
            kind = MissingFileError if isinstance(error, FileNotFoundError | NotADirectoryError) else AccessError
            raise kind(f"{self.root / name} cannot be read ({error.strerror})") from error


def _stored(name: str, status: os.stat_result) -> StoredFile:
    return StoredFile(name, status.st_size, cache.version_of(status), status.st_mtime)


def _check_file(path: Path, status: os.stat_result) -> None:
    """Raises StorageError for what may never end, such as /dev/zero, or for a pipe, which waits for a writer."""
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{path} is a device, pipe or socket, not a file; remove it or its link")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(folder: Path, prefix: str, ancestors: tuple[tuple[int, int], ...], follow_links: bool) -> Iterator[StoredFile]:
    """Depth first, with the / of folders in the order, which gives the order of whole names. Circles of links end."""
    try:
        entries = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in os.scandir(folder)]
    except OSError as error:
        if not follow_links:
            return
        raise AccessError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    for name, entry in sorted(entries, key=lambda pair: os.fsencode(pair[0])):
        is_folder = name.endswith("/")
        if is_folder and entry.is_symlink() and not follow_links:
            continue
        try:
            status = entry.stat(follow_symlinks=follow_links)
            (prefix + name).encode()
        except UnicodeEncodeError as error:
            if not follow_links:
                continue
            raise StorageError(f"the name {prefix + name!r} in {folder} is not UTF-8; rename it") from error
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not entry.is_symlink():
                continue  # removed since it was listed
            raise AccessError(f"{folder / entry.name} cannot be read ({error.strerror})") from error
        if not is_folder:
            if follow_links:
                _check_file(folder / entry.name, status)
            yield _stored(prefix + name, status)
        elif _identity(status) not in ancestors:
            yield from _walk(folder / entry.name, prefix + name, (*ancestors, _identity(status)), follow_links)
