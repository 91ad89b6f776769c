"""The artifact store: what a stage made, found again by what went into it.

An artifact is `<store>/<stage>/<key>/` with a `manifest.json` that lists every file with size and sha256. The manifest is
written last and only if there is none: no manifest, no artifact. Nothing in a store is ever overwritten, so two runs that
make the same artifact at once need no lock: the first manifest wins and the other run adopts it.

This module and s3_store alone know where a store lies. `open_store` turns a URI into one; stages see `ArtifactStore` only.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts.manifest import (
    DamagedManifestError,
    FileRecord,
    Manifest,
    StoredPath,
)
from pipelines.storage.base import StoreError

_log = logging.getLogger(__name__)


class ArtifactStore(ABC):
    """Artifacts by (stage, key). Safe to send to workers; they write parts and files directly."""

    uri: str

    @abstractmethod
    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """The committed manifest, or None where the artifact does not exist (yet)."""

    def commit(self, manifest: Manifest) -> Manifest:
        """Make the artifact exist. Returns the manifest that counts: an earlier one, where another run was first.

        Raises StoreError where files of it are not there. Whoever removes files looks for a manifest afterwards, and here files
        are looked for after the manifest is written: so of two that meet, at least one sees the other.
        """
        name = manifest.stage, manifest.key
        self._check_files(manifest)
        if not self._put_manifest(manifest):
            if (committed := self.read_manifest(*name)) is None:
                raise StoreError(f"{self.place(*name)} was removed while it was being made; run again")
            return committed
        try:
            self._check_files(manifest)
        except StoreError:
            with contextlib.suppress(ValueError, OSError):  # those who may not remove it are told to have it removed
                self.delete_manifest(*name)
            raise
        return manifest

    def _check_files(self, manifest: Manifest) -> None:
        place = self.place(manifest.stage, manifest.key)
        for record in self.missing_files(manifest):
            raise StoreError(
                f"{place}/{record.path} is gone, or cut off, before the artifact was made of it; remove {place} and run again"
            )

    @abstractmethod
    def missing_files(self, manifest: Manifest) -> Iterator[FileRecord]:
        """Those files and records of an artifact, committed or not, that do not lie in the store in their full size."""

    @abstractmethod
    def _put_manifest(self, manifest: Manifest) -> bool:
        """Whether it lies there now; else another one does."""

    @abstractmethod
    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        """Store a file, never overwriting: where the name is taken by other bytes (another run of a stage that is not
        deterministic), it lies under a path with its digest, and the manifest of each run names its own."""

    @abstractmethod
    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        """A local path of a file whose bytes were checked against its record. Raises DamagedFileError where they differ, and
        another StoreError where they could not be looked at."""

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """The same for a file of a committed artifact."""
        return self.fetch_file(manifest.stage, manifest.key, manifest.file(name))

    @abstractmethod
    def put_part(self, stage: str, key: str, name: str, record: Mapping[str, Any]) -> None:
        """Note that a part of an unfinished artifact is done. Its files must have been put before."""

    @abstractmethod
    def read_parts(self, stage: str, key: str) -> dict[str, dict[str, Any]]:
        """Records of the parts that are done, by name, sorted."""

    @abstractmethod
    def discard_part(self, stage: str, key: str, name: str) -> None:
        """Take back the record of a part, after which its files may be discarded."""

    @abstractmethod
    def discard_files(self, stage: str, key: str, files: Iterable[FileRecord]) -> None:
        """Remove files of an unfinished artifact that no record names any more."""

    @abstractmethod
    def discard_work(self, stage: str, key: str) -> None:
        """Remove part records and working state once the artifact is committed."""

    @abstractmethod
    def note_use(self, stage: str, key: str, inputs: Iterable[tuple[str, str]] = ()) -> None:
        """Say that a run is about to reuse or make an artifact, before it looks whether there is one: see garbage.py.

        inputs: (stage, key) of what it is made from.
        """

    @abstractmethod
    def noted_inputs(self, stage: str, key: str) -> list[tuple[str, str]]:
        """What the newest use noted as inputs; none where there is no note that can be read."""

    @abstractmethod
    def delete_manifest(self, stage: str, key: str) -> None:
        """From now on the artifact does not exist; its files still lie there."""

    @abstractmethod
    def delete_files(self, stage: str, key: str, paths: Iterable[str]) -> None:
        """Remove exactly these files of the folder of stage/key. What is gone need not be removed."""

    @abstractmethod
    def names(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of all that is called as artifacts are, committed or not, in order."""

    @abstractmethod
    def folders(self) -> Iterator[tuple[str, str, list[StoredPath]]]:
        """The same with all files, of those folders that lie in the store itself, not behind a link."""

    @abstractmethod
    def list_files(self, stage: str, key: str) -> list[StoredPath]:
        """All files in the folder of stage/key, by path; none where there is no such folder, or it is a link."""

    @abstractmethod
    def read_chunks(self, stage: str, key: str, path: str) -> Iterator[bytes]:
        """A file as it lies there now, past every cache and check. Raises FileNotFoundError."""

    def read_manifests(self, names: Iterable[tuple[str, str]] | None = None) -> Iterator[Manifest | DamagedManifestError]:
        """Committed artifacts, of these names or of all; in place of a manifest that is none, the reason."""
        for stage, key in self.names() if names is None else names:
            found = self._manifest_or_damage((stage, key))
            if found is not None:
                yield found

    def _manifest_or_damage(self, name: tuple[str, str]) -> Manifest | DamagedManifestError | None:
        try:
            return self.read_manifest(*name)
        except DamagedManifestError as error:
            return error

    def manifests(self) -> Iterator[Manifest]:
        """All committed artifacts. Of a manifest that is none a warning tells."""
        for found in self.read_manifests():
            if isinstance(found, Manifest):
                yield found
            else:
                _log.warning("%s", found)

    @abstractmethod
    def place(self, stage: str, key: str) -> str:
        """Where an artifact lies, for people."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises StoreError, naming the place, where nothing can be written."""
