"""sha256 of files, remembered by path, size and time of change, so that a dataset is hashed once and then only listed."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from pipelines.artifacts import file_digest

# A file that changes again within the clock's resolution keeps its time of change: digests this fresh are not remembered.
_SETTLED_SECONDS = 2.0


def cache_root() -> Path:
    """ENAT_CACHE, else the user's cache folder."""
    given = os.environ.get("ENAT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "enat"


class DigestCache:
    """A context manager around one small database per machine. Where it cannot be written, files are hashed each time."""

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
        """files: (path, size, version).   Digests as hex, in the same order."""
        known = {path: sha256 for path, size, version in files if (sha256 := self._remembered(path, size, version)) is not None}
        now = time.time_ns()  # before hashing, which may take long enough for a change to look settled
        missing = [path for path, _, _ in files if path not in known]
        computed = dict(zip(missing, pool.map(file_digest, missing), strict=True))
        settled = [
            (str(path), size, version, computed[path])
            for path, size, version in files
            if path in computed and now - int(version.partition("-")[0]) > _SETTLED_SECONDS * 1e9
        ]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", settled)
        except sqlite3.Error:
            pass  # another process holds it, or the disk is full: the next run hashes again
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
