"""Records of use, by which `enat artifacts gc` knows which artifacts are in use: see garbage.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from pipelines.artifacts.manifest import Manifest, Name, inputs_of, name_of, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError

_log = logging.getLogger(__name__)
_EVERY = 600.0  # seconds; far below an hour, the shortest limit that gc takes
_LAST_RECORD = 10.0  # seconds that the end of a run waits for a record that is being written


class UseRecorder:
    """Records which artifacts one run uses, at once and again every few minutes: a stage may take longer than the limit of gc.

    A context manager: its thread ends with the run. A record that cannot be written costs one warning, because existing artifacts
    can be reused all the same. The warning waits until the stage at work is over: if nothing can be written, that stage fails with
    a better message.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._used: dict[Name, list[Name]] = {}
        self._held_back: str | None = None
        self._has_failed = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="enat-use-recorder", daemon=True)

    def __enter__(self) -> UseRecorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._warn()
        self._is_over.set()
        self._thread.join(_LAST_RECORD)

    def record(self, stage: str, key: str, inputs: Iterable[Name]) -> None:
        """From now on the run uses this artifact, or is about to make it. inputs: artifacts to keep while it is unfinished."""
        self._warn()
        self._used = {**self._used, (stage, key): [*inputs]}  # replaced whole: the thread may be reading the old one
        self._write((stage, key), self._used[stage, key])

    def _repeat(self) -> None:
        while not self._is_over.wait(_EVERY):
            for name, inputs in self._used.items():
                if self._is_over.is_set():
                    return
                self._write(name, inputs)

    def _write(self, name: Name, inputs: Iterable[Name]) -> None:
        try:
            self._store.record_use(*name, inputs)
        except (OSError, StorageError) as error:
            message = f"the use of {short(name)} is not recorded, and `enat artifacts gc` may consider it unused ({error})"
            if self._has_failed:
                _log.info("%s", message)
            else:
                self._has_failed, self._held_back = True, message

    def _warn(self) -> None:
        if self._held_back is not None:
            _log.warning("%s", self._held_back)
            self._held_back = None


def record_read(store: ArtifactStore, manifest: Manifest) -> None:
    """Record the use of an artifact that is only read. Readers without the right to write, such as those of a public bucket, use it
    unrecorded: its owner keeps it."""
    try:
        store.record_use(*name_of(manifest), inputs_of(manifest))
    except (OSError, StorageError) as error:
        _log.info("the use of %s is not recorded (%s)", short(name_of(manifest)), error)
