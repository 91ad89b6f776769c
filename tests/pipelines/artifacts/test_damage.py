"""What is damaged is not believed: manifests, records of parts and of use, and files with other bytes, flipped bits or cuts.

Most tests hold for every kind of folder, by the parameters of `place`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from material.places import KEY, STAGE, Place, manifest_of
from pipelines.artifacts.manifest import MANIFEST, DamagedFileError, DamagedManifestError, FileRecord, Manifest
from pipelines.artifacts.open import open_store
from pipelines.storage.base import StorageError, digest_of


def test_a_damaged_manifest_is_an_error_and_hides_no_other_artifact(place: Place, put, caplog: pytest.LogCaptureFixture) -> None:
    others = [place.store.commit(manifest_of(put(b"weights", key=digit * 64), key=digit * 64)) for digit in "13"]
    place.store.commit(manifest_of(put(b"weights", key="2" * 64), key="2" * 64))
    for content in (b"", b'{"stage": "tr', b"{}", b"[]", b"5", b"\xff\xfe\x00", b"[" * 100_000):
        place.damage(f"{STAGE}/{'2' * 64}/{MANIFEST}", content)
        with pytest.raises(DamagedManifestError, match=f"{'2' * 64}/{MANIFEST} is not a manifest"):
            place.store.read_manifest(STAGE, "2" * 64)
    assert list(place.store.manifests()) == others
    assert f"{STAGE}/{'2' * 64}/{MANIFEST} is not a manifest" in caplog.text
    first, damaged, last = place.store.read_manifests()
    assert [first, last] == others and isinstance(damaged, DamagedManifestError)
    assert (damaged.stage, damaged.key, damaged.inputs) == (STAGE, "2" * 64, ())
    assert list(place.store.read_manifests([(STAGE, "3" * 64), (STAGE, "4" * 64)])) == [others[1]]


_FILE = {"name": "a.bin", "path": "a.bin", "size": 1, "sha256": "1" * 64}
_INPUT = {"stage": "dataset", "key": "d" * 64, "digest": "e" * 64}


def _refused(changes: dict[str, Any], reason: str) -> None:
    """Of somebody who seals what they write."""
    fields = {**json.loads(manifest_of().to_json()), **changes}
    fields["checksum"] = digest_of({name: value for name, value in fields.items() if name != "checksum"})
    with pytest.raises(DamagedManifestError, match=reason):
        Manifest.read(json.dumps(fields).encode(), "place", STAGE, KEY)


def test_a_manifest_with_a_file_outside_its_folder_is_refused() -> None:
    paths = (
        "../a",
        "..",
        "a/../../b",
        "/etc/passwd",
        "",
        "a//b",
        "./a",
        "a\\b",
        "a\0",
        5,
        None,
        "manifest.json",
        "é" * 128,
        "a/" * 500,
    )
    for path, field, kind in product(paths, ("name", "path"), ("files", "records")):
        _refused({kind: [{**_FILE, field: path}]}, r"place is not a manifest \(it lists a file called")


def test_the_record_of_a_part_with_a_file_outside_its_folder_is_removed_and_the_file_stays(tmp_path: Path) -> None:
    """The part's own file would be removed with its record."""
    store, outside = open_store(str(tmp_path / "store")), tmp_path / "of somebody else"
    outside.write_bytes(b"")
    for name, file in (
        ("file", {**_FILE, "path": "../../../of somebody else"}),
        ("file", {**_FILE, "name": "../a"}),
        ("tensors", {**_FILE, "path": "/etc/passwd"}),
        ("state", {**_FILE, "size": "1"}),
        ("file", {**_FILE, "other": 1}),
        ("file", "a.bin"),
        ("file", {}),
    ):
        store.put_part(STAGE, KEY, "part-0", {name: file})
        assert store.resume_parts(STAGE, KEY) == {} and outside.exists()
        assert not [*store.folder.list()]


def test_a_manifest_with_wrong_fields_is_refused_with_the_reason() -> None:
    for changes, reason in (
        ({"stage": "generate"}, "describes generate/abab"),
        ({"key": "cd" * 32}, "describes train/cdcd"),
        ({"inputs": {"dataset": {**_INPUT, "key": "../" + "d" * 61}}}, "input dataset is not an artifact"),
        ({"inputs": {"dataset": {**_INPUT, "stage": "../.."}}}, "input dataset is not an artifact"),
        ({"inputs": {"dataset": {**_INPUT, "digest": 5}}}, "input dataset is not an artifact"),
        ({"inputs": {"dataset": {}}}, "stage"),
        ({"inputs": []}, "items"),
        ({"files": [{**_FILE, "size": -1}]}, "size or sha256 of a.bin"),
        ({"files": [{**_FILE, "sha256": "../" * 10}]}, "size or sha256 of a.bin"),
        ({"files": None}, "not iterable|after"),
        ({"summary": []}, "summary is not a JSON object"),
        ({"surplus": 1}, "surplus"),
        ({"metrics": {"fid": None}}, "its metric fid is not a number"),
        ({"digest": "e" * 64}, "its digest is not that of the files"),
        ({"format": 3}, "its format 3 is not known to this version"),
        ({"format": 1}, "checksum"),
    ):
        _refused(changes, reason)


def _flips(content: bytes, count: int) -> Iterator[bytes]:
    """The content with one bit flipped, at random places."""
    generator = random.Random(0)
    for _ in range(count):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        yield bytes(flipped)


def test_no_flipped_bit_of_a_manifest_is_believed() -> None:
    inputs = {"samples": {"stage": "generate", "key": "c" * 64, "digest": "d" * 64}}
    manifest = replace(manifest_of(FileRecord(**_FILE)), inputs=inputs, metrics={"frechet_distance": 38.01, "samples": 500})
    refused = 0
    for flipped in _flips(manifest.to_json(), 2000):
        try:
            assert Manifest.read(flipped, "place", STAGE, KEY) == manifest  # in white space
        except DamagedManifestError:
            refused += 1
    assert refused > 1500
    cut = [manifest.to_json()[:length] for length in range(0, len(manifest.to_json()) - 1, 7)]
    for text in cut:
        with pytest.raises(DamagedManifestError):
            Manifest.read(text, "place", STAGE, KEY)


def test_a_manifest_of_format_1_is_read_and_its_files_are_compared_with_its_digest() -> None:
    fields = json.loads(manifest_of(FileRecord(**_FILE)).to_json())
    del fields["checksum"]
    fields["format"] = 1
    assert Manifest.read(json.dumps(fields).encode(), "place", STAGE, KEY) == manifest_of(FileRecord(**_FILE))
    fields["files"][0]["size"] += 1
    with pytest.raises(DamagedManifestError, match="digest is not that"):
        Manifest.read(json.dumps(fields).encode(), "place", STAGE, KEY)


def test_no_flipped_bit_of_a_record_is_believed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    record = {"rows": 5, "code_counts": [1, 2, 3], "seconds": 0.25}
    used = [("dataset", "1" * 64)]
    place.store.put_part(STAGE, KEY, "part", record)
    place.store.record_use(STAGE, KEY, used)
    content = place.contents()
    part, use = f"{STAGE}/{KEY}/.parts/part.json", f"{STAGE}/{KEY}/.used"
    for flipped in _flips(content[part], 40 if place.rounds < 50 else 400):
        place.damage(part, flipped)
        assert place.store.read_parts(STAGE, KEY) in ({}, {"part": record})
    assert "is damaged; its part is made again" in caplog.text
    for flipped in _flips(content[use], 40 if place.rounds < 50 else 400):
        place.damage(use, flipped)
        assert place.store.recorded_inputs(STAGE, KEY) in (None, used)


def test_a_run_resumes_only_with_parts_whose_bytes_are_right(place: Place, put, caplog: pytest.LogCaptureFixture) -> None:
    records = {name: {"file": asdict(put(name.encode() * 9, name)), "rows": 1} for name in ("a", "b", "c", "d")}
    records["e"] = {"file": None, "rows": 0}
    for name, record in records.items():
        place.store.put_part(STAGE, KEY, name, record)
    place.damage(f"{STAGE}/{KEY}/b", b"x" * 9)
    place.damage(f"{STAGE}/{KEY}/c", None)
    whole = {name: records[name] for name in ("a", "d", "e")}
    assert place.store.resume_parts(STAGE, KEY) == whole == place.store.read_parts(STAGE, KEY)
    assert caplog.text.count("its part is made again") == 2
    assert put(b"b" * 9, "b") == FileRecord(**records["b"]["file"])  # its name is free


def test_inputs_of_a_manifest_of_a_newer_format_are_known() -> None:
    fields = {
        **json.loads(manifest_of().to_json()),
        "novelty": 1,
        "inputs": {"a": _INPUT, "b": {"stage": "..", "key": "x"}, "c": 1},
    }
    with pytest.raises(DamagedManifestError) as caught:
        Manifest.read(json.dumps(fields).encode(), "place", STAGE, KEY)
    assert caught.value.inputs == (("dataset", "d" * 64),)


def test_a_changed_or_missing_file_is_refused(place: Place, put) -> None:
    manifest = place.store.commit(manifest_of(put(b"weights")))
    advice = f"remove {place.store.place(STAGE, KEY)} to make the artifact again"
    for content, finding in (
        (b"weightz", "was changed after it was made"),
        (b"weight", "was changed after it was made"),
        (b"", "was changed after it was made"),
        (None, "is gone, though its manifest lists it"),
    ):
        place.damage(f"{STAGE}/{KEY}/model.safetensors", content)
        with pytest.raises(DamagedFileError, match=rf"model\.safetensors {finding}.*{advice}"):
            place.store.fetch(manifest, "model.safetensors")
    place.damage(f"{STAGE}/{KEY}/model.safetensors", b"weights")
    assert place.store.fetch(manifest, "model.safetensors").read_bytes() == b"weights"
    if place.store.uri.startswith("/"):  # from a bucket, the checked copy is read again
        place.damage(f"{STAGE}/{KEY}/model.safetensors", b"weightz")
        with pytest.raises(StorageError, match="was changed"):
            place.store.fetch(manifest, "model.safetensors")


def test_a_damaged_file_does_not_hide_the_right_bytes(place: Place, put) -> None:
    put(b"weights")
    place.damage(f"{STAGE}/{KEY}/model.safetensors", b"weightz")
    record = put(b"weights")
    assert place.store.fetch_file(STAGE, KEY, record).read_bytes() == b"weights"
    place.damage(f"{STAGE}/{KEY}/{record.path}", b"weighty")
    with pytest.raises(StorageError, match="damaged"):
        put(b"weights")


def test_a_damaged_record_of_a_part_is_dropped_and_the_part_can_be_recorded_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.store.put_part(STAGE, KEY, "part-1", {"rows": 1})
    for content in (b"", b'{"rows"', b"\xff\xfe", b"[1]", b"null"):
        caplog.clear()
        place.damage(f"{STAGE}/{KEY}/.parts/part-0.json", content)
        assert place.store.read_parts(STAGE, KEY) == {"part-1": {"rows": 1}}
        assert "part-0.json is damaged; its part is made again" in caplog.text
        place.store.put_part(STAGE, KEY, "part-0", {"rows": 2})
        assert place.store.read_parts(STAGE, KEY)["part-0"] == {"rows": 2}


def test_a_record_of_use_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Otherwise the inputs that it names would be removed."""
    local_store = open_store(str(tmp_path / "store"))
    assert local_store.recorded_inputs("train", "k") == []
    (Path(local_store.uri) / "train" / "k" / ".used").mkdir(parents=True)
    with pytest.raises(StorageError, match="Is a directory"):
        local_store.recorded_inputs("train", "k")
