"""What is removed and what is kept, and nothing that is in use is lost: in folders and in buckets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from material.places import Place, folder_place, key_of, make, make_chain
from pipelines.artifacts import garbage
from pipelines.artifacts.garbage import Outcome, Plan
from pipelines.artifacts.manifest import MANIFEST, USED, Manifest, name_of, sealed
from pipelines.artifacts.store import ArtifactStore

DAY = 86400.0


@pytest.fixture
def chain(place: Place) -> SimpleNamespace:
    """Artifacts that are 40 days old."""
    made = make_chain(place.store)
    place.age("", 40 * DAY)
    return made


@pytest.fixture
def old(place: Place) -> Manifest:
    """One artifact, 40 days old by its files."""
    manifest = make(place.store, "train/a", provenance={})
    place.age("", 40 * DAY)
    return manifest


def _plan(place: Place, days: float = 30, **roots: Any) -> Plan:
    return garbage.plan(place.store, limit=time.time() - days * DAY, **roots)


def _names(manifests: list[Manifest]) -> set[tuple[str, str]]:
    return {name_of(manifest) for manifest in manifests}


def _going(planned: Plan, kind: str = "artifact") -> set[tuple[str, str]]:
    return {(removal.stage, removal.key) for removal in planned.removals if removal.kind == kind}


def _left(store: ArtifactStore) -> set[tuple[str, str]]:
    return _names(list(store.manifests()))


def _touch(place: Place, manifest: Manifest) -> None:
    place.store.record_use(*name_of(manifest))


# What is kept --------------------------------------------------------------------------------------------------------------


def test_an_empty_store_has_nothing_to_remove(place: Place) -> None:
    planned = _plan(place)
    assert planned.removals == [] and planned.kept == {} and garbage.collect(place.store, planned) == Outcome()


def test_unused_artifacts_are_removed_before_those_that_they_were_made_from(place: Place, chain) -> None:
    planned = _plan(place)
    assert _going(planned) == _names([*vars(chain).values()]) and planned.kept == {}
    order = [(removal.stage, removal.key) for removal in planned.removals]
    for manifest in vars(chain).values():
        for source in manifest.inputs.values():
            assert order.index(name_of(manifest)) < order.index((source["stage"], source["key"]))
    assert sum(removal.size for removal in planned.removals) == sum(map(len, place.contents().values()))
    garbage.collect(place.store, planned)
    assert place.contents() == {} and list(place.store.names()) == []


def test_recent_artifacts_and_their_inputs_are_kept(place: Place, chain) -> None:
    assert _going(_plan(place, days=41)) == set()
    _touch(place, chain.second)
    planned = _plan(place)
    assert _going(planned) == _names([chain.first, chain.samples, chain.scores])
    assert planned.kept == {
        name_of(chain.second): "recent",
        **dict.fromkeys(_names([chain.map, chain.tokenizer, chain.dataset]), "needed"),
    }
    outcome = garbage.collect(place.store, planned)
    assert len(outcome.removed) == 3 and outcome.spared == []
    assert _left(place.store) == _names([chain.second, chain.map, chain.tokenizer, chain.dataset])
    assert not any(key_of("first") in name for name in place.contents())


def test_named_and_registered_artifacts_and_their_inputs_are_kept(place: Place, chain) -> None:
    for reason in ("named", "registered"):
        planned = _plan(place, **{reason: {name_of(chain.samples), ("train", "f" * 64)}})
        assert _going(planned) == _names([chain.second, chain.scores])
        assert planned.kept[name_of(chain.samples)] == reason and planned.kept[name_of(chain.dataset)] == "needed"


def test_the_age_of_an_artifact_is_that_of_its_newest_file_or_of_its_manifest(place: Place, chain) -> None:
    """Recent artifacts of a copied store stay, although the times of its files may be anything."""
    created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    fresh = make(place.store, "train/fresh", provenance={"created": created})
    place.age("", 40 * DAY)
    place.damage(f"train/{chain.second.key}/notes.txt", b"of a reader")
    planned = _plan(place)
    assert planned.kept[name_of(fresh)] == planned.kept[name_of(chain.second)] == "recent"


def test_inputs_of_an_active_stage_are_kept(place: Place, chain) -> None:
    """Even if it takes longer than the limit: its checkpoints are young."""
    unfinished = ("train", key_of("third"))
    place.store.record_use(*unfinished, [name_of(chain.map), name_of(chain.tokenizer)])
    place.age("", 40 * DAY)
    place.store.put_part(*unfinished, "checkpoint-1", {"step": 1})
    planned = _plan(place)
    assert planned.kept == dict.fromkeys(_names([chain.map, chain.tokenizer, chain.dataset]), "needed")
    assert _going(planned, "unfinished") == set()
    place.age("", 40 * DAY)
    planned = _plan(place)
    assert planned.kept == {} and _going(planned, "unfinished") == {unfinished}


# Unfinished stages and stray files -----------------------------------------------------------------------------------------


def test_abandoned_work_is_removed_and_active_work_is_kept(place: Place, chain) -> None:
    for name in ("old", "new"):
        place.store.put_part("train", key_of(name), "checkpoint-1", {"step": 1})
        place.damage(f"train/{key_of(name)}/.work/step-1/a.bin", bytes(100))
    place.age(f"train/{key_of('old')}", 40 * DAY)
    planned = _plan(place, named=_names([*vars(chain).values()]))
    (removal,) = planned.removals
    assert (removal.kind, removal.key, removal.size) == ("unfinished", key_of("old"), 100 + len(sealed({"step": 1})))
    garbage.collect(place.store, planned)
    assert place.store.read_parts("train", key_of("old")) == {} and place.store.read_parts("train", key_of("new"))
    assert not any(key_of("old") in name for name in place.contents())


def test_work_that_resumes_after_the_plan_is_kept(place: Place) -> None:
    place.store.put_part("train", key_of("a"), "checkpoint-1", {"step": 1})
    place.age("", 40 * DAY)
    planned = _plan(place)
    place.store.put_part("train", key_of("a"), "checkpoint-2", {"step": 2})
    outcome = garbage.collect(place.store, planned)
    assert [reason for _, reason in outcome.spared] == ["work on it continues"] and outcome.removed == []
    assert len(place.store.read_parts("train", key_of("a"))) == 2


def test_old_files_that_no_manifest_names_are_removed(place: Place) -> None:
    manifest = make(place.store, "train/a", files={"model.bin": b"weights"}, provenance={})
    folder = f"train/{manifest.key}"
    for name in ("model.0123456789ab.bin", ".tmp-x", ".parts/part-0.json", ".work/step-1/a.bin"):
        place.damage(f"{folder}/{name}", b"old")
    place.age("", 40 * DAY)
    place.damage(f"{folder}/young.bin", b"young")
    place.store.record_use(*name_of(manifest))
    planned = _plan(place)
    assert [(removal.kind, len(removal.files), removal.size) for removal in planned.removals] == [("stray files", 4, 12)]
    garbage.collect(place.store, planned)
    assert {name.removeprefix(f"{folder}/") for name in place.contents()} == {MANIFEST, USED, "model.bin", "young.bin"}


# Runs at the same moment ------------------------------------------------------------------------------------------


def test_artifacts_used_after_the_plan_and_their_inputs_are_kept(place: Place, chain) -> None:
    planned = _plan(place)
    _touch(place, chain.samples)
    outcome = garbage.collect(place.store, planned)
    needed = _names([chain.samples, chain.first, chain.map, chain.tokenizer, chain.dataset])
    assert _left(place.store) == needed and {(spared.stage, spared.key) for spared, _ in outcome.spared} == needed
    reasons = {(spared.stage): reason for spared, reason in outcome.spared}
    assert reasons["generate"] == "it was used meanwhile" and "something made from it" in reasons["dataset"]


def _when(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, method: str, act: Callable[[], object], *, after: bool = False
) -> None:
    """Act once, just before or after the first call of a method of the store."""
    original, waiting = getattr(type(store), method), [act]

    def replaced(self: ArtifactStore, *arguments: Any) -> Any:
        if waiting and not after:
            waiting.pop()()
        answer = original(self, *arguments)
        if waiting:
            waiting.pop()()
        return answer

    monkeypatch.setattr(type(store), method, replaced)


def _when_files_go(place: Place, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act once, just before the first file is removed that is neither a manifest nor a record."""
    original, waiting = type(place.store).delete_files, [act]

    def delete_files(self: ArtifactStore, stage: str, key: str, paths: Any) -> None:
        paths = [*paths]
        if waiting and paths != [MANIFEST] and not any(path.startswith(".parts/") for path in paths):
            waiting.pop()()
        original(self, stage, key, paths)

    monkeypatch.setattr(type(place.store), "delete_files", delete_files)


@pytest.mark.parametrize("after", [False, True], ids=["before its manifest is removed", "after that"])
def test_an_artifact_used_at_the_last_moment_is_restored(
    place: Place, old: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: bool
) -> None:
    planned = _plan(place)
    _when(place.store, monkeypatch, "delete_manifest", lambda: _touch(place, old), after=after)
    outcome = garbage.collect(place.store, planned)
    assert [reason for _, reason in outcome.spared] == ["it was used meanwhile"]
    assert place.store.read_manifest(*name_of(old)) == old
    assert place.store.fetch(old, "file.bin").read_bytes() == b"train/a"


def test_a_run_that_starts_while_files_are_removed_finds_no_artifact(place: Place, old: Manifest, monkeypatch) -> None:
    planned, seen = _plan(place), []

    def run() -> None:
        _touch(place, old)
        seen.append(place.store.read_manifest(*name_of(old)))

    _when_files_go(place, monkeypatch, run)
    garbage.collect(place.store, planned)
    assert seen == [None]
    assert make(place.store, "train/a", provenance={}) == old, "it is made again"


def test_a_damaged_artifact_used_at_the_last_moment_is_not_restored(place: Place, old: Manifest, monkeypatch) -> None:
    place.damage(f"train/{old.key}/file.bin", b"")
    place.age("", 40 * DAY)
    planned = _plan(place)
    _when(place.store, monkeypatch, "delete_manifest", lambda: _touch(place, old), after=True)
    garbage.collect(place.store, planned)
    assert place.store.read_manifest(*name_of(old)) is None


@pytest.mark.parametrize("kind", ["artifact", "unfinished"])
def test_a_run_that_reuses_files_during_their_removal_leaves_no_broken_artifact(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    manifest = make(place.store, "train/a", provenance={})
    if kind == "unfinished":
        place.store.put_part(*name_of(manifest), "checkpoint-1", {"step": 1})
        place.store.delete_manifest(*name_of(manifest))
    place.age("", 40 * DAY)
    planned = _plan(place)
    assert _going(planned, kind) == {name_of(manifest)}

    def run() -> None:
        _touch(place, manifest)
        assert make(place.store, "train/a", provenance={}) == manifest

    _when_files_go(place, monkeypatch, run)
    garbage.collect(place.store, planned)
    assert place.store.read_manifest(*name_of(manifest)) is None
    assert f"train/{manifest.key[:12]} was made from files that were being removed, and is removed again" in caplog.text
    assert {name.rpartition("/")[2] for name in place.contents()} == {USED}, "the run's note stays"
    assert make(place.store, "train/a", provenance={}) == manifest, "it is made again"


def test_an_artifact_made_during_a_removal_is_kept(place: Place, old: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, made = _plan(place), []
    _when_files_go(
        place, monkeypatch, lambda: made.append(make(place.store, "train/a", files={"other.bin": b"other"}, provenance={}))
    )
    outcome = garbage.collect(place.store, planned)
    assert [reason for _, reason in outcome.spared] == ["it was made again meanwhile"]
    assert place.store.read_manifest(*name_of(old)) == made[0]
    assert place.store.fetch(made[0], "other.bin").read_bytes() == b"other"


def test_files_of_parts_are_kept_for_a_run_that_starts_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have read the records, and relies on the files that they name."""
    name = ("train", key_of("a"))
    place.damage("/".join((*name, "part-0.bin")), b"part")
    place.store.put_part(*name, "part-0", {"rows": 1})
    place.age("", 40 * DAY)
    planned = _plan(place)
    _when(place.store, monkeypatch, "delete_files", lambda: place.store.record_use(*name), after=False)
    outcome = garbage.collect(place.store, planned)
    assert [reason for _, reason in outcome.spared] == ["work on it continues"]
    assert {path.rpartition("/")[2] for path in place.contents()} == {"part-0.bin", USED}


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 4])
def test_a_removal_that_is_killed_leaves_no_artifact_without_its_files(
    place: Place, chain, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """After any request, artifacts with a manifest are whole, and the next removal takes the rest."""
    planned, original, made = _plan(place), type(place.store).delete_files, []

    def delete_files(self: ArtifactStore, *arguments: Any) -> None:
        made.append(arguments)
        if len(made) > calls:
            raise _KilledError
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(place.store), "delete_files", delete_files)
        with pytest.raises(_KilledError):
            garbage.collect(place.store, planned)
    left = list(place.store.manifests())
    assert left
    for manifest in left:
        assert place.store.fetch(manifest, "file.bin").read_bytes()
    for name in list(place.store.names()):  # so that a folder without a manifest is recognized as this program's
        place.store.record_use(*name)
    place.age("", 40 * DAY)
    garbage.collect(place.store, _plan(place))
    assert place.contents() == {}


# Hostile stores ------------------------------------------------------------------------------------------------------------

FOREIGN = {
    "readme.txt": b"1",
    "train/notes.txt": b"2",
    f"photos/{'a' * 64}/holiday.jpg": b"3",
    f"photos/{'b' * 64}/{MANIFEST}": b'{"name": "a web application"}',
    f"photos/{'c' * 64}/index.html": b"4",
    f"Train/{'a' * 64}/file": b"5",
    f"train/{'a' * 63}/file": b"6",
}


def test_foreign_files_in_the_store_are_kept(place: Place, chain) -> None:
    for name, content in FOREIGN.items():
        place.damage(name, content)
    place.age("", 40 * DAY)
    garbage.collect(place.store, _plan(place))
    assert place.contents() == FOREIGN


def test_a_damaged_manifest_is_named_and_keeps_its_folder_and_its_known_inputs(place: Place, chain) -> None:
    text = chain.second.to_json().replace(b'"stage_version"', b'"version_of_the_stage"')
    place.damage(f"train/{chain.second.key}/{MANIFEST}", text)
    place.damage(f"evaluate/{chain.scores.key}/{MANIFEST}", b"no JSON")
    place.age("", 40 * DAY)
    before = place.contents()
    planned = _plan(place)
    assert {(damaged.stage, damaged.key) for damaged in planned.damaged} == _names([chain.second, chain.scores])
    garbage.collect(place.store, planned)
    assert _left(place.store) == _names([chain.map, chain.tokenizer, chain.dataset])
    for damaged in (chain.second, chain.scores):
        assert {name for name in before if damaged.key in name} == {name for name in place.contents() if damaged.key in name}


def test_a_manifest_cannot_remove_files_outside_its_folder(place: Place) -> None:
    victim = make(place.store, "train/victim", provenance={})
    for number, path in enumerate(("../../outside.txt", f"../{victim.key}/file.bin", "/etc/hostname")):
        hostile = make(place.store, f"train/hostile-{number}", provenance={})
        text = hostile.to_json().replace(b'"path": "file.bin"', f'"path": "{path}"'.encode())
        assert text != hostile.to_json()
        place.damage(f"train/{hostile.key}/{MANIFEST}", text)
    place.damage("outside.txt", b"x")
    place.age("", 40 * DAY)
    before = set(place.contents())
    garbage.collect(place.store, _plan(place, named={name_of(victim)}))
    assert set(place.contents()) == before and place.store.fetch(victim, "file.bin").read_bytes() == b"train/victim"


def test_circular_and_missing_inputs_are_handled(place: Place) -> None:
    first, second = (("train", key_of(name)) for name in "ab")
    for own, other in ((first, second), (second, first)):
        inputs = {"x": {"stage": other[0], "key": other[1], "digest": "d"}, "y": {"stage": "train", "key": "f" * 64, "digest": "d"}}
        place.store.commit(Manifest(stage="train", key=own[1], stage_version=1, config={}, inputs=inputs, files=()))
    place.age("", 40 * DAY)
    assert set(_plan(place, named={first}).kept) == {first, second}
    garbage.collect(place.store, _plan(place))
    assert place.contents() == {}


def test_artifacts_behind_a_link_and_their_inputs_are_kept(tmp_path: Path) -> None:
    place, elsewhere = folder_place(tmp_path / "store"), folder_place(tmp_path / "elsewhere")
    dataset = make(place.store, "dataset/d", provenance={})
    linked = make(elsewhere.store, "train/linked", dataset, provenance={})
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("kept")
    unlinked = make(place.store, "token_map/m", dataset, provenance={})
    (Path(place.store.uri) / "token_map" / unlinked.key / "link").symlink_to(secret)
    (Path(place.store.uri) / "token_map" / unlinked.key / "file-link").symlink_to(secret / "file")
    (Path(place.store.uri) / "train").symlink_to(tmp_path / "elsewhere" / "train")
    for each in (place, elsewhere):
        each.age("", 40 * DAY)
    os.utime(Path(place.store.uri) / "token_map" / unlinked.key / "file-link", (0, 0), follow_symlinks=False)
    planned = _plan(place)
    assert planned.kept == {name_of(linked): "elsewhere", name_of(dataset): "needed"}
    garbage.collect(place.store, planned)
    assert elsewhere.store.fetch(linked, "file.bin").read_bytes() and (secret / "file").read_text() == "kept"
    assert place.store.read_manifest(*name_of(unlinked)) is None
