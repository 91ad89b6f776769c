"""Copying artifacts into another store and into plain files: whole or not at all, and resumed after an interruption."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from material.places import Place, bucket_place, folder_place, key_of, make, make_chain
from pipelines.artifacts import transfer
from pipelines.artifacts.manifest import MANIFEST, Manifest, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError, file_digest
from pipelines.storage.s3 import S3Folder

WEIGHTS = bytes(range(256)) * 3000


@pytest.fixture(params=["folder to folder", "bucket to folder", "folder to bucket"])
def places(
    request: pytest.FixtureRequest, tmp_path: Path, make_bucket: Callable[..., S3Folder], monkeypatch: pytest.MonkeyPatch
) -> tuple[Place, Place]:
    """A source and a target."""
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    source, _, target = request.param.split()
    opened = [
        folder_place(tmp_path / name) if kind == "folder" else bucket_place(make_bucket())
        for name, kind in (("source", source), ("target", target))
    ]
    return opened[0], opened[1]


@pytest.fixture
def chain(places: tuple[Place, Place]) -> SimpleNamespace:
    made = make_chain(places[0].store)
    files = {"model.bin": WEIGHTS, "deep/b.bin": b"b", "empty": b""}
    made.train = make(places[0].store, "train/x", made.map, made.tokenizer, files=files)
    return made


def _names(manifests: list[Manifest]) -> list[tuple[str, str]]:
    return [name_of(manifest) for manifest in manifests]


def test_an_artifact_is_copied_alone_or_after_its_inputs(places: tuple[Place, Place], chain) -> None:
    source, target = (place.store for place in places)
    (alone,) = transfer.pull(source, target, [chain.train])
    assert alone.manifest == chain.train == target.read_manifest(*name_of(chain.train)) and not alone.was_there
    assert (alone.num_fetched, alone.size_fetched) == (3, len(WEIGHTS) + 1)
    manifests = transfer.with_inputs(source, chain.train)
    assert _names(manifests) == _names([chain.dataset, chain.tokenizer, chain.map, chain.train])
    done = transfer.pull(source, target, manifests)
    assert [each.was_there for each in done] == [False, False, False, True]
    assert sorted(_names(list(target.manifests()))) == sorted(_names(manifests))
    for manifest in manifests:
        for record in manifest.files:
            assert file_digest(target.fetch(manifest, record.name)) == record.sha256


def test_a_repeated_transfer_fetches_nothing(places: tuple[Place, Place], chain, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (place.store for place in places)
    manifests = transfer.with_inputs(source, chain.train)
    transfer.pull(source, target, manifests)
    before = places[1].contents()
    monkeypatch.setattr(type(source), "fetch_file", lambda *_: pytest.fail("it is fetched again"))
    done = transfer.pull(source, target, manifests)
    assert all(each.was_there and each.num_fetched == 0 for each in done) and places[1].contents() == before


def test_an_interrupted_transfer_resumes_with_the_rest(places: tuple[Place, Place], chain, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (place.store for place in places)
    original, fetched, others_are_fetched = type(source).fetch_file, [], threading.Event()

    def cut_off(self: Any, stage: str, key: str, record: Any) -> Path:
        if record.name == "deep/b.bin":
            assert others_are_fetched.wait(timeout=60)
            raise StorageError("the bucket does not answer")
        path = original(self, stage, key, record)
        fetched.append(record.name)
        if len(fetched) == 2:
            others_are_fetched.set()
        return path

    with monkeypatch.context() as patch:
        patch.setattr(type(source), "fetch_file", cut_off)
        with pytest.raises(StorageError, match="the bucket does not answer"):
            transfer.pull(source, target, [chain.train])
    assert target.read_manifest(*name_of(chain.train)) is None and sorted(fetched) == ["empty", "model.bin"]
    (done,) = transfer.pull(source, target, [chain.train])
    assert (done.num_fetched, done.size_fetched) == (1, 1)


def test_files_of_an_interrupted_transfer_are_kept_only_if_their_bytes_are_right(places: tuple[Place, Place], chain) -> None:
    """A wrong file keeps its name, and the manifest names the right one beside it."""
    source, target = (place.store for place in places)
    places[1].damage(f"train/{chain.train.key}/model.bin", WEIGHTS[:-1] + b"x")
    (done,) = transfer.pull(source, target, [chain.train])
    assert done.manifest.file("model.bin").path != "model.bin" and done.manifest.digest == chain.train.digest
    assert target.fetch(done.manifest, "model.bin").read_bytes() == WEIGHTS
    again = transfer.pull(source, target, [chain.train])
    assert again[0].was_there
    target.delete_manifest(*name_of(chain.train))
    (resumed,) = transfer.pull(source, target, [chain.train])
    assert resumed.num_fetched == 0 and resumed.manifest.files == done.manifest.files


def test_a_damaged_source_makes_no_artifact(places: tuple[Place, Place], chain) -> None:
    places[0].damage(f"train/{chain.train.key}/model.bin", WEIGHTS[:-1] + b"x")
    with pytest.raises(StorageError, match=r"model\.bin was changed after it was made"):
        transfer.pull(places[0].store, places[1].store, [chain.train])
    assert list(places[1].store.manifests()) == []


def test_another_artifact_of_the_same_key_is_refused_before_anything_is_copied(places: tuple[Place, Place], chain) -> None:
    """Of a stage that is not deterministic, made in both."""
    source, target = (place.store for place in places)
    make(target, "train/x", files={"model.bin": b"other weights"})
    before = places[1].contents()
    with pytest.raises(StorageError, match=rf"{target.uri} already has train/{chain.train.key[:12]} with other content"):
        transfer.pull(source, target, transfer.with_inputs(source, chain.train))
    assert places[1].contents() == before


def test_missing_and_damaged_inputs_are_named(places: tuple[Place, Place], chain) -> None:
    for content, what in ((b"{", "is damaged"), (None, "is gone")):
        places[0].damage(f"dataset/{chain.dataset.key}/{MANIFEST}", content)
        with pytest.raises(StorageError, match=rf"dataset/{chain.dataset.key[:12]}, which .* was made from, {what}"):
            transfer.with_inputs(places[0].store, chain.train)


def test_circular_inputs_are_copied_once(local_store: ArtifactStore) -> None:
    sources = {name: {"stage": "train", "key": key_of(name), "digest": ""} for name in "ab"}
    for own, other in ("ab", "ba"):
        inputs = {"x": sources[other]}
        local_store.commit(Manifest(stage="train", key=key_of(own), stage_version=1, config={}, inputs=inputs, files=()))
    first = local_store.read_manifest("train", key_of("a"))
    assert first is not None and len(transfer.with_inputs(local_store, first)) == 2


def test_progress_counts_every_byte_once(places: tuple[Place, Place], chain, tmp_path: Path) -> None:
    manifests, counted = transfer.with_inputs(places[0].store, chain.train), []
    total = sum(record.size for manifest in manifests for record in manifest.files)
    for _ in range(2):
        transfer.pull(places[0].store, places[1].store, manifests, counted.append)
        assert sum(counted) == total
        counted.clear()
    for _ in range(2):
        transfer.write_files(places[0].store, chain.train, tmp_path / "files", counted.append)
        assert sum(counted) == len(WEIGHTS) + 1
        counted.clear()


# Plain files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", ["bucket to folder"], indirect=True)
def test_files_are_written_under_their_names_beside_the_manifest(places: tuple[Place, Place], chain, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "files"
    done = transfer.write_files(places[0].store, chain.train, folder)
    assert (done.num_fetched, done.was_there) == (3, False)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {"model.bin", "deep/b.bin", "empty", MANIFEST}
    assert files["model.bin"].read_bytes() == WEIGHTS and oct(files["model.bin"].stat().st_mode & 0o777) == "0o644"
    assert Manifest.from_json(files[MANIFEST].read_bytes()) == chain.train
    files["model.bin"].unlink()
    assert transfer.write_files(places[0].store, chain.train, folder).num_fetched == 1
    assert transfer.write_files(places[0].store, chain.train, folder).was_there


def test_existing_files_are_not_replaced(local_store: ArtifactStore, tmp_path: Path) -> None:
    manifest, other = make(local_store, "train/a"), make(local_store, "train/b", files={"other.bin": b"x"})
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "file.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"file\.bin already exists.*; name an empty folder"):
        transfer.write_files(local_store, manifest, folder)
    assert [path.name for path in folder.iterdir()] == ["file.bin"] and (folder / "file.bin").read_text() == "mine"
    transfer.write_files(local_store, other, tmp_path / "others")
    with pytest.raises(ValueError, match=r"manifest\.json already exists"):
        transfer.write_files(local_store, manifest, tmp_path / "others")
    (folder / "file.bin").unlink()
    (folder / "file.bin").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"file\.bin already exists"):
        transfer.write_files(local_store, manifest, folder)
    assert not (tmp_path / "outside").exists()
