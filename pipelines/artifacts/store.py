"""The artifact store: what a stage made, found again by what went into it.

An artifact is the folder `<store>/<stage>/<key>/` with a `manifest.json` that lists every file with its size and sha256. The
manifest is written last, and only if the artifact has none yet: without a manifest the artifact does not exist. Files are never
overwritten, so two runs that make the same artifact at once need no lock: the first manifest wins and the other run adopts it.

The store knows nothing of the kind of folder that it is in (see storage/base.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipelines.artifacts.manifest import (
    MANIFEST,
    PARTS,
    USED,
    WORK,
    DamagedFileError,
    DamagedManifestError,
    FileRecord,
    Manifest,
    Name,
    is_artifact,
    is_inside,
    is_stage,
    name_of_path,
    paths_of,
    read_part,
    read_sealed,
    sealed,
)
from pipelines.storage.base import (
    Folder,
    MissingFileError,
    StorageError,
    StoredFile,
    WrongContentError,
    file_digest,
    in_parallel,
)

_log = logging.getLogger(__name__)


class ArtifactStore:
    """Artifacts by (stage, key). A store can be sent to workers, which write parts and files directly."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.uri = folder.uri

    def place(self, stage: str, key: str) -> str:
        """Path or URI of an artifact, for people."""
        return f"{self.uri}/{stage}/{key}"

    def check_writable(self) -> None:
        """Raise StorageError, naming the place, if nothing can be written, or if a name that is taken can be written again."""
        probe = f".probe-{uuid4().hex}"
        try:
            is_kept = self.folder.put_if_absent(probe, b"first") and not self.folder.put_if_absent(probe, b"second")
            self.folder.delete([probe])
        except (OSError, StorageError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StorageError(f"the store {self.uri} cannot be written: {reason}; choose another with store=...") from error
        if not is_kept:
            raise StorageError(
                f"the store {self.uri} overwrites existing files (it ignores If-None-Match); choose another with store=..."
            )

    # Manifests -----------------------------------------------------------------------------------------------------------------

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """Return the committed manifest, or None if the artifact does not exist (yet)."""
        place = f"{self.place(stage, key)}/{MANIFEST}"
        try:
            content = self.folder.read(f"{stage}/{key}/{MANIFEST}")
        except MissingFileError:
            return None
        except StorageError as error:
            if isinstance(error.__cause__, OSError):  # this file cannot be read from the disk; others may be whole
                raise DamagedManifestError(str(error), stage, key) from error.__cause__
            raise
        return Manifest.read(content, place, stage, key)

    def read_input(self, manifest: Manifest, name: str) -> Manifest | None:
        """Return the manifest of an input, or None if there is no such input or the store no longer has it."""
        source = manifest.inputs.get(name)
        return None if source is None else self.read_manifest(source["stage"], source["key"])

    def read_manifests(
        self, names: Iterable[Name] | None = None, *, is_complete: bool = True
    ) -> Iterator[Manifest | DamagedManifestError]:
        """Read the manifests of these artifacts, or of all. A damaged manifest is replaced by its error.

        is_complete: if False, a manifest that cannot be read is replaced by an error, too, and does not end the reading.
        """

        def read(name: Name) -> Manifest | DamagedManifestError | None:
            try:
                return self.read_manifest(*name)
            except DamagedManifestError as error:
                return error
            except StorageError as error:
                if is_complete:
                    raise
                damaged = DamagedManifestError(f"{MANIFEST} cannot be read ({error})", *name)
                damaged.__cause__ = error
                return damaged

        wanted = self.names() if names is None else names
        # Threads wait for a bucket; beside a local disk they only take turns.
        results = in_parallel(read, wanted) if self.folder.is_remote else map(read, wanted)
        yield from (found for found in results if found is not None)

    def manifests(self) -> Iterator[Manifest]:
        """Read all committed artifacts, with a warning for each damaged manifest."""
        for found in self.read_manifests():
            if isinstance(found, Manifest):
                yield found
            else:
                _log.warning("%s", found)

    def commit(self, manifest: Manifest) -> Manifest:
        """Make the artifact exist. Returns the manifest that counts: an earlier one if another run was first.

        Raises MissingFileError if files of it are missing. A removal looks for a manifest after it removed files, and a commit
        looks for the files after it wrote the manifest: if the two overlap, at least one of them detects the other.
        """
        name = manifest.stage, manifest.key
        self._check_files(manifest)
        if not self._put_manifest(manifest):
            if (committed := self.read_manifest(*name)) is None:
                raise MissingFileError(f"{self.place(*name)} was removed while it was being made; run again")
            return committed
        try:
            self._check_files(manifest)
        except MissingFileError:
            with contextlib.suppress(ValueError, OSError):  # without the right to remove it, the message asks to have it removed
                self.delete_manifest(*name)
            raise
        return manifest

    def _put_manifest(self, manifest: Manifest) -> bool:
        return self.folder.put_if_absent(f"{manifest.stage}/{manifest.key}/{MANIFEST}", manifest.to_json())

    def _check_files(self, manifest: Manifest) -> None:
        place = self.place(manifest.stage, manifest.key)
        for record in self.missing_files(manifest):
            raise MissingFileError(
                f"{place}/{record.path} was removed or truncated before the artifact was complete; remove {place} and run again"
            )

    def missing_files(self, manifest: Manifest) -> Iterator[FileRecord]:
        """Files and records of an artifact, committed or not, that the store does not have in their full size."""
        folder = f"{manifest.stage}/{manifest.key}/"
        sizes = {file.name.removeprefix(folder): file.size for file in self.folder.list(folder)}
        yield from (record for record in (*manifest.files, *manifest.records) if sizes.get(record.path) != record.size)

    def delete_manifest(self, stage: str, key: str) -> None:
        """Make the artifact not exist any more. Its files stay."""
        self.delete_files(stage, key, [MANIFEST])

    # Files ---------------------------------------------------------------------------------------------------------------------

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        """Store a file without overwriting another.

        If the name is taken by other bytes (of another run of a stage that is not deterministic), the file gets a path with its
        digest, and the manifest of each run names its own.
        """
        sha256, size = file_digest(source), source.stat().st_size
        for path in paths_of(name, sha256):
            if self.folder.put_if_absent(f"{stage}/{key}/{path}", source, sha256):
                return FileRecord(name=name, path=path, size=size, sha256=sha256)
        place = f"{self.place(stage, key)}/{name}"
        raise StorageError(f"{place} is damaged: its bytes differ from the digest in its name; remove it and run again")

    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        """Return a local path of a file after its bytes were checked against its record.

        Raises DamagedFileError if they differ, and another StorageError if they cannot be read.
        """
        name = f"{stage}/{key}/{record.path}"
        try:
            return self.folder.fetch(name, record.size, record.sha256)
        except MissingFileError as error:
            reason = "is gone, though its manifest lists it"
            raise DamagedFileError(f"{self.uri}/{name} {reason}", self.place(stage, key)) from error
        except WrongContentError as error:
            reason = "was changed after it was made (its sha256 differs)"
            raise DamagedFileError(f"{self.uri}/{name} {reason}", self.place(stage, key)) from error

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """The same for a file of a committed artifact."""
        return self.fetch_file(manifest.stage, manifest.key, manifest.file(name))

    def read_chunks(self, stage: str, key: str, path: str) -> Iterator[bytes]:
        """Read a file as it is now, past every cache and check. Raises MissingFileError."""
        return self.folder.chunks(f"{stage}/{key}/{path}")

    def delete_files(self, stage: str, key: str, paths: Iterable[str]) -> None:
        """Remove exactly these files of an artifact, which is not behind a link. Files that do not exist are skipped."""
        paths = [*paths]
        assert is_artifact(stage, key) and all(is_inside(path) for path in paths), (stage, key, paths)
        self.folder.delete([f"{stage}/{key}/{path}" for path in paths], follow_links=False)

    # Unfinished artifacts ------------------------------------------------------------------------------------------------------

    def put_part(self, stage: str, key: str, name: str, record: Mapping[str, Any]) -> None:
        """Record that a part of an unfinished artifact is done. Its files must have been put before."""
        self.folder.put_if_absent(f"{stage}/{key}/{PARTS}/{name}.json", sealed(record))

    def read_parts(self, stage: str, key: str) -> dict[str, dict[str, Any]]:
        """Read the records of the parts that are done, by name, sorted. A damaged record is removed, with a warning."""
        folder = f"{stage}/{key}/{PARTS}/"
        names = [file.name for file in self.folder.list(folder) if file.name.endswith(".json")]
        records = {}
        for name, content in zip(names, in_parallel(self.folder.read_if_exists, names), strict=True):
            if content is None:
                continue  # discarded since it was listed
            if (record := read_part(content)) is None:
                _log.warning("the record %s/%s is damaged; its part is made again", self.uri, name)
                self.folder.delete([name])  # else the part could not be recorded again
            else:
                records[name.removeprefix(folder).removesuffix(".json")] = record
        return records

    def resume_parts(self, stage: str, key: str) -> dict[str, dict[str, Any]]:
        """The same for a run that resumes: the bytes of the file of each part are compared with its sha256.

        A part whose file is damaged or gone is discarded, with a warning, and is made again.
        """
        records = self.read_parts(stage, key)
        files = {name: FileRecord(**record["file"]) for name, record in records.items() if record.get("file")}

        def damage(file: FileRecord) -> DamagedFileError | None:
            try:
                self.fetch_file(stage, key, file)
            except DamagedFileError as error:
                return error
            return None

        for name, error in zip(files, in_parallel(damage, files.values()), strict=True):
            if error is not None:
                _log.warning("%s; its part is made again", error.what)
                self.discard_part(stage, key, name)
                self.discard_files(stage, key, [files[name]])
                del records[name]
        return records

    def discard_part(self, stage: str, key: str, name: str) -> None:
        """Take back the record of a part. Its files may be discarded afterwards."""
        self.folder.delete([f"{stage}/{key}/{PARTS}/{name}.json"])

    def discard_files(self, stage: str, key: str, files: Iterable[FileRecord]) -> None:
        """Remove files of an unfinished artifact that no record names any more."""
        self.folder.delete([f"{stage}/{key}/{record.path}" for record in files])

    def discard_work(self, committed: Manifest) -> None:
        """Remove part records, working state, and files of other runs that made the same, once the artifact is committed."""
        own, folder = (*committed.files, *committed.records), f"{committed.stage}/{committed.key}/"
        named, paths = {record.name for record in own}, {record.path for record in own}

        def is_left(path: str) -> bool:
            return path.startswith((f"{PARTS}/", f"{WORK}/")) or (path not in paths and name_of_path(path) in named)

        left = [path for file in self.folder.list(folder) if is_left(path := file.name.removeprefix(folder))]
        left.sort(key=lambda path: not path.startswith(f"{PARTS}/"))  # records before the files that they name
        self.folder.delete([folder + path for path in left])

    # Use -----------------------------------------------------------------------------------------------------------------------

    def record_use(self, stage: str, key: str, inputs: Iterable[Name] = ()) -> None:
        """Record that a run is about to reuse or make an artifact, before it looks whether the artifact exists: see garbage.py.

        inputs: (stage, key) of the artifacts that it is made from.
        """
        self.folder.put(f"{stage}/{key}/{USED}", sealed({"inputs": sorted(set(inputs))}))

    def recorded_inputs(self, stage: str, key: str) -> list[Name] | None:
        """Inputs that the last use recorded; empty if nothing was recorded, None if the record is damaged."""
        if (content := self.folder.read_if_exists(f"{stage}/{key}/{USED}")) is None:
            return []
        record = read_sealed(content)
        try:
            return None if record is None else [(stage, key) for stage, key in record["inputs"] if is_artifact(stage, key)]
        except (KeyError, TypeError, ValueError):
            return None

    # Listing -------------------------------------------------------------------------------------------------------------------

    def names(self) -> Iterator[Name]:
        """(stage, key) of everything that is named like an artifact, committed or not, in order."""
        for stage in self._stages():
            yield from ((stage, key) for key in self.keys(stage))

    def keys(self, stage: str) -> list[str]:
        """Of all that is named like an artifact of a stage, committed or not, in order."""
        return [key for key in self.folder.folders(f"{stage}/") if is_artifact(stage, key)]

    def folders(self) -> Iterator[tuple[str, str, list[StoredFile]]]:
        """The same with all files, without those behind a link."""
        for stage in self._stages():
            files = self.folder.list(f"{stage}/", follow_links=False)
            for key, some in groupby(files, key=lambda file: file.name.split("/")[1]):
                if is_artifact(stage, key) and (own := [*_relative(some, f"{stage}/{key}/")]):
                    yield stage, key, own

    def _stages(self) -> list[str]:
        return [name for name in self.folder.folders() if is_stage(name)]

    def list_files(self, stage: str, key: str) -> list[StoredFile]:
        """All files of an artifact's folder, with names relative to it; empty if it does not exist or is behind a link."""
        return [*_relative(self.folder.list(f"{stage}/{key}/", follow_links=False), f"{stage}/{key}/")]


def _relative(files: Iterable[StoredFile], folder: str) -> Iterator[StoredFile]:
    """Objects can have names that files cannot, such as a//b or a/../b. No store wrote them."""
    for file in files:
        name = file.name.removeprefix(folder)
        if is_inside(name):
            yield replace(file, name=name)
