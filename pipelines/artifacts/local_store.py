"""An artifact store in a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

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
from pipelines.storage.atomic import copy_if_absent, publish, temporary, write_if_absent
from pipelines.storage.base import StoreError, canonical_json, file_digest


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


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, computed once per process for the same path, size and time of change."""
    return file_digest(path)
