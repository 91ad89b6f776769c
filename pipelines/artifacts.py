"""The artifact store: what a stage made, found again by what went into it.

An artifact is `<store>/<stage>/<key>/` with a `manifest.json` that lists every file with size and sha256. The manifest is
written last and only if there is none: no manifest, no artifact. Nothing in a store is ever overwritten, so two runs that
make the same artifact at once need no lock: the first manifest wins and the other run adopts it.

This module and s3_store alone know where a store lies. `open_store` turns a URI into one; stages see `ArtifactStore` only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.s3 import S3Config

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTS = ".parts"  # one small record per committed shard of an unfinished artifact
WORK = ".work"  # checkpoints and other state of an unfinished artifact


class StoreError(ValueError):
    """The store cannot do what was asked: a place that cannot be written, a file that is not what its manifest says."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value, for hashing. NaN is refused, because it equals nothing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact. path: where it lies under the artifact; usually its name (see ArtifactStore.put_file)."""

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is (stage, key, files), what it was made from, and what making it took.

    records: files that tell how it was made (a loss history, pictures): kept and verified like files, but no part of the digest.
    inputs: name -> {"stage", "key", "digest"}.   summary: facts about the content (rows, classes, grid, ...).
    metrics: measured numbers.   provenance: created (UTC), code version, seconds: never part of a digest.
    """

    stage: str
    key: str
    stage_version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    files: tuple[FileRecord, ...]
    records: tuple[FileRecord, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format: int = 1

    @property
    def digest(self) -> str:
        """Names the content: making the same files again, elsewhere or later, gives the same digest."""
        files = [[record.name, record.size, record.sha256] for record in sorted(self.files, key=lambda record: record.name)]
        return digest_of({"stage": self.stage, "key": self.key, "files": files})

    def file(self, name: str) -> FileRecord:
        for record in (*self.files, *self.records):
            if record.name == name:
                return record
        names = ", ".join(record.name for record in (*self.files, *self.records))
        raise StoreError(f"artifact {self.stage}/{self.key[:12]} has no file {name!r}; it has {names}")

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        fields = json.loads(text)
        fields.pop("digest")
        for name in ("files", "records"):
            fields[name] = tuple(FileRecord(**record) for record in fields[name])
        return cls(**fields)

    @classmethod
    def read(cls, text: bytes, place: object) -> Manifest:
        """The same for what lies in a store. Raises StoreError, naming the place, for what is no manifest."""
        try:
            return cls.from_json(text)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # no JSON, or other JSON than a manifest's
            raise StoreError(f"{place} is not a manifest ({error}); move the artifact away to make it again") from error


def part_record(content: bytes, place: object) -> dict[str, Any] | None:
    """What put_part wrote. None, with a warning, for what a machine that lost its power may have left: the part is made again."""
    try:
        record = json.loads(content)
        if isinstance(record, dict):
            return record
    except ValueError:
        pass
    _log.warning("the record %s is damaged; its part is made again", place)
    return None


def paths_of(name: str, sha256: str) -> tuple[str, str]:
    """Where a file may lie: under its name, and where other bytes lie there, under the name with its digest."""
    suffixes = "".join(Path(name).suffixes)
    return name, f"{name.removesuffix(suffixes)}.{sha256[:12]}{suffixes}"


def without_credentials(uri: str) -> str:
    """A URI for showing, without user and password. Cuts at the last @, since a password may hold one, or a slash."""
    return re.sub(r"://\S*@", "://", uri)


class ArtifactStore(ABC):
    """Artifacts by (stage, key). Safe to send to workers; they write parts and files directly."""

    uri: str

    @abstractmethod
    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """The committed manifest, or None where the artifact does not exist (yet)."""

    @abstractmethod
    def commit(self, manifest: Manifest) -> Manifest:
        """Make the artifact exist. Returns the manifest that counts: an earlier one, where another run was first."""

    @abstractmethod
    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        """Store a file, never overwriting: where the name is taken by other bytes (another run of a stage that is not
        deterministic), it lies under a path with its digest, and the manifest of each run names its own."""

    @abstractmethod
    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        """A local path of a file whose bytes were checked against its record. Raises StoreError where they differ."""

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
    def manifests(self) -> Iterator[Manifest]:
        """All committed artifacts."""

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
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written ({error.strerror}); choose another with store=..."
            ) from error

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        path = self._folder(stage, key) / MANIFEST
        try:
            return Manifest.read(path.read_bytes(), path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def commit(self, manifest: Manifest) -> Manifest:
        folder = self._folder(manifest.stage, manifest.key)
        for record in (*manifest.files, *manifest.records):
            assert (folder / record.path).stat().st_size == record.size, record
        if not _write_if_absent(folder / MANIFEST, manifest.to_json()):
            committed = self.read_manifest(manifest.stage, manifest.key)
            assert committed is not None
            return committed
        return manifest

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        folder = self._folder(stage, key)
        sha256, size = file_digest(source), source.stat().st_size
        for path in paths_of(name, sha256):
            target = folder / path
            if _copy_if_absent(source, target) or file_digest(target) == sha256:
                return FileRecord(name=name, path=path, size=size, sha256=sha256)
        raise StoreError(f"{folder / name} is damaged: it does not hold the bytes that its name promises; remove it and run again")

    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        path = self._folder(stage, key) / record.path
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} is gone, though its manifest lists it; remove {path.parent} to make the artifact again"
            ) from error
        if status.st_size != record.size or _digest_once(path, status.st_size, status.st_mtime_ns) != record.sha256:
            raise StoreError(
                f"{path} was changed after it was made (its sha256 differs); remove {path.parent} to make the artifact again"
            )
        return path

    def put_part(self, stage: str, key: str, name: str, record: Mapping[str, Any]) -> None:
        _write_if_absent(self._folder(stage, key) / PARTS / f"{name}.json", canonical_json(record))

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

    def manifests(self) -> Iterator[Manifest]:
        for path in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            manifest = self.read_manifest(path.parent.parent.name, path.parent.name)
            if manifest is not None:
                yield manifest


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


def _copy_if_absent(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as copy:
        with source.open("rb") as original:
            shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    return _publish(Path(copy.name), target)


def _write_if_absent(target: Path, content: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _publish(Path(file.name), target)


def _publish(temporary: Path, target: Path) -> bool:
    """Give a finished temporary file its name, in one step, only if the name is free."""
    temporary.chmod(0o644)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


@cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, computed once per process for the same path, size and time of change."""
    return file_digest(path)
