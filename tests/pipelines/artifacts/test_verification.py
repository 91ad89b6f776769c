"""Checking stored files against their manifests: every kind of damage is named, and nothing is repaired."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from material.places import Place, make
from pipelines.artifacts import verification
from pipelines.artifacts.manifest import MANIFEST, Manifest
from pipelines.artifacts.verification import Verdict
from pipelines.storage.base import StorageError

CONTENT = bytes(range(256)) * 10_000


@pytest.fixture
def manifest(place: Place) -> Manifest:
    return make(place.store, "train/a", files={"model.bin": CONTENT, "other.bin": b"12", "empty": b""})


def _verify(place: Place) -> list[Verdict]:
    return list(verification.verify(place.store, place.store.read_manifests(is_complete=False)))


def test_whole_artifacts_have_no_problems_and_every_byte_is_read(place: Place, manifest: Manifest) -> None:
    other, counted = make(place.store, "dataset/b"), []
    verdicts = list(verification.verify(place.store, [manifest, other], counted.append))
    assert verdicts == [
        Verdict("train", manifest.key, 3, len(CONTENT) + 2, ()),
        Verdict("dataset", other.key, 1, len(b"dataset/b"), ()),
    ]
    assert sum(counted) == len(CONTENT) + 2 + len(b"dataset/b")


def test_damage_is_named_even_if_the_file_was_read_before(place: Place, manifest: Manifest) -> None:
    for content, problem in (
        (CONTENT[:-1], "model.bin has 2,559,999 bytes, but 2,560,000 were written"),
        (CONTENT + b"x", "model.bin has 2,560,001 bytes, but 2,560,000 were written"),
        (b"", "model.bin has 0 bytes, but 2,560,000 were written"),
        (b"\xff" + CONTENT[1:], "model.bin holds other bytes (sha256 "),
        (None, "model.bin is missing"),
    ):
        place.damage(f"train/{manifest.key}/model.bin", CONTENT)
        place.store.fetch(manifest, "model.bin")  # now caches know it
        place.damage(f"train/{manifest.key}/model.bin", content)
        damaged = place.contents()
        (verdict,) = _verify(place)
        assert len(verdict.problems) == 1 and verdict.problems[0].startswith(problem)
        assert place.contents() == damaged, "nothing is repaired"


def test_every_wrong_file_and_record_is_named(place: Place) -> None:
    manifest = make(place.store, "train/a", files={"model.bin": b"1"})
    history = make(place.store, "train/b", files={"history.json": b"{}"})
    both = Manifest(**{**vars(manifest), "key": history.key, "records": history.files, "files": manifest.files})
    (verdict,) = verification.verify(place.store, [both])
    assert verdict.problems == ("model.bin is missing",) and verdict.num_files == 2
    place.damage(f"train/{history.key}/history.json", b"[]")
    (verdict,) = verification.verify(place.store, [both])
    assert len(verdict.problems) == 2 and verdict.problems[1].startswith("history.json holds other bytes")


def test_a_manifest_that_is_damaged_or_cannot_be_read_is_a_verdict(
    place: Place, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, other = make(place.store, "train/b"), make(place.store, "train/c")
    place.damage(f"train/{damaged.key}/{MANIFEST}", b"{}")
    original = type(place.store).read_manifest

    def failing(self: Any, stage: str, key: str) -> Any:
        if key == manifest.key:
            raise StorageError("refused (InternalError)")
        return original(self, stage, key)

    monkeypatch.setattr(type(place.store), "read_manifest", failing)
    verdicts = {verdict.key: (verdict.problems, verdict.is_readable) for verdict in _verify(place)}
    ((problem,), is_readable) = verdicts.pop(damaged.key)
    assert "manifest.json is not a manifest" in problem and is_readable
    assert verdicts == {manifest.key: (("manifest.json cannot be read (refused (InternalError))",), False), other.key: ((), True)}


def test_a_byte_that_flips_in_transit_is_read_again(place: Place, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    original, flips = type(place.store).read_chunks, ["other.bin"]

    def flip_once(self: Any, stage: str, key: str, path: str) -> Any:
        if path in flips:
            flips.remove(path)
            yield b"1!"
        else:
            yield from original(self, stage, key, path)

    monkeypatch.setattr(type(place.store), "read_chunks", flip_once)
    counted: list[int] = []
    (verdict,) = verification.verify(place.store, [manifest], counted.append)
    assert verdict.problems == () and flips == [] and sum(counted) == verdict.size


@pytest.mark.parametrize("cause", [OSError(errno.EIO, "Input/output error"), None])
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_checked(
    place: Place, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, cause: OSError | None
) -> None:
    """A disk may fail at one file, and a bucket at one object."""
    others = [make(place.store, f"train/{name}") for name in ("b", "c")]
    place.damage(f"train/{others[0].key}/file.bin", b"x" * len(b"train/b"))
    original = type(place.store).read_chunks

    def failing(self: Any, stage: str, key: str, path: str) -> Any:
        if path == "other.bin":
            raise StorageError("s3://b/other.bin: it does not answer") from cause
        return original(self, stage, key, path)

    monkeypatch.setattr(type(place.store), "read_chunks", failing)
    verdicts = {verdict.key: verdict for verdict in _verify(place)}
    unread = verdicts[manifest.key]
    reason = cause.strerror if cause else "s3://b/other.bin: it does not answer"
    assert unread.problems == (f"other.bin cannot be read ({reason})",) and not unread.is_readable
    assert "holds other bytes" in verdicts[others[0].key].problems[0] and verdicts[others[0].key].is_readable
    assert verdicts[others[1].key].problems == ()


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_directory_in_place_of_a_file_is_named(place: Place, manifest: Manifest) -> None:
    folder = Path(place.store.place("train", manifest.key)) / "other.bin"
    folder.unlink()
    folder.mkdir()
    assert _verify(place)[0].problems == ("other.bin is a folder",)
