"""A store in a folder and one in a bucket, for tests that hold for every kind of folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from material.summaries import summary_of
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.s3 import S3Folder
from services.s3_server import SECOND

STAGE, KEY = "train", "ab" * 32  # of artifacts of which only one is needed


@dataclass(frozen=True)
class Place:
    """A store under test, with ways to look at all of its files and to damage them.

    age: sets the time of files whose names begin with a prefix to so many seconds ago.
    """

    store: ArtifactStore
    contents: Callable[[], dict[str, bytes]]
    damage: Callable[[str, bytes | None], None]  # None removes the file
    age: Callable[[str, float], None]
    rounds: int = 50  # of a race; fewer where each takes longer


def open_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place that the parameter of a fixture names: "folder" or "bucket"."""
    if request.param == "folder":
        return folder_place(tmp_path / "store")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    return bucket_place(request.getfixturevalue("make_bucket")())


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def manifest_of(*files: FileRecord, key: str = KEY, **fields: Any) -> Manifest:
    return Manifest(stage=STAGE, key=key, stage_version=1, config={"width": 8}, inputs={}, files=files, **fields)


def make(store: ArtifactStore, place: str, *inputs: Manifest, files: Mapping[str, bytes] | None = None, **fields: Any) -> Manifest:
    """Commit an artifact. place: "stage/name"; the name becomes a key.   files: one file by default."""
    stage, _, name = place.partition("/")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (files if files is not None else {"file.bin": place.encode()}).items():
            source = Path(folder) / "source"
            source.write_bytes(content)
            records.append(store.put_file(stage, key_of(name), file, source))
    sources = {f"{source.stage}_{number}": source for number, source in enumerate(inputs)}
    values: dict[str, Any] = {
        "stage_version": 1,
        "config": {},
        "inputs": {role: {"stage": m.stage, "key": m.key, "digest": m.digest} for role, m in sources.items()},
        "files": tuple(records),
        **fields,
    }
    return store.commit(Manifest(stage=stage, key=key_of(name), **values))


def make_chain(store: ArtifactStore) -> SimpleNamespace:
    """A dataset, a tokenizer and a map of it, two trainings on the map, and samples and scores of the first."""
    made = SimpleNamespace()
    made.dataset = make(store, "dataset/d", summary=summary_of("dataset", num_images=5, class_names=["[red]"]))
    made.tokenizer = make(store, "tokenizer/t", made.dataset)
    made.map = make(store, "token_map/m", made.dataset, made.tokenizer)
    made.first, made.second = (make(store, f"train/{name}", made.map, made.tokenizer) for name in ("first", "second"))
    made.samples = make(store, "generate/g", made.first)
    made.scores = make(store, "evaluate/e", made.samples, made.first)
    return made


def folder_place(root: Path) -> Place:
    def contents() -> dict[str, bytes]:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    def damage(name: str, content: bytes | None) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)

    def age(prefix: str, seconds: float) -> None:
        then = time.time() - seconds
        for path in root.rglob("*"):
            if path.relative_to(root).as_posix().startswith(prefix) and path.is_file():
                os.utime(path, (then, then))

    return Place(open_store(str(root)), contents, damage, age)


def bucket_place(folder: S3Folder) -> Place:
    import boto3

    store, client = open_store(f"{folder.uri}/store", folder.config), boto3.client("s3")
    bucket = store.uri.removeprefix("s3://").partition("/")[0]

    def contents() -> dict[str, bytes]:
        inside = S3Folder(store.uri, folder.config)
        return {file.name: inside.read(file.name) for file in inside.list()}

    def damage(name: str, content: bytes | None) -> None:
        target = {"Bucket": bucket, "Key": f"store/{name}"}
        if content is None:
            client.delete_object(**target)
        else:
            client.put_object(**target, Body=content)

    def age(prefix: str, seconds: float) -> None:
        if SECOND:
            pytest.skip("the times of the second server cannot be set")
        from moto.s3.models import s3_backends

        then = datetime.fromtimestamp(time.time() - seconds, UTC)
        for name, stored in s3_backends["123456789012"]["global"].buckets[bucket].keys.items():
            if name.startswith(f"store/{prefix}"):
                stored.last_modified = then

    return Place(store, contents, damage, age, rounds=12)
