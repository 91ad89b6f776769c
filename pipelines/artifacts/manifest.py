"""What stands in a store beside the files of artifacts: manifests, records of parts, notes of use.

Stores are shared, so a manifest may say what somebody else wrote. Nothing in one is believed before it is checked: no name in it
leads out of its artifact's folder, and it speaks of the artifact that it lies with.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.storage.base import StoreError, canonical_json, digest_of

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTS = ".parts"  # one small record per committed shard of an unfinished artifact
WORK = ".work"  # checkpoints and other state of an unfinished artifact
USED = ".used"  # when a run last asked for the artifact, and what it is made from
_RESERVED = frozenset({MANIFEST, PARTS, WORK, USED})
_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedManifestError(StoreError):
    """What lies in a manifest's place is none that can be believed. inputs: (stage, key) of what it can be seen to be made from."""

    def __init__(self, message: str, stage: str = "", key: str = "", inputs: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.stage, self.key, self.inputs = stage, key, inputs


class DamagedFileError(StoreError):
    """The bytes of a file are gone, or not those that were put there. what: the finding, without the advice that goes with it for
    an artifact.   place: of the artifact."""

    def __init__(self, what: str, place: str) -> None:
        super().__init__(what, place)  # so that it survives pickling
        self.what, self.place = what, place

    def __str__(self) -> str:
        return f"{self.what}; remove {self.place} to make the artifact again"


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact. path: where it lies under the artifact; usually its name (see ArtifactStore.put_file)."""

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoredPath:
    """A file as it lies in an artifact's folder. modified: seconds since 1970, by the store's own clock."""

    path: str
    size: int
    modified: float


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
    def read(cls, text: bytes, place: object, stage: str, key: str) -> Manifest:
        """The same for what lies in a store as the manifest of stage/key. Raises DamagedManifestError, naming the place."""
        fields: Any = None
        try:  # it may be no JSON, or other JSON than a manifest's
            fields = json.loads(text)
            _check(fields, stage, key)
            return cls.from_json(text)
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            RecursionError,
        ) as error:
            reason = f"{place} is not a manifest ({error}); move the artifact away to make it again"
            raise DamagedManifestError(reason, stage, key, tuple(_inputs_of(fields))) from error


def part_record(content: bytes, place: object) -> dict[str, Any] | None:
    """What put_part wrote. None, with a warning, for what a machine that lost its power may have left: the part is made again."""
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    _log.warning("the record %s is damaged; its part is made again", place)
    return None


def use_note(inputs: Iterable[tuple[str, str]]) -> bytes:
    """The content of a note of use."""
    return canonical_json({"inputs": sorted(set(inputs))})


def read_use_note(content: bytes) -> list[tuple[str, str]]:
    """The inputs that it names; a note that cannot be read names none."""
    try:
        return [(stage, key) for stage, key in json.loads(content)["inputs"] if is_artifact(stage, key)]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def paths_of(name: str, sha256: str) -> tuple[str, str]:
    """Where a file may lie: under its name, and where other bytes lie there, under the name with its digest."""
    suffixes = "".join(Path(name).suffixes)
    return name, f"{name.removesuffix(suffixes)}.{sha256[:12]}{suffixes}"


def is_artifact(stage: object, key: object) -> bool:
    """Whether these can be a stage and a key. Folders that are called otherwise are somebody else's."""
    return isinstance(stage, str) and isinstance(key, str) and bool(_STAGE.fullmatch(stage) and _SHA256.fullmatch(key))


def is_inside(path: object) -> bool:
    """Whether a path stays below the folder that it is relative to, and is the one way to write it."""
    if not isinstance(path, str) or "\\" in path or "\0" in path:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _check(fields: Any, stage: str, key: str) -> None:
    """fields: of the JSON that lies with artifact stage/key.

    Raises ValueError, saying what is wrong.
    """
    if not isinstance(fields, Mapping):
        raise ValueError("it is no JSON object")
    said = fields.get("stage"), fields.get("key")
    if said != (stage, key):
        raise ValueError(f"it speaks of {said[0]}/{said[1]}")
    for file in (*fields["files"], *fields["records"]):
        for place in (file["name"], file["path"]):
            if not is_inside(place) or place.split("/")[0] in _RESERVED:
                raise ValueError(f"it lists a file called {place!r}")
        size = file["size"]
        if not isinstance(size, int) or size < 0 or not isinstance(file["sha256"], str) or not _SHA256.fullmatch(file["sha256"]):
            raise ValueError(f"size or sha256 of {file['name']} are none")
    for name, source in fields["inputs"].items():
        if not is_artifact(source["stage"], source["key"]) or not isinstance(source["digest"], str):
            raise ValueError(f"its input {name} is no artifact")
    for name in ("config", "summary", "metrics", "provenance"):
        if not isinstance(fields[name], Mapping):
            raise ValueError(f"its {name} is no JSON object")


def _inputs_of(fields: Any) -> Iterator[tuple[str, str]]:
    """(stage, key) of those inputs that can be made out, also where the rest cannot: of a newer format, say."""
    inputs = fields.get("inputs") if isinstance(fields, Mapping) else None
    for source in inputs.values() if isinstance(inputs, Mapping) else ():
        if isinstance(source, Mapping) and is_artifact(source.get("stage"), source.get("key")):
            yield source["stage"], source["key"]


Name = tuple[str, str]  # stage, key


def name_of(manifest: Manifest) -> Name:
    return manifest.stage, manifest.key


def inputs_of(manifest: Manifest) -> list[Name]:
    """Each once, in the order of the manifest."""
    return list(dict.fromkeys((source["stage"], source["key"]) for source in manifest.inputs.values()))


def short(name: Name) -> str:
    return f"{name[0]}/{name[1][:12]}"
