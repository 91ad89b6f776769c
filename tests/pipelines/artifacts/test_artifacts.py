"""The artifact store: nothing is overwritten, the manifest comes last and once, and what is read is what was written.

Most tests hold for every kind of folder, by the parameters of `place`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from material.places import KEY, STAGE, Place, manifest_of
from pipelines.artifacts.manifest import MANIFEST, FileRecord, Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError, canonical_json


def _together(count: int, act: Callable[[int], Any]) -> list[Any]:
    """Results of act(0), act(1), ... begun at the same moment in threads of their own."""
    barrier, results = threading.Barrier(count), [None] * count

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = act(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# Manifests -----------------------------------------------------------------------------------------------------------------


def test_a_committed_manifest_comes_back_whole(store: ArtifactStore, put) -> None:
    manifest = manifest_of(
        put(b"weights"),
        records=(put(b"{}", "history.json"),),
        summary={"rows": 3, "names": ["å", "b"]},
        metrics={"loss": 0.1 + 0.2},
        provenance={"seconds": 1.5},
    )
    store.put_part(STAGE, KEY, "part-0", {"rows": 1})
    assert store.read_manifest(STAGE, KEY) is None and list(store.manifests()) == [], "no manifest, no artifact"
    assert store.commit(manifest) == manifest
    assert store.read_manifest(STAGE, KEY) == manifest
    assert list(store.manifests()) == [manifest]
    assert store.read_manifest(STAGE, "cd" * 32) is None
    assert json.loads(manifest.to_json())["digest"] == manifest.digest


def test_a_second_manifest_changes_nothing_and_the_first_is_returned(store: ArtifactStore, put) -> None:
    first = store.commit(manifest_of(put(b"weights"), provenance={"run": 1}))
    second = store.commit(manifest_of(put(b"other weights"), provenance={"run": 2}))
    assert second == first == store.read_manifest(STAGE, KEY)


_COMMIT = """
import sys, time
from pathlib import Path
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
uri, go, number, source, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
store = open_store(uri)
print("ready", flush=True)
while not go.exists():
    pass
for key in range(rounds):
    record = store.put_file("train", f"{key:064x}", "model.bin", source)
    fields = {"stage_version": 1, "config": {}, "inputs": {}, "provenance": {"run": number}}
    print(store.commit(Manifest(stage="train", key=f"{key:064x}", files=(record,), **fields)).provenance["run"])
"""


def test_of_processes_that_commit_at_once_one_wins_and_the_others_adopt_it(place: Place, tmp_path: Path) -> None:
    """Each has files of its own, as two runs of a stage that is not deterministic."""
    store, go, processes = place.store, tmp_path / "go", []
    for number in range(3):
        source = tmp_path / f"model-{number}.bin"
        source.write_bytes(bytes([number]) * 1000)
        command = [sys.executable, "-c", _COMMIT, store.uri, str(go), str(number), str(source), str(place.rounds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == place.rounds
    for manifest, winner in zip(store.manifests(), answers[0], strict=True):
        assert manifest.provenance["run"] == int(winner)
        assert store.fetch(manifest, "model.bin").read_bytes() == bytes([int(winner)]) * 1000


def test_a_manifest_is_not_committed_before_its_files(store: ArtifactStore, place: Place, put, monkeypatch) -> None:
    """Not for a moment, in which another run would find it."""
    record, written = put(b"weights"), []
    monkeypatch.setattr(type(store), "_put_manifest", lambda self, manifest: written.append(manifest))
    advice = f"remove {store.place(STAGE, KEY)} and run again"
    with pytest.raises(StorageError, match=f"more.bin was removed or truncated before the artifact was complete; {advice}"):
        store.commit(manifest_of(record, FileRecord("more.bin", "more.bin", 3, "0" * 64)))
    with pytest.raises(StorageError, match=f"{record.path} was removed or truncated .*; {advice}"):
        store.commit(manifest_of(replace(record, size=record.size + 1)))
    assert written == [] and store.read_manifest(STAGE, KEY) is None


@pytest.mark.parametrize("may_remove", [True, False])
def test_a_manifest_whose_files_are_removed_during_the_commit_does_not_stay(
    store: ArtifactStore, place: Place, put, monkeypatch: pytest.MonkeyPatch, may_remove: bool
) -> None:
    """The files are removed just before it is written. A driver may lack the right to remove a manifest from a bucket."""
    record = put(b"weights")
    write = type(store)._put_manifest

    def overtaken(self: ArtifactStore, manifest: Manifest) -> bool:
        self.delete_files(STAGE, KEY, [record.path])
        return write(self, manifest)

    def refused(*_: object) -> None:
        raise StorageError("it cannot be deleted (AccessDenied)")

    monkeypatch.setattr(type(store), "_put_manifest", overtaken)
    if not may_remove:
        monkeypatch.setattr(type(store), "delete_manifest", refused)
    with pytest.raises(StorageError, match=rf"{record.path} was removed.*; remove {store.place(STAGE, KEY)} and run again"):
        store.commit(manifest_of(record))
    assert (store.read_manifest(STAGE, KEY) is None) == may_remove


def test_a_manifest_that_is_removed_while_another_is_committed_is_an_error(
    store: ArtifactStore, place: Place, put, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit(manifest_of(put(b"weights")))
    write = type(store)._put_manifest

    def overtaken(self: ArtifactStore, manifest: Manifest) -> bool:
        is_written = write(self, manifest)
        self.delete_manifest(STAGE, KEY)
        return is_written

    monkeypatch.setattr(type(store), "_put_manifest", overtaken)
    with pytest.raises(StorageError, match="was removed while it was being made; run again"):
        store.commit(manifest_of(put(b"other weights")))


# Files ---------------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_with_its_bytes(store: ArtifactStore, put) -> None:
    contents = {"model.safetensors": b"weights", "no-suffix": b"", "two.dots.tar.gz": bytes(range(256)) * 9000, "a/b.parquet": b"1"}
    records = [put(content, name) for name, content in contents.items()]
    assert [(record.name, record.path, record.size) for record in records] == [(n, n, len(c)) for n, c in contents.items()]
    manifest = store.commit(manifest_of(*records))
    assert {name: store.fetch(manifest, name).read_bytes() for name in contents} == contents


def test_other_bytes_under_a_taken_name_get_another_path_and_both_stay_readable(place: Place, put) -> None:
    contents = (b"first", b"second", b"third")
    for name in ("model.safetensors", "no-suffix", "two.dots.tar.gz"):
        records = [put(content, name) for content in contents]
        assert len({record.path for record in records}) == 3 and {record.name for record in records} == {name}
        assert all(Path(record.path).suffixes[-1:] == Path(name).suffixes[-1:] or "." not in name for record in records)
        assert [place.store.fetch_file(STAGE, KEY, record).read_bytes() for record in records] == list(contents)
        before = place.contents()
        assert [put(content, name) for content in contents] == records and place.contents() == before


def test_files_of_one_name_that_are_stored_at_once_stay_readable(store: ArtifactStore, put) -> None:
    contents = [bytes([number % 4]) * 100_000 for number in range(12)]
    records = _together(12, lambda number: put(contents[number]))
    assert [store.fetch_file(STAGE, KEY, record).read_bytes() for record in records] == contents
    assert len({record.path for record in records}) == 4


def test_a_file_that_an_artifact_lacks_is_named_with_those_that_it_has(store: ArtifactStore, put) -> None:
    manifest = store.commit(manifest_of(put(b"1", "a.bin"), records=(put(b"2", "b.json"),)))
    with pytest.raises(StorageError, match=r"no file 'c\.bin'; it has a\.bin, b\.json"):
        store.fetch(manifest, "c.bin")


# Parts ---------------------------------------------------------------------------------------------------------------------


def test_the_first_record_of_a_part_stays(store: ArtifactStore) -> None:
    assert store.read_parts(STAGE, KEY) == {}
    records = [{"rows": number} for number in range(8)]
    _together(8, lambda number: store.put_part(STAGE, KEY, "part-0", records[number]))
    first = store.read_parts(STAGE, KEY)["part-0"]
    store.put_part(STAGE, KEY, "part-0", {"rows": 99})
    assert first in records and store.read_parts(STAGE, KEY) == {"part-0": first}


def test_records_of_parts_are_sorted_and_can_be_replaced_after_they_are_discarded(store: ArtifactStore) -> None:
    for part in (10, 2, 1):
        store.put_part(STAGE, KEY, f"part-{part:05d}.parquet", {"rows": part, "quarantined": [["å", "reason"]]})
    store.put_part(STAGE, "cd" * 32, "part-00000.parquet", {"rows": 0})
    for _ in range(2):  # again without an error
        store.discard_part(STAGE, KEY, "part-00002.parquet")
        assert list(store.read_parts(STAGE, KEY)) == ["part-00001.parquet", "part-00010.parquet"]
    store.put_part(STAGE, KEY, "part-00002.parquet", {"rows": 3})
    parts = store.read_parts(STAGE, KEY)
    assert list(parts) == ["part-00001.parquet", "part-00002.parquet", "part-00010.parquet"]
    assert parts["part-00002.parquet"] == {"rows": 3}
    assert parts["part-00010.parquet"] == {"rows": 10, "quarantined": [["å", "reason"]]}


def test_discarding_work_removes_records_and_state_and_leaves_the_artifact(place: Place, put) -> None:
    store = place.store
    manifest = store.commit(manifest_of(put(b"weights")))
    store.put_part(STAGE, KEY, "part-0", {"rows": 1})
    store.put_part(STAGE, "cd" * 32, "part-0", {"rows": 2})
    committed = {name for name in place.contents() if KEY in name and "part" not in name}
    put(b"of a run that lost", "model.safetensors")  # gets a path of its own
    committed.add(f"{STAGE}/{KEY}/{put(b'notes', 'notes.abcdef.txt').path}")
    store.discard_work(manifest)
    assert {name for name in place.contents() if KEY in name} == committed
    assert store.read_parts(STAGE, KEY) == {} and store.fetch(manifest, "model.safetensors").read_bytes() == b"weights"
    assert store.read_parts(STAGE, "cd" * 32) == {"part-0": {"rows": 2}}
    store.discard_work(manifest)  # again without an error


def test_exactly_the_named_files_are_discarded(place: Place, put) -> None:
    discarded = [put(b"1", ".work/step-1/a.bin"), put(b"2", ".work/step-1/b.bin"), put(b"3", "a")]
    kept = [put(b"other 2", ".work/step-1/b.bin"), *(put(name.encode(), name) for name in ("a.bin", "a-b", "ab/c"))]
    for _ in range(2):  # again without an error
        place.store.discard_files(STAGE, KEY, discarded)
        for record in discarded:
            with pytest.raises(StorageError, match="is gone"):
                place.store.fetch_file(STAGE, KEY, record)
    assert set(place.contents()) == {f"{STAGE}/{KEY}/{record.path}" for record in kept}
    assert place.store.fetch_file(STAGE, KEY, kept[0]).read_bytes() == b"other 2"
    place.store.discard_files(STAGE, KEY, kept)
    assert place.contents() == {}
    assert put(b"again", ".work/step-1/a.bin").path == ".work/step-1/a.bin"


# Listing and deleting -----------------------------------------------------------------------------------------------------------


def test_a_listing_has_everything_that_is_named_like_an_artifact_with_its_files(place: Place, put) -> None:
    before = time.time()
    place.store.commit(manifest_of(put(b"weights", key="2" * 64), key="2" * 64))
    place.store.put_part("evaluate", "1" * 64, "part-0", {"rows": 1})
    foreign = ["notes.txt", "train/notes.txt", "train/short/file", f"Train/{KEY}/file", f"a.b/{KEY}/file", f"train/{'2' * 65}/file"]
    for name in [*foreign, f"train/{'G' * 64}/file"]:
        place.damage(name, b"x")
    names = [("evaluate", "1" * 64), ("train", "2" * 64)]
    assert list(place.store.names()) == names
    folders = list(place.store.folders())
    assert [(stage, key) for stage, key, _ in folders] == names
    assert [file.name for file in folders[0][2]] == [".parts/part-0.json"]
    assert [(file.name, file.size) for file in folders[1][2]][1:] == [("model.safetensors", 7)] and len(folders[1][2]) == 2
    for stage, key, files in folders:
        assert place.store.list_files(stage, key) == files
        assert all(before - 2 <= file.modified <= time.time() + 2 for file in files)
    assert place.store.list_files("train", "3" * 64) == []


def test_a_deletion_stays_inside_the_artifact(place: Place, put) -> None:
    put(b"x", "a")
    place.damage("outside", b"x")
    before = place.contents()
    for path in ("../x", "../../outside", "/outside", "a/../../../outside", ".", ""):
        for stage, key, name in ((STAGE, KEY, path), ("..", KEY, "a"), (STAGE, path, "a")):
            with pytest.raises(AssertionError):
                place.store.delete_files(stage, key, [name])
    assert place.contents() == before


def test_a_record_of_use_has_the_time_and_the_inputs_of_the_last_use(place: Place) -> None:
    store = place.store
    inputs = [("dataset", "1" * 64), ("tokenizer", "2" * 64)]
    store.record_use(STAGE, KEY, reversed(inputs))
    assert store.recorded_inputs(STAGE, KEY) == inputs and store.read_manifest(STAGE, KEY) is None
    place.age(f"{STAGE}/{KEY}/.used", 1000)
    (old,) = store.list_files(STAGE, KEY)
    store.record_use(STAGE, KEY)
    (new,) = store.list_files(STAGE, KEY)
    assert old.name == new.name == ".used" and 990 < new.modified - old.modified < 1010
    assert store.recorded_inputs(STAGE, KEY) == [] == store.recorded_inputs(STAGE, "cd" * 32)
    for damaged in (b"", b"[]", b'{"inputs": [["..", "x"]]}', b'{"inputs": [1]}', b"\xff"):
        place.damage(f"{STAGE}/{KEY}/.used", damaged)
        assert store.recorded_inputs(STAGE, KEY) is None


def test_artifacts_behind_a_link_can_be_read_and_are_not_listed_for_removal(tmp_path: Path, local_store: ArtifactStore) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    elsewhere = open_store(str(tmp_path / "elsewhere"))
    for key in ("1" * 64, "2" * 64):
        elsewhere.commit(manifest_of(elsewhere.put_file(STAGE, key, "a", source), key=key))
    (Path(local_store.uri) / STAGE).mkdir(parents=True)
    (Path(local_store.uri) / STAGE / ("1" * 64)).symlink_to(Path(elsewhere.uri) / STAGE / ("1" * 64))
    (Path(local_store.uri) / "linked").symlink_to(Path(elsewhere.uri) / STAGE)
    assert [manifest.key for manifest in local_store.manifests()] == ["1" * 64]
    assert list(local_store.folders()) == [] and local_store.list_files(STAGE, "1" * 64) == []
    with pytest.raises(AssertionError):
        local_store.delete_files(STAGE, "1" * 64, ["a"])
    assert elsewhere.read_manifest(STAGE, "1" * 64) is not None


# Crashes -------------------------------------------------------------------------------------------------------------------

_PUT = """
import sys
from pathlib import Path
from pipelines.artifacts.open import open_store
store, source = open_store(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
for number in range(100_000):
    source.write_bytes(number.to_bytes(4) * 200_000)
    record = store.put_file("train", "ab" * 32, f"file-{number:06d}.bin", source)
    store.put_part("train", "ab" * 32, f"file-{number:06d}.bin", {"number": number, "path": record.path})
"""


@pytest.mark.parametrize("parts", [1, 3])
def test_a_killed_process_leaves_no_half_file_under_a_name(place: Place, tmp_path: Path, parts: int) -> None:
    command = [sys.executable, "-c", _PUT, place.store.uri, str(tmp_path / "source")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while len(place.store.read_parts(STAGE, KEY)) < parts:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    files = {name.rpartition("/")[2]: content for name, content in place.contents().items() if name.endswith(".bin")}
    assert files
    for name, content in files.items():
        number = int(name.removeprefix("file-").removesuffix(".bin"))
        assert content == number.to_bytes(4) * 200_000, name
    assert set(place.store.read_parts(STAGE, KEY)) <= set(files), "a part is recorded after its file"
    # What was cut off can be written by the next run under its own name.
    following = f"file-{len(files):06d}.bin"
    source = tmp_path / "again"
    source.write_bytes(b"whole")
    assert place.store.put_file(STAGE, KEY, following, source).path == following


# Digests -------------------------------------------------------------------------------------------------------------------


def test_a_digest_identifies_the_content_and_not_how_it_was_made() -> None:
    files = (FileRecord("a.bin", "a.bin", 1, "1" * 64), FileRecord("b.bin", "b.bin", 2, "2" * 64))
    manifest = manifest_of(*files, provenance={"seconds": 1.0})
    same = [
        replace(manifest, provenance={"seconds": 2.0, "code": "other"}),
        replace(manifest, records=(FileRecord("history.json", "history.json", 5, "3" * 64),)),
        replace(manifest, metrics={"loss": 1.0}),
        replace(manifest, files=files[::-1]),
        replace(manifest, files=(replace(files[0], path="a.0123456789ab.bin"), files[1])),
    ]
    other = [
        replace(manifest, key="cd" * 32),
        replace(manifest, stage="generate"),
        replace(manifest, files=files[:1]),
        replace(manifest, files=(replace(files[0], sha256="4" * 64), files[1])),
        replace(manifest, files=(replace(files[0], name="c.bin"), files[1])),
    ]
    assert {each.digest for each in same} == {manifest.digest}
    assert len({each.digest for each in [manifest, *other]}) == len(other) + 1


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
def test_canonical_json_keeps_the_value_and_ignores_the_order(value: Any) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(inner) for inner in value] if isinstance(value, list) else value

    text = canonical_json(value)
    assert canonical_json(turned(value)) == text and json.loads(text) == value


def test_canonical_json_refuses_numbers_that_equal_nothing() -> None:
    for value in (math.nan, math.inf, -math.inf, {"deep": [math.nan]}):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json(value)


# Places --------------------------------------------------------------------------------------------------------------------


def test_checking_a_store_leaves_nothing_in_it(place: Place) -> None:
    place.store.check_writable()
    assert place.contents() == {}


def test_a_store_below_a_file_is_named_as_not_writable(tmp_path: Path) -> None:
    """Root may write everywhere, but not below a file."""
    (tmp_path / "file").write_text("in the way")
    store = open_store(str(tmp_path / "file" / "store"))
    with pytest.raises(StorageError, match=rf"the store {tmp_path}/file/store cannot be written"):
        store.check_writable()
    assert store.read_manifest(STAGE, KEY) is None and list(store.manifests()) == []
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_system_without_hard_links_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch) -> None:
    """Such as many that a network or a container mounts."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    store = open_store(str(tmp_path / "store"))
    sentence = rf"the store {tmp_path}/store .* without hard links \(Operation not permitted\).*store=\.\.\."
    with pytest.raises(StorageError, match=sentence):
        store.check_writable()
    assert list((tmp_path / "store").iterdir()) == []


def test_other_kinds_of_place_are_refused() -> None:
    with pytest.raises(StorageError, match="ftp://host/folder"):
        open_store("ftp://host/folder")


def test_a_relative_path_is_resolved_when_the_store_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs/store")
    monkeypatch.chdir("/")
    assert store.uri == str(tmp_path / "runs" / "store") and store.place(STAGE, KEY).startswith(store.uri)


def test_other_users_can_read_a_local_store(tmp_path: Path, local_store: ArtifactStore) -> None:
    """Temporary files begin as private to their user; artifacts are shared."""
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    local_store.commit(manifest_of(local_store.put_file(STAGE, KEY, "model.bin", source)))
    folder = Path(local_store.uri) / STAGE / KEY
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"model.bin": "0o644", MANIFEST: "0o644"}
