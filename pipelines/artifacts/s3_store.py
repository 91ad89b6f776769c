"""The artifact store in a bucket: the contract of ArtifactStore by conditional writes, which S3 decides in one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
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
    StoredPath,
    is_artifact,
    is_inside,
    part_record,
    paths_of,
    read_use_note,
    use_note,
)
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage import cache
from pipelines.storage.base import StorageError, StoredFile, StoreError, canonical_json, file_digest
from pipelines.storage.s3 import S3Folder, in_parallel
from pipelines.storage.s3_client import MissingFileError, S3Config

_READ_AT_ONCE = 256  # manifests


class S3Store(ArtifactStore):
    """A store below s3://bucket/prefix. Files are read through this machine's cache, which checks them."""

    def __init__(self, uri: str, s3: S3Config | None = None) -> None:
        self.folder = S3Folder(uri, s3)
        self.uri = self.folder.uri

    def place(self, stage: str, key: str) -> str:
        return f"{self.uri}/{stage}/{key}"

    def check_writable(self) -> None:
        """Also that a name which is taken is refused: an endpoint that ignored the condition would let runs overwrite others."""
        probe = f".probe-{uuid4().hex}"
        try:
            is_kept = self.folder.put_if_absent(probe, b"first") and not self.folder.put_if_absent(probe, b"second")
            self.folder.delete(probe)
        except StorageError as error:
            raise StoreError(f"the store {self.uri} cannot be written: {error}") from error
        if not is_kept:
            raise StoreError(
                f"the store {self.uri} overwrites what is there (it ignores If-None-Match); choose another with store=..."
            )

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        try:
            content = self.folder.read(f"{stage}/{key}/{MANIFEST}")
        except MissingFileError:
            return None
        return Manifest.read(content, f"{self.place(stage, key)}/{MANIFEST}", stage, key)

    def missing_files(self, manifest: Manifest) -> Iterator[FileRecord]:
        folder = f"{manifest.stage}/{manifest.key}/"
        sizes = {file.name.removeprefix(folder): file.size for file in self.folder.list(folder)}
        yield from (record for record in (*manifest.files, *manifest.records) if sizes.get(record.path) != record.size)

    def _put_manifest(self, manifest: Manifest) -> bool:
        return self.folder.put_if_absent(f"{manifest.stage}/{manifest.key}/{MANIFEST}", manifest.to_json())

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        sha256, size = file_digest(source), source.stat().st_size
        for path in paths_of(name, sha256):
            if self.folder.put_if_absent(f"{stage}/{key}/{path}", source, sha256):
                return FileRecord(name=name, path=path, size=size, sha256=sha256)
        place = f"{self.place(stage, key)}/{name}"
        raise StoreError(f"{place} is damaged: it does not hold the bytes that its name promises; remove it and run again")

    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        name = f"{stage}/{key}/{record.path}"
        suffix = "".join(Path(record.name).suffixes)
        try:
            return cache.fetch(record.sha256, record.size, lambda path: self.folder.download(name, path), suffix)
        except MissingFileError as error:
            reason = "is gone, though its manifest lists it"
            raise DamagedFileError(f"{self.uri}/{name} {reason}", self.place(stage, key)) from error
        except cache.WrongContentError as error:
            reason = "was changed after it was made (its sha256 differs)"
            raise DamagedFileError(f"{self.uri}/{name} {reason}", self.place(stage, key)) from error

    def put_part(self, stage: str, key: str, name: str, record: Mapping[str, Any]) -> None:
        self.folder.put_if_absent(f"{stage}/{key}/{PARTS}/{name}.json", canonical_json(record))

    def read_parts(self, stage: str, key: str) -> dict[str, dict[str, Any]]:
        folder = f"{stage}/{key}/{PARTS}/"
        names = [file.name for file in self.folder.list(folder) if file.name.endswith(".json")]
        records = {}
        for name, content in zip(names, in_parallel(self._read_if_there, names), strict=True):
            if content is None:
                continue
            if (record := part_record(content, f"{self.uri}/{name}")) is None:
                self.folder.delete(name)  # a record is put only where there is none
            else:
                records[name.removeprefix(folder).removesuffix(".json")] = record
        return records

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.folder.read(name)
        except MissingFileError:  # discarded since it was listed
            return None

    def discard_part(self, stage: str, key: str, name: str) -> None:
        self.folder.delete(f"{stage}/{key}/{PARTS}/{name}.json")

    def discard_files(self, stage: str, key: str, files: Iterable[FileRecord]) -> None:
        self.delete_files(stage, key, [record.path for record in files])

    def discard_work(self, stage: str, key: str) -> None:
        for name in (PARTS, WORK):
            self.folder.delete(f"{stage}/{key}/{name}/")

    def note_use(self, stage: str, key: str, inputs: Iterable[tuple[str, str]] = ()) -> None:
        self.folder.put(f"{stage}/{key}/{USED}", use_note(inputs))

    def noted_inputs(self, stage: str, key: str) -> list[tuple[str, str]]:
        content = self._read_if_there(f"{stage}/{key}/{USED}")
        return [] if content is None else read_use_note(content)

    def delete_manifest(self, stage: str, key: str) -> None:
        self.delete_files(stage, key, [MANIFEST])

    def delete_files(self, stage: str, key: str, paths: Iterable[str]) -> None:
        paths = [*paths]
        assert is_artifact(stage, key) and all(is_inside(path) for path in paths), (stage, key, paths)
        self.folder.delete_files(f"{stage}/{key}/{path}" for path in paths)

    def names(self) -> Iterator[tuple[str, str]]:
        """Folders are listed, not what lies in them."""
        for stage in self.folder.folders():
            folder = S3Folder(f"{self.uri}/{stage}", self.folder.config)
            yield from ((stage, key) for key in folder.folders() if is_artifact(stage, key))

    def folders(self) -> Iterator[tuple[str, str, list[StoredPath]]]:
        for place, files in groupby(self.folder.list(), key=lambda file: file.name.split("/", 2)[:2]):
            stage, key = place if len(place) == 2 else ("", "")
            if is_artifact(stage, key):
                paths = [*_paths(files, f"{stage}/{key}/")]
                if paths:
                    yield stage, key, paths

    def list_files(self, stage: str, key: str) -> list[StoredPath]:
        return [*_paths(self.folder.list(f"{stage}/{key}/"), f"{stage}/{key}/")]

    def read_chunks(self, stage: str, key: str, path: str) -> Iterator[bytes]:
        try:
            yield from self.folder.chunks(f"{stage}/{key}/{path}")
        except MissingFileError as error:
            raise FileNotFoundError(f"{self.place(stage, key)}/{path} is gone") from error

    def read_manifests(self, names: Iterable[tuple[str, str]] | None = None) -> Iterator[Manifest | DamagedManifestError]:
        remaining = iter(self.names() if names is None else names)
        while some := [*islice(remaining, _READ_AT_ONCE)]:  # read whole, so that a reader who stops leaves no thread waiting
            yield from [found for found in in_parallel(self._manifest_or_damage, some) if found is not None]


def _paths(files: Iterable[StoredFile], folder: str) -> Iterator[StoredPath]:
    """Objects can be called what files cannot, such as a//b or a/../b: they are nobody's."""
    for file in files:
        path = file.name.removeprefix(folder)
        if is_inside(path):
            yield StoredPath(path, file.size, file.modified)
