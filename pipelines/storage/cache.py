"""What this machine keeps of other places: fetched files and folders, bounded in size by ENAT_CACHE_GB, and digests of local files.

    <root>/files/<sha256[:2]>/<sha256><suffix>   files, under the sha256 of their content
    <root>/downloads/<name>/                     folders, whose names identify their content
    <root>/locks/<name>                          held by the process that fills such a folder
    <root>/digests.sqlite                        sha256 of local files that were hashed before

All processes of a machine share it. Files and folders appear in one step when they are complete, so processes that fetch the same
at once do each other no harm. The time of the last fetch is a file's time of access and a folder's time of change: looking into
a folder does not count as use.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pipelines.storage.base import StorageError, WrongContentError, file_digest

_PARTIAL = ".partial-"
_PARTIALS = (_PARTIAL, ".tmp-")  # .tmp-: of folders, in earlier versions
_KEPT_SECONDS = 3600  # a process that was given a path may be about to open it
_ABANDONED_SECONDS = 24 * 3600  # of a download whose process was killed
_SETTLED_SECONDS = 2.0  # a file that changes twice within the clock's resolution keeps its time: younger digests are not remembered
_GIB = 1 << 30


def cache_root() -> Path:
    """ENAT_CACHE, or the user's cache folder."""
    given = os.environ.get("ENAT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "enat"


def size_limit() -> int:
    """Bytes, from ENAT_CACHE_GB."""
    given = os.environ.get("ENAT_CACHE_GB") or "50"
    try:
        limit = int(float(given) * _GIB)
    except (ValueError, OverflowError):  # not a number, or not a finite one
        limit = -1
    if limit < 0:
        raise StorageError(f"ENAT_CACHE_GB={given} is not a size in GiB; set it to a number such as 50")
    return limit


def holds(path: Path, size: int, sha256: str) -> bool:
    """Whether a file has this content. It is hashed once per process for the same path, size and time of change."""
    status = path.stat()
    return status.st_size == size and _digest_once(path, size, status.st_mtime_ns) == sha256


@functools.cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


# Fetching ------------------------------------------------------------------------------------------------------------------


def fetch(sha256: str, size: int, download: Callable[[Path], None], suffix: str = "") -> Path:
    """Return a local path of the file with this content. `download` writes the file if it is missing or damaged.

    Raises WrongContentError if two downloads have other content, and StorageError if the cache cannot be written.
    """
    path = cache_root() / "files" / sha256[:2] / f"{sha256}{suffix}"
    with _explained():
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            _record_use(path)
            if holds(path, size, sha256):
                return path
        _make_room(size)
        for _ in range(2):
            partial = path.with_name(f"{_PARTIAL}{uuid4().hex}")
            try:
                download(partial)
                if partial.stat().st_size == size and file_digest(partial) == sha256:
                    os.utime(partial, ns=(time.time_ns(), partial.stat().st_mtime_ns))
                    partial.replace(path)
                    return path
            finally:
                partial.unlink(missing_ok=True)
    raise WrongContentError(f"two downloads did not have the expected content: {size} bytes with the sha256 {sha256}")


def fetch_folder(
    name: str, size: int, download: Callable[[Path], None], is_whole: Callable[[Path], bool] = lambda path: True
) -> Path:
    """Return a local path of the folder of this name. `download` fills it with `size` bytes of files if it is missing or not whole.

    If several processes ask at once, one downloads and the others wait. Raises StorageError if the cache cannot be written.
    """
    path = cache_root() / "downloads" / name

    def exists() -> bool:
        with suppress(FileNotFoundError):  # it is missing, or another process made room
            _record_use(path)
            return is_whole(path)
        return False

    with _explained():
        path.parent.mkdir(parents=True, exist_ok=True)
        if exists():  # without the lock: checking large files takes long, and processes may do it at the same time
            return path
    with _explained(), _in_turn(name):
        if exists():
            return path
        if path.is_dir():
            _Entry.of(path).remove()
        _make_room(size)
        partial = path.with_name(f"{_PARTIAL}{uuid4().hex}")
        try:
            partial.mkdir()
            download(partial)
            os.utime(partial)
            try:
                partial.rename(path)
            except OSError:
                if not path.is_dir():  # else another process was first, with the same bytes
                    raise
            _record_use(path)
            return path
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the cache {cache_root()} cannot be used ({error.strerror}); free some space, or set ENAT_CACHE to another folder"
        ) from error


def _record_use(path: Path) -> None:
    """No process removes it for the next hour."""
    with _lock(fcntl.LOCK_SH):
        now = time.time_ns()
        os.utime(path, ns=(now, now if path.is_dir() else path.stat().st_mtime_ns))


@dataclass(frozen=True)
class _Entry:
    """A file or folder of the cache. used, changed: seconds since 1970."""

    path: Path
    size: int
    used: float
    changed: float

    @classmethod
    def of(cls, path: Path) -> _Entry:
        status = path.stat()
        if not path.is_dir():
            return cls(path, status.st_size, status.st_atime, status.st_mtime)
        inside = [(Path(folder) / name).stat() for folder, _, names in os.walk(path) for name in names]
        changed = max([status.st_mtime, *(each.st_mtime for each in inside)])
        return cls(path, sum(each.st_size for each in inside), status.st_mtime, changed)

    @property
    def is_partial(self) -> bool:
        return self.path.name.startswith(_PARTIALS)

    def remove(self) -> None:
        if self.path.is_dir():
            gone = self.path.with_name(f"{_PARTIAL}{uuid4().hex}")  # in one step, so that no half folder keeps the name
            self.path.rename(gone)
            shutil.rmtree(gone)
        else:
            self.path.unlink(missing_ok=True)


def _make_room(size: int) -> None:
    """Remove what was not used for longest, until `size` more bytes are within the limit or only recent entries are left."""
    limit, now = size_limit(), time.time()
    with _lock(fcntl.LOCK_EX):
        entries = []
        for path in (*(cache_root() / "files").glob("*/*"), *(cache_root() / "downloads").glob("*")):
            with suppress(FileNotFoundError):  # a download that ended
                entries.append(_Entry.of(path))
        total = size + sum(entry.size for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.used):
            is_abandoned = entry.is_partial and now - entry.changed > _ABANDONED_SECONDS
            is_old = not entry.is_partial and now - entry.used > _KEPT_SECONDS
            if is_abandoned or (is_old and total > limit):
                entry.remove()
                total -= entry.size


@contextmanager
def _in_turn(name: str) -> Iterator[None]:
    """One process at a time, by name. The lock ends with the process that holds it."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock(kind: int) -> Iterator[None]:
    """Between using a file and removing it. Without it, a file that was just found could be removed."""
    with (cache_root() / "lock").open("a") as file:
        fcntl.flock(file, kind)
        yield


# Digests -------------------------------------------------------------------------------------------------------------------


class DigestCache:
    """Digests of local files, in one small database per machine. If it cannot be written, files are hashed each time."""

    def __enter__(self) -> DigestCache:
        path = cache_root() / "digests.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = _open(path)
        except (OSError, sqlite3.Error):
            self._database = _open(Path(":memory:"))
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def sha256(self, files: Sequence[tuple[Path, int, str]], pool: Executor) -> list[str]:
        """Hash files, given as (path, size, version). Returns digests as hex, in the same order."""
        known = {path: sha256 for path, size, version in files if (sha256 := self._remembered(path, size, version)) is not None}
        now = time.time_ns()  # before hashing, which may take long enough for a change to look settled
        missing = [path for path, _, _ in files if path not in known]
        computed = dict(zip(missing, pool.map(file_digest, missing), strict=True))
        settled = [
            (str(path), size, version, computed[path])
            for path, size, version in files
            if path in computed and now - int(version.partition("-")[0]) > _SETTLED_SECONDS * 1e9
        ]
        with suppress(sqlite3.Error), self._database:  # another process holds it, or the disk is full: hashed again next time
            self._database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", settled)
        return [known.get(path) or computed[path] for path, _, _ in files]

    def _remembered(self, path: Path, size: int, version: str) -> str | None:
        query = "SELECT sha256 FROM digests WHERE path = ? AND size = ? AND version = ?"
        try:
            found = self._database.execute(query, [str(path), size, version]).fetchone()
        except sqlite3.Error:
            return None  # the database is damaged, or another process holds it
        return found[0] if found else None


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30)
    database.execute("CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER, version TEXT, sha256 TEXT)")
    return database
