"""Files that this machine has fetched, by the sha256 of their content: verified, shared by its processes, bounded in size.

`<root>/files/<sha256[:2]>/<sha256><suffix>`. A file appears there in one step, when it is whole, so processes that fetch the same
file at once do each other no harm. When it was last fetched is its time of access.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from pipelines.artifacts import StoreError, file_digest
from pipelines.digest_cache import cache_root

_PARTIAL = ".partial-"
_KEPT_SECONDS = 3600  # whoever was given a path may still be about to open it
_ABANDONED_SECONDS = 24 * 3600  # of a download whose process was killed
_GIB = 1 << 30


def fetch(sha256: str, size: int, download: Callable[[Path], None], suffix: str = "") -> Path:
    """A local path of the file with this content; `download` writes it where there is none, or a damaged one.

    Raises StoreError where, twice, something else came, and where the cache cannot be written.
    """
    path = cache_root() / "files" / sha256[:2] / f"{sha256}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            _note_use(path)
            if _is(path, size, sha256):
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
    except OSError as error:
        raise StoreError(
            f"the cache {cache_root()} cannot be used ({error.strerror}); make room there, or set ENAT_CACHE to another folder"
        ) from error
    raise WrongContentError(f"what was fetched twice is not what was asked for: {size} bytes with the sha256 {sha256}")


class WrongContentError(StoreError):
    """What was downloaded has another size or sha256 than it should have."""


def size_limit() -> int:
    """Bytes, from ENAT_CACHE_GB."""
    given = os.environ.get("ENAT_CACHE_GB") or "50"
    try:
        limit = float(given) * _GIB
        if limit >= 0:
            return int(limit)
    except (ValueError, OverflowError):
        pass
    raise StoreError(f"ENAT_CACHE_GB={given} is no size in GiB; set it to a number such as 50")


def _is(path: Path, size: int, sha256: str) -> bool:
    status = path.stat()
    return status.st_size == size and _digest_once(path, size, status.st_mtime_ns) == sha256


@cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, computed once per process for the same path, size and time of change."""
    return file_digest(path)


def _note_use(path: Path) -> None:
    """From here on nobody removes the file for a while."""
    with _lock(fcntl.LOCK_SH):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _make_room(size: int) -> None:
    """Remove what was not used for longest, until `size` more bytes are within the limit or only recent files are left."""
    limit, now = size_limit(), time.time()
    with _lock(fcntl.LOCK_EX):
        files = []
        for path in (cache_root() / "files").glob("*/*"):
            try:
                files.append((path, path.stat()))
            except FileNotFoundError:
                continue  # a download that ended
        total = size + sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_atime):
            is_abandoned = path.name.startswith(_PARTIAL) and now - status.st_mtime > _ABANDONED_SECONDS
            is_old = not path.name.startswith(_PARTIAL) and now - status.st_atime > _KEPT_SECONDS
            if is_abandoned or (is_old and total > limit):
                path.unlink(missing_ok=True)
                total -= status.st_size


@contextmanager
def _lock(kind: int) -> Iterator[None]:
    """Between using a file and removing it: without it, a file could be removed that was just found."""
    with (cache_root() / "lock").open("a") as file:
        fcntl.flock(file, kind)
        yield
