"""What this machine keeps of other places: fetched files and folders, bounded in size by ENAT_CACHE_GB, and digests of local files.

    <root>/downloads/<name>/                     folders, whose names identify their content; a file is in a folder of its name
    <root>/locks/<name>                          held by the process that fills such a folder
    <root>/digests.sqlite                        sha256 of local files that were hashed before

All processes of a machine share it. Folders appear in one step when they are complete, so processes that fetch the same at once do
each other no harm. The time of change of a folder is the time of its last fetch. Earlier versions had folders of files in
<root>/files, which are removed like the others.
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
from pathlib import Path
from uuid import uuid4

from pipelines.storage.base import AccessError, StorageError, WrongContentError, digest_of, file_digest

_PARTIAL = ".partial-"
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
    """Whether a file has this content. It is hashed once per process for the same path, size and version."""
    status = path.stat()
    return status.st_size == size and _digest_once(path, size, version_of(status)) == sha256


@functools.cache
def _digest_once(path: Path, size: int, version: str) -> str:
    return file_digest(path)


def version_of(status: os.stat_result) -> str:
    """Changes when a file is written or replaced. Programs can set the time of a file (mtime), not that of its inode (ctime)."""
    return f"{max(status.st_mtime_ns, status.st_ctime_ns)}-{status.st_mtime_ns}-{status.st_dev}-{status.st_ino}"


# Fetching ------------------------------------------------------------------------------------------------------------------


def fetch(sha256: str, size: int, download: Callable[[Path], None], suffix: str = "") -> Path:
    """Return a local path of the file with this content. `download` writes the file if it is missing or damaged.

    Raises WrongContentError if two downloads have other content, and StorageError if the cache cannot be written.
    """
    name = f"{sha256}{suffix}"

    def fill(folder: Path) -> None:
        for _ in range(2):
            download(folder / name)
            if (folder / name).stat().st_size == size and file_digest(folder / name) == sha256:
                return
        raise WrongContentError(f"two downloads did not have the expected content: {size} bytes with the sha256 {sha256}")

    return fetch_folder(name, size, fill, lambda folder: holds(folder / name, size, sha256)) / name


def fetch_folder(
    name: str, size: int, download: Callable[[Path], None], is_whole: Callable[[Path], bool] = lambda path: True
) -> Path:
    """Return a local path of the folder of this name. `download` fills it with `size` bytes of files if it is missing or not whole.

    If several processes ask at once, one downloads and the others wait. Raises StorageError if the cache cannot be written.
    """
    path = cache_root() / "downloads" / name

    def exists() -> bool:
        with suppress(FileNotFoundError):  # it is missing, or another process made room
            with _lock("lock", fcntl.LOCK_SH):
                os.utime(path)  # from now on no process removes it for an hour
            return is_whole(path)
        return False

    with _explained():
        path.parent.mkdir(parents=True, exist_ok=True)
        if exists():  # without the lock of its name: checking large files takes long, and processes may do it at the same time
            return path
        with _lock(f"locks/{name}"):
            if exists():
                return path
            if path.is_dir():
                _remove(path)
            _make_room(size)
            partial = path.with_name(f"{_PARTIAL}{uuid4().hex}")
            try:
                partial.mkdir()
                download(partial)
                os.utime(partial)
                return partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AccessError(
            f"the cache {cache_root()} cannot be used ({error.strerror}); free some space, or set ENAT_CACHE to another folder"
        ) from error


def _make_room(size: int) -> None:
    """Remove what was not used for longest, until `size` more bytes are within the limit or only recent folders are left."""
    limit, now = size_limit(), time.time()
    with _lock("lock"):
        found = []
        for path in (*(cache_root() / "downloads").glob("*"), *(cache_root() / "files").glob("*")):
            with suppress(FileNotFoundError):  # a download that ended
                files = [(Path(folder) / name).stat() for folder, _, names in os.walk(path) for name in names]
                used = path.stat().st_mtime
                changed = max([used, *(file.st_mtime for file in files)])
                found.append((used, changed, sum(file.st_size for file in files), path))
        total = size + sum(own_size for _, _, own_size, _ in found)
        for used, changed, own_size, path in sorted(found):
            if path.name.startswith(_PARTIAL):
                is_removed = now - changed > _ABANDONED_SECONDS
            else:
                is_removed = now - used > _KEPT_SECONDS and total > limit
            if is_removed:
                _remove(path)
                total -= own_size


def _remove(path: Path) -> None:
    gone = path.rename(path.with_name(f"{_PARTIAL}{uuid4().hex}"))  # in one step, so that no half folder keeps the name
    shutil.rmtree(gone)


@contextmanager
def _lock(name: str, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock that the processes of the machine share, by name. It ends with the process that holds it.

    "lock" is held between using a folder and removing it: without it, a folder that was just found could be removed.
    """
    path = cache_root() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
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
            (str(path), size, version, computed[path], digest_of([str(path), size, version, computed[path]]))
            for path, size, version in files
            if path in computed and now - int(version.partition("-")[0]) > _SETTLED_SECONDS * 1e9
        ]
        with suppress(sqlite3.Error), self._database:  # another process holds it, or the disk is full: hashed again next time
            self._database.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?, ?)", settled)
        return [known.get(path) or computed[path] for path, _, _ in files]

    def _remembered(self, path: Path, size: int, version: str) -> str | None:
        query = "SELECT sha256, checksum FROM checked WHERE path = ? AND size = ? AND version = ?"
        try:
            found = self._database.execute(query, [str(path), size, version]).fetchone()
        except sqlite3.Error:
            return None  # the database is damaged, or another process holds it
        return found[0] if found and found[1] == digest_of([str(path), size, version, found[0]]) else None


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30)
    database.execute(
        "CREATE TABLE IF NOT EXISTS checked (path TEXT PRIMARY KEY, size INTEGER, version TEXT, sha256 TEXT, checksum TEXT)"
    )
    database.execute("DROP TABLE IF EXISTS digests")  # of earlier versions, without a checksum
    return database
