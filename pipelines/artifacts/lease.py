"""Leases on unfinished artifacts: of identical runs at the same time, one works and the others wait.

A lease is a small file beside the unfinished work. Its holder rewrites it every few seconds, and removes it when its work is over.
A lease saves work. Nothing is wrong without it: if two runs make an artifact, the first manifest wins.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from uuid import uuid4

from pipelines.artifacts.manifest import WORK, Name, read_sealed, sealed, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import process
from pipelines.storage.base import StorageError

_log = logging.getLogger(__name__)
_EVERY = 10.0  # seconds between two writes
_LOST_AFTER = 60.0  # seconds without a write, after which the holder counts as lost
_FILE = f"{WORK}/lease.json"


@dataclass(frozen=True)
class _Record:
    """host, process: of the holder.   owner: of the lease, another one for each run.   beats: how often it was written."""

    host: str
    process: str
    owner: str
    beats: int


class Leases:
    """The leases of one run. A context manager: its thread ends with the run."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._owner = uuid4().hex
        self._held: dict[Name, int] = {}
        self._seen: dict[Name, tuple[_Record, float]] = {}  # of others, with the time of this process when it was first seen
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="enat-leases", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for name in [*self._held]:
            self.release(*name)

    def take(self, stage: str, key: str) -> str | None:
        """Take the lease of an artifact, or return the host of the run that holds it. Returns None if it was taken, or if no lease
        can be written."""
        name, own = (stage, key), sealed(vars(self._record(0)))
        try:
            if not self._store.folder.put_if_absent(self._path(name), own):
                if (holder := self._holder(name)) is not None:
                    return holder.host.partition(" ")[0]
                self._store.folder.put(self._path(name), own)
        except (OSError, StorageError) as error:
            _log.info("the lease of %s cannot be written (%s)", short(name), error)
            return None
        with self._lock:
            self._held[name] = 0
        return None

    def release(self, stage: str, key: str) -> None:
        """Let others take it. The file goes with the other working state when an artifact is committed."""
        name = (stage, key)
        with self._lock:  # no write of the thread comes after it
            if self._held.pop(name, None) is None:
                return
            try:
                if (found := self._read(name)) is not None and found.owner == self._owner:
                    self._store.folder.delete([self._path(name)])
            except (OSError, StorageError) as error:
                _log.info("the lease of %s cannot be removed (%s)", short(name), error)

    def _holder(self, name: Name) -> _Record | None:
        """The run that works on an artifact; None if it has ended, or has not written for a minute."""
        if (found := self._read(name)) is None:
            return None
        if found.host == process.this_host() and not process.is_alive(found.process):
            return None
        known, since = self._seen.get(name, (None, 0.0))
        if known != found:  # clocks of two machines differ, so that only a change tells that a holder lives
            self._seen[name] = found, time.monotonic()
            return found
        return found if time.monotonic() - since < _LOST_AFTER else None

    def _read(self, name: Name) -> _Record | None:
        content = self._store.folder.read_if_exists(self._path(name))
        record = None if content is None else read_sealed(content)
        types = {"host": str, "process": str, "owner": str, "beats": int}
        is_valid = (
            record is not None and record.keys() == types.keys() and all(isinstance(record[each], types[each]) for each in types)
        )
        return _Record(**record) if record is not None and is_valid else None

    def _repeat(self) -> None:
        while not self._is_over.wait(_EVERY):
            self.renew()

    def renew(self) -> None:
        """Write all that are held again."""
        for name in [*self._held]:
            with self._lock:
                if name not in self._held:
                    continue
                self._held[name] += 1
                try:
                    self._store.folder.put(self._path(name), sealed(vars(self._record(self._held[name]))))
                except (OSError, StorageError) as error:
                    _log.info("the lease of %s is not renewed (%s)", short(name), error)

    def _record(self, beats: int) -> _Record:
        return _Record(process.this_host(), process.this_process(), self._owner, beats)

    @staticmethod
    def _path(name: Name) -> str:
        return f"{name[0]}/{name[1]}/{_FILE}"
