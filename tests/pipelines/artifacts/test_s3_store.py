"""A store in a bucket, beyond the contract of test_artifacts.py: a cache that checks, and answers that get lost."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from material.places import KEY, STAGE, manifest_of
from pipelines.artifacts import transfer
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError
from pipelines.storage.s3 import S3Folder
from pipelines.workflow import driver
from pipelines.workflow.stage import Node, Stage, StageContext, StageResult
from services.s3_server import S3Endpoint


@pytest.fixture
def store(make_bucket: Callable[..., S3Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    folder = make_bucket("team/store")
    store = open_store(folder.uri, folder.config)
    return store


@pytest.fixture
def record(store: ArtifactStore, tmp_path: Path) -> FileRecord:
    (tmp_path / "source").write_bytes(b"weights")
    return store.put_file(STAGE, KEY, "model.bin", tmp_path / "source")


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(
    store: ArtifactStore, record, s3_endpoint: S3Endpoint, tmp_path
) -> None:
    path = store.fetch_file(STAGE, KEY, record)
    before = len(s3_endpoint.requests)
    assert store.fetch_file(STAGE, KEY, record) == path and len(s3_endpoint.requests) == before
    assert path.is_relative_to(tmp_path / "cache") and path.suffix == ".bin" and path.read_bytes() == b"weights"
    path.write_bytes(b"weightz")
    assert store.fetch_file(STAGE, KEY, record).read_bytes() == b"weights", "a damaged copy is fetched again"


def test_a_commit_whose_answer_is_lost_succeeds_or_adopts_an_earlier_one(store: ArtifactStore, record, s3_endpoint) -> None:
    manifest = manifest_of(record, provenance={"run": 1})
    for offered in (manifest, manifest_of(record, provenance={"run": 2})):
        with s3_endpoint.fault("PUT", "manifest.json", lose=True) as fault:
            assert store.commit(offered) == manifest == store.read_manifest(STAGE, KEY)
        assert fault.times == 0


def test_more_files_than_one_request_takes_are_deleted(store: ArtifactStore, s3_endpoint: S3Endpoint) -> None:
    names = [f"{number:04d}" for number in range(1001)]
    s3_endpoint.fill(store.folder, {f"{STAGE}/{KEY}/{name}": b"" for name in (*names, "kept")})
    before = len(s3_endpoint.requests)
    store.delete_files(STAGE, KEY, names)
    assert len(s3_endpoint.requests) - before == 2
    assert [file.name for file in store.list_files(STAGE, KEY)] == ["kept"]
    fault = s3_endpoint.fault("POST", "delete", status="403 Forbidden", code="AccessDenied", times=9)
    with fault, pytest.raises(StorageError, match="no permission to delete it"):
        store.delete_files(STAGE, KEY, ["kept"])
    assert [file.name for file in store.list_files(STAGE, KEY)] == ["kept"]


def test_objects_with_names_that_files_cannot_have_are_ignored(store: ArtifactStore, s3_endpoint: S3Endpoint) -> None:
    s3_endpoint.fill(store.folder, {f"{STAGE}/{KEY}/{name}": b"" for name in ("a//b", "a/../../b", "./c", "good")})
    assert [file.name for file in store.list_files(STAGE, KEY)] == ["good"]
    assert [[file.name for file in files] for _, _, files in store.folders()] == [["good"]]


def test_manifests_are_read_many_at_once_and_in_order(store: ArtifactStore, s3_endpoint: S3Endpoint, monkeypatch) -> None:
    manifests = [replace(manifest_of(), stage=stage, key=f"{key:064x}") for stage in ("evaluate", "train") for key in range(48)]
    s3_endpoint.fill(store.folder, {f"{each.stage}/{each.key}/manifest.json": each.to_json() for each in manifests})
    read, twelve = S3Folder.read, threading.Barrier(12)

    def wait_for_others(self: S3Folder, name: str, *arguments: Any) -> bytes:
        twelve.wait(timeout=60)
        return read(self, name, *arguments)

    monkeypatch.setattr(S3Folder, "read", wait_for_others)
    assert list(store.manifests()) == manifests


def test_a_store_is_opened_by_its_uri_and_travels_to_workers(store: ArtifactStore, record) -> None:
    """Without a configuration, the endpoint is that of the environment."""
    for same in (open_store(f"{store.uri}/"), pickle.loads(pickle.dumps(store))):
        assert same.uri == store.uri and same.place(STAGE, KEY) == f"{store.uri}/{STAGE}/{KEY}"
        assert same.fetch_file(STAGE, KEY, record).read_bytes() == b"weights"


# Users that share a bucket ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoConfig:
    """Of stages that only join what they read."""


def _write(config: NoConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    read = "".join(context.store.fetch(manifest, "text").read_text() for manifest in inputs.values())
    return StageResult(files=[context.write("text", lambda path: path.write_text(f"{read}{context.stage} "))])


def _nodes(run: Callable[..., StageResult]) -> list[Node]:
    chain = ["dataset", "token_map", "train"]
    sources: list[dict[str, str]] = [{}, {"dataset": "dataset"}, {"token_map": "token_map", "dataset": "dataset"}]
    return [Node(name, Stage(name, 1, run), NoConfig(), inputs) for name, inputs in zip(chain, sources, strict=True)]


def test_other_users_and_copies_of_the_store_compute_nothing_again(
    store: ArtifactStore, make_session: Callable[..., Any], local_store: ArtifactStore, tmp_path: Path, monkeypatch
) -> None:
    def refuse(config: NoConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        raise AssertionError(f"{context.stage} is computed again")

    first = driver.execute(_nodes(_write), make_session(store))
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "another-machine"))
    transfer.pull(store, local_store, transfer.with_inputs(store, first[-1].manifest))
    for other in (open_store(store.uri, store.folder.config), local_store):
        again = driver.execute(_nodes(refuse), make_session(other))
        assert [item.manifest for item in again] == [item.manifest for item in first] and all(item.is_reused for item in again)
    path = store.fetch(first[-1].manifest, "text")
    assert path.read_text() == "dataset token_map dataset train " and path.is_relative_to(tmp_path / "another-machine")


# Places that are refused ---------------------------------------------------------------------------------------------------


def test_a_store_without_the_right_to_write_is_refused(store: ArtifactStore, s3_endpoint: S3Endpoint) -> None:
    fault = s3_endpoint.fault("PUT", "", status="403 Forbidden", code="AccessDenied", times=9)
    with fault, pytest.raises(StorageError, match=f"the store {store.uri} cannot be written: .*no permission to write it"):
        store.check_writable()


def test_a_store_that_overwrites_is_refused(store: ArtifactStore, s3_endpoint: S3Endpoint) -> None:
    """An endpoint that does not know If-None-Match takes every write."""

    def ignore_the_condition(environ: dict[str, Any]) -> bool:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return False

    with s3_endpoint.fault("PUT", "") as fault:
        fault.matches = ignore_the_condition
        with pytest.raises(StorageError, match="overwrites existing files"):
            store.check_writable()
    assert list(store.folder.list()) == []


def test_a_missing_bucket_is_not_an_empty_store(s3_endpoint: S3Endpoint) -> None:
    store = open_store("s3://no-such-bucket/store", s3_endpoint.config)
    with pytest.raises(StorageError, match=r"the store s3://no-such-bucket/store cannot be written: .*no such bucket"):
        store.check_writable()
    for act in (lambda: store.read_manifest(STAGE, KEY), lambda: list(store.manifests())):
        with pytest.raises(StorageError, match="no such bucket"):
            act()
