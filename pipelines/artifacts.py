"""The artifact store: what a stage made, found again by what went into it.

An artifact is `<store>/<stage>/<key>/` with a `manifest.json` that lists every file with size and sha256. The manifest is
written last and only if there is none: no manifest, no artifact. Nothing in a store is ever overwritten, so two runs that
make the same artifact at once need no lock: the first manifest wins and the other run adopts it.

This module and s3_store alone know where a store lies. `open_store` turns a URI into one; stages see `ArtifactStore` only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.atomic import copy_if_absent, publish, temporary, write_if_absent
from pipelines.manifest import (
    MANIFEST,
    PARTS,
    USED,
    WORK,
    DamagedFileError,
    DamagedManifestError,
    FileRecord,
    Manifest,
    StoredPath,
    StoreError,
    canonical_json,
    digest_of,
    file_digest,
    is_artifact,
    is_inside,
    part_record,
    paths_of,
    read_use_note,
    use_note,
)
from pipelines.redaction import without_credentials

if TYPE_CHECKING:
    from pipelines.s3 import S3Config

__all__ = [
    "MANIFEST",
    "PARTS",
    "USED",
    "WORK",
    "ArtifactStore",
    "DamagedFileError",
    "DamagedManifestError",
    "FileRecord",
    "LocalStore",
    "Manifest",
    "StoreError",
    "StoredPath",
    "canonical_json",
    "digest_of",
    "file_digest",
    "open_store",
    "part_record",
    "without_credentials",
]

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


class LocalStore(ArtifactStore):
    """A store in a folder that all workers see."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def place(self, stage: str, key: str) -> str:
        return str(self._folder(stage, key))

    def check_writable(self) -> None:
        """Also that a file can be given its name in one step, if the name is free: what a store is never without."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = temporary(self.root / "probe", b"")
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written ({error.strerror}); choose another with store=..."
            ) from error
        named = probe.with_name(f"{probe.name}.named")
        try:
            publish(probe, named)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} lies on a file system without hard links ({error.strerror}), which give files their names"
                " in one step; choose another with store=..."
            ) from error
        named.unlink()

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        path = self._folder(stage, key) / MANIFEST
        try:
            return Manifest.read(path.read_bytes(), path, stage, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DamagedManifestError(f"{path} cannot be read ({error.strerror})", stage, key) from error

    def missing_files(self, manifest: Manifest) -> Iterator[FileRecord]:
        for record in (*manifest.files, *manifest.records):
            try:
                size = (self._folder(manifest.stage, manifest.key) / record.path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                size = None
            if size != record.size:
                yield record

    def _put_manifest(self, manifest: Manifest) -> bool:
        return write_if_absent(self._folder(manifest.stage, manifest.key) / MANIFEST, manifest.to_json())

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        folder = self._folder(stage, key)
        sha256, size = file_digest(source), source.stat().st_size
        for path in paths_of(name, sha256):
            target = folder / path
            if copy_if_absent(source, target) or file_digest(target) == sha256:
                return FileRecord(name=name, path=path, size=size, sha256=sha256)
        raise StoreError(f"{folder / name} is damaged: it does not hold the bytes that its name promises; remove it and run again")

    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        path = self._folder(stage, key) / record.path
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise DamagedFileError(f"{path} is gone, though its manifest lists it", str(path.parent)) from error
        if status.st_size != record.size or _digest_once(path, status.st_size, status.st_mtime_ns) != record.sha256:
            raise DamagedFileError(f"{path} was changed after it was made (its sha256 differs)", str(path.parent))
        return path

    def put_part(self, stage: str, key: str, name: str, record: Mapping[str, Any]) -> None:
        write_if_absent(self._folder(stage, key) / PARTS / f"{name}.json", canonical_json(record))

    def read_parts(self, stage: str, key: str) -> dict[str, dict[str, Any]]:
        records = {}
        for path in sorted((self._folder(stage, key) / PARTS).glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # discarded since it was listed
                if (record := part_record(path.read_bytes(), path)) is None:
                    path.unlink()  # a record is put only where there is none
                else:
                    records[path.stem] = record
        return records

    def discard_part(self, stage: str, key: str, name: str) -> None:
        (self._folder(stage, key) / PARTS / f"{name}.json").unlink(missing_ok=True)

    def discard_files(self, stage: str, key: str, files: Iterable[FileRecord]) -> None:
        for record in files:
            path = self._folder(stage, key) / record.path
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()

    def discard_work(self, stage: str, key: str) -> None:
        for name in (PARTS, WORK):
            shutil.rmtree(self._folder(stage, key) / name, ignore_errors=True)

    def note_use(self, stage: str, key: str, inputs: Iterable[tuple[str, str]] = ()) -> None:
        target = self._folder(stage, key) / USED
        note = temporary(target, use_note(inputs))
        note.chmod(0o644)
        note.replace(target)

    def noted_inputs(self, stage: str, key: str) -> list[tuple[str, str]]:
        try:
            return read_use_note((self._folder(stage, key) / USED).read_bytes())
        except (FileNotFoundError, NotADirectoryError):  # a note that cannot be read is no missing one: gc must not go by it
            return []

    def delete_manifest(self, stage: str, key: str) -> None:
        self.delete_files(stage, key, [MANIFEST])

    def delete_files(self, stage: str, key: str, paths: Iterable[str]) -> None:
        folder = self._folder(stage, key)
        for path in paths:
            assert is_artifact(stage, key) and is_inside(path), (stage, key, path)
            assert not any(parent.is_symlink() for parent in (folder / path).parents if parent.is_relative_to(self.root / stage))
            (folder / path).unlink(missing_ok=True)
            for parent in Path(path).parents:  # of the artifact's folder too, once it is empty
                with contextlib.suppress(OSError):  # not empty, or gone
                    (folder / parent).rmdir()

    def names(self) -> Iterator[tuple[str, str]]:
        for stage in _folders_in(self.root):
            yield from ((stage, key) for key in _folders_in(self.root / stage) if is_artifact(stage, key))

    def folders(self) -> Iterator[tuple[str, str, list[StoredPath]]]:
        for stage, key in self.names():
            if files := self.list_files(stage, key):
                yield stage, key, files

    def list_files(self, stage: str, key: str) -> list[StoredPath]:
        root = self._folder(stage, key)
        if root.is_symlink() or root.parent.is_symlink():
            return []
        found = []
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    status = path.lstat()
                    found.append(StoredPath(path.relative_to(root).as_posix(), status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: file.path)

    def read_chunks(self, stage: str, key: str, path: str) -> Iterator[bytes]:
        with (self._folder(stage, key) / path).open("rb") as file:
            yield from iter(lambda: file.read(1 << 20), b"")


def open_store(uri: str, s3: S3Config | None = None) -> ArtifactStore:
    """A folder's path or s3://bucket/prefix -> the store there. s3: how the bucket is reached; without it, AWS's own settings
    decide. Raises StoreError for a kind of place that no store is written for."""
    if uri.startswith("s3://"):
        from pipelines.s3_store import S3Store

        return S3Store(uri, s3)
    if "://" in uri:
        shown = without_credentials(uri)
        raise StoreError(f"the store {shown} is neither a folder nor s3://bucket/prefix; choose one with store=...")
    return LocalStore(Path(uri))


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, computed once per process for the same path, size and time of change."""
    return file_digest(path)
