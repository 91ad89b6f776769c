"""The small files that a store keeps beside the files of artifacts: manifests, records of parts, records of use.

Each of them is sealed: it holds the sha256 of the rest of its content, so that a flipped bit is found when it is read. Stores are
shared, so somebody else may have written a manifest. It is checked before it is used: no name in it leads out of its artifact's
folder, and it describes the artifact that it is stored with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.storage.base import StorageError, canonical_json, digest_of

Name = tuple[str, str]  # stage, key

MANIFEST = "manifest.json"
PARTS = ".parts"  # one small record per committed shard of an unfinished artifact
WORK = ".work"  # checkpoints and other state of an unfinished artifact
USED = ".used"  # when a run last used the artifact, and the inputs of the artifact
_FORMAT = 2  # 2: sealed. Format 1 is read, and only the digest of its files is compared
_CHECKSUM = "checksum"
_RESERVED = frozenset({MANIFEST, PARTS, WORK, USED})
_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_MAX_NAME, _MAX_PATH = 255, 800  # bytes: of a name in a file system, and of a key in S3 (1,024) below the place of a store
_SHOWN = 80  # letters of a name in a message
_DIGEST_IN_NAME = re.compile(r"\.[0-9a-f]{12}(?=(\.[^/.]+)*$)")  # see paths_of
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedManifestError(StorageError):
    """A manifest cannot be used. inputs: (stage, key) of those inputs that can be made out."""

    def __init__(self, message: str, stage: str = "", key: str = "", inputs: tuple[Name, ...] = ()) -> None:
        super().__init__(message)
        self.stage, self.key, self.inputs = stage, key, inputs


class DamagedFileError(StorageError):
    """A file is gone, or its bytes are not those that were stored. what: the finding, without advice.   place: of the artifact."""

    def __init__(self, what: str, place: str) -> None:
        super().__init__(what, place)  # both, for pickling
        self.what, self.place = what, place

    def __str__(self) -> str:
        return f"{self.what}; remove {self.place} to make the artifact again"


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact. path: in the artifact's folder; usually the name (see ArtifactStore.put_file)."""

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is (stage, key, files), what it was made from, and what it cost.

    records: files about how it was made (a loss history, pictures): kept and verified like files, but not part of the digest.
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

    @property
    def digest(self) -> str:
        """Identifies the content: making the same files again, elsewhere or later, gives the same digest."""
        files = [[record.name, record.size, record.sha256] for record in sorted(self.files, key=lambda record: record.name)]
        return digest_of({"stage": self.stage, "key": self.key, "files": files})

    @property
    def size(self) -> int:
        """Bytes of its files and records."""
        return sum(file.size for file in (*self.files, *self.records))

    def file(self, name: str) -> FileRecord:
        for record in (*self.files, *self.records):
            if record.name == name:
                return record
        names = ", ".join(record.name for record in (*self.files, *self.records))
        raise StorageError(f"artifact {self.stage}/{self.key[:12]} has no file {name!r}; it has {names}")

    def to_json(self) -> bytes:
        fields = {**asdict(self), "digest": self.digest, "format": _FORMAT}
        return json.dumps({**fields, _CHECKSUM: digest_of(fields)}, indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Raises ValueError if the text is not the one that to_json made."""
        fields = json.loads(text)
        format = fields["format"]
        if format not in (1, _FORMAT):
            raise ValueError(f"its format {format!r} is not known to this version of the code")
        fields = _unsealed(fields) if format == _FORMAT else fields
        digest = fields.pop("digest")
        del fields["format"]
        for name in ("files", "records"):
            fields[name] = tuple(FileRecord(**record) for record in fields[name])
        manifest = cls(**fields)
        if manifest.digest != digest:
            raise ValueError("its digest is not that of the files that it lists")
        return manifest

    @classmethod
    def read(cls, text: bytes, place: object, stage: str, key: str) -> Manifest:
        """Parse the manifest that a store has for stage/key. Raises DamagedManifestError, naming the place."""
        fields: Any = None
        try:  # it may not be JSON, or not the JSON of a manifest
            fields = json.loads(text)
            _check(fields, stage, key)
            return cls.from_json(text)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            reason = f"{place} is not a manifest ({error}); move the artifact away to make it again"
            raise DamagedManifestError(reason, stage, key, tuple(_inputs_of(fields))) from error


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The JSON text of a small record, with its checksum."""
    return canonical_json({**fields, _CHECKSUM: digest_of(fields)})


def read_part(content: bytes) -> dict[str, Any] | None:
    """Parse the record of a part; None if it is damaged, or names a file that is not one of its artifact's folder."""
    record = read_sealed(content)
    try:
        for name in {"file", "tensors", "state"} & (record or {}).keys():
            if record is not None and (record[name] is not None or name != "file"):  # a part may have no file
                _check_file(record[name])
                FileRecord(**record[name])
    except (KeyError, TypeError, ValueError):
        return None
    return record


def read_sealed(content: bytes) -> dict[str, Any] | None:
    """Parse what sealed() made; None if it is damaged."""
    try:
        return _unsealed(json.loads(content))
    except (TypeError, AttributeError, ValueError, RecursionError):
        return None


def _unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without their checksum. Raises ValueError if they are not those that were sealed."""
    own = {name: value for name, value in fields.items() if name != _CHECKSUM}
    if digest_of(own) != fields.get(_CHECKSUM):
        raise ValueError("its checksum differs")
    return own


def paths_of(name: str, sha256: str) -> tuple[str, str]:
    """The paths that a file may have: its name, and if other bytes have that, its name with its digest."""
    suffixes = "".join(Path(name).suffixes)
    return name, f"{name.removesuffix(suffixes)}.{sha256[:12]}{suffixes}"


def name_of_path(path: str) -> str:
    """The name of a file that has one of these paths."""
    return _DIGEST_IN_NAME.sub("", path, count=1)


def name_of(manifest: Manifest) -> Name:
    return manifest.stage, manifest.key


def inputs_of(manifest: Manifest) -> list[Name]:
    """Each once, in the order of the manifest."""
    return list(dict.fromkeys((source["stage"], source["key"]) for source in manifest.inputs.values()))


def short(name: Name) -> str:
    return f"{name[0]}/{name[1][:12]}"


def is_stage(name: object) -> bool:
    """Whether this can be the name of a stage. Other folders in a store belong to somebody else."""
    return isinstance(name, str) and bool(_STAGE.fullmatch(name))


def is_artifact(stage: object, key: object) -> bool:
    """Whether these can be a stage and a key."""
    return is_stage(stage) and isinstance(key, str) and bool(_SHA256.fullmatch(key))


def is_inside(path: object) -> bool:
    """Whether a relative path stays below its folder, is written in the one canonical way, and can be the name of a file."""
    if not isinstance(path, str) or "\\" in path or "\0" in path or _num_bytes(path) > _MAX_PATH:
        return False
    return all(part not in ("", ".", "..") and _num_bytes(part) <= _MAX_NAME for part in path.split("/"))


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _check(fields: Any, stage: str, key: str) -> None:
    """Raise ValueError if these fields are not those of a manifest of stage/key."""
    if not isinstance(fields, Mapping):
        raise ValueError("it is not a JSON object")
    described = fields.get("stage"), fields.get("key")
    if described != (stage, key):
        raise ValueError(f"it describes {described[0]}/{described[1]}")
    for file in (*fields["files"], *fields["records"]):
        _check_file(file)
        for place in (file["name"], file["path"]):
            if place.split("/")[0] in _RESERVED:
                raise ValueError(f"it lists a file called {place!r}")
    for name, source in fields["inputs"].items():
        if not is_artifact(source["stage"], source["key"]) or not isinstance(source["digest"], str):
            raise ValueError(f"its input {name} is not an artifact")
    for name in ("config", "summary", "metrics", "provenance"):
        if not isinstance(fields[name], Mapping):
            raise ValueError(f"its {name} is not a JSON object")
    for name, value in fields["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"its metric {name} is not a number")


def _check_file(file: Any) -> None:
    """Raise ValueError if the fields of a FileRecord are not valid, or lead out of the artifact's folder."""
    for place in (file["name"], file["path"]):
        if not is_inside(place):
            raise ValueError(f"it lists a file called {place[:_SHOWN] if isinstance(place, str) else place!r}")
    size = file["size"]
    if not isinstance(size, int) or size < 0 or not isinstance(file["sha256"], str) or not _SHA256.fullmatch(file["sha256"]):
        raise ValueError(f"size or sha256 of {file['name']} is not valid")


def _inputs_of(fields: Any) -> Iterator[Name]:
    """Those inputs that can be made out even if the rest cannot, for example in a newer format."""
    inputs = fields.get("inputs") if isinstance(fields, Mapping) else None
    for source in inputs.values() if isinstance(inputs, Mapping) else ():
        if isinstance(source, Mapping) and is_artifact(source.get("stage"), source.get("key")):
            yield source["stage"], source["key"]
