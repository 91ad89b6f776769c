"""Notes of use, by which `enat artifacts gc` knows what somebody works with: see garbage.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from pipelines.artifacts.manifest import Manifest, Name, inputs_of, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError

_log = logging.getLogger(__name__)
_EVERY = 600.0  # seconds; far below an hour, the shortest limit that gc takes
_LAST_NOTE = 10.0  # seconds that the end of a run waits for a note that is being written


class Uses:
    """What one run has of a store, noted when it is told of and again every few minutes, since a stage may last longer than the
    limit of gc. A context manager: the thread that does it ends with the run.

    A note that cannot be written is one warning: what is there can be reused. It waits until the stage at work is over: where
    nothing can be written at all, that fails and says so.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._noted: dict[Name, list[Name]] = {}
        self._held_back: str | None = None
        self._has_failed = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="enat-uses", daemon=True)

    def __enter__(self) -> Uses:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._warn()
        self._is_over.set()
        self._thread.join(_LAST_NOTE)

    def note(self, stage: str, key: str, inputs: Iterable[Name]) -> None:
        """From now on the run has this artifact, or is about to make it. inputs: what is to stay while it is unfinished."""
        self._warn()
        self._noted = {**self._noted, (stage, key): [*inputs]}  # replaced whole: the thread may be reading the old one
        self._write((stage, key), self._noted[stage, key])

    def _go_on(self) -> None:
        while not self._is_over.wait(_EVERY):
            for name, inputs in self._noted.items():
                if self._is_over.is_set():
                    return
                self._write(name, inputs)

    def _write(self, name: Name, inputs: Iterable[Name]) -> None:
        try:
            self._store.note_use(*name, inputs)
        except (OSError, StorageError) as error:
            said = f"the use of {name[0]}/{name[1][:12]} is not noted, so that `enat artifacts gc` may take it for unused ({error})"
            if self._has_failed:
                _log.info("%s", said)
            else:
                self._has_failed, self._held_back = True, said

    def _warn(self) -> None:
        if self._held_back is not None:
            _log.warning("%s", self._held_back)
            self._held_back = None


def note_reading(store: ArtifactStore, manifest: Manifest) -> None:
    """For those who only read an artifact. Many may not write, in a public bucket say: they do without, as what they need there is
    kept by its owner."""
    try:
        store.note_use(*name_of(manifest), inputs_of(manifest))
    except (OSError, StorageError) as error:
        _log.info("the use of %s/%s is not noted (%s)", manifest.stage, manifest.key[:12], error)
