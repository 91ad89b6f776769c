"""Checkpoints: complete when every rank has written, readable by any number of ranks, never used if damaged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipelines.artifacts.manifest import PARTS, DamagedFileError, FileRecord
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError
from pipelines.storage.local import LocalFolder
from pipelines.tracking.run import RunHandle
from pipelines.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    Fragments,
    NoReadableCheckpointError,
    find_checkpoints,
    fragment_name,
    newest_checkpoint,
    open_checkpoint,
    own_share,
)
from pipelines.workflow.stage import WorkerContext

KEY = "ab" * 32


@dataclass
class Run:
    """A run and its checkpoints. damage: changes or removes a file of the run, by its name."""

    context: WorkerContext
    damage: Callable[[str, Callable[[bytes], bytes | None]], None]
    messages: list[str] = field(default_factory=list)

    def writer(self, rank: int = 0, world_size: int = 1, attempt: str = "a", **policy: Any) -> CheckpointWriter:
        kept = {"keep_last": 99, "keep_every": None, **policy}
        return CheckpointWriter(self.context, rank=rank, world_size=world_size, attempt=attempt, **kept)

    def write(self, step: int, rank: int, world_size: int, attempt: str = "a", **policy: Any) -> None:
        """Of one rank; the tensors of rank r hold step + r / 10."""
        writer = self.writer(rank, world_size, attempt, **policy)
        tensors = {fragment_name("weight", "w", rank * 4): torch.full((4,), step + rank / 10)}
        writer.save(step, tensors, {"step": step, "attempt": attempt})
        writer.wait()

    def save(self, step: int, world_size: int = 1, attempt: str = "a", **policy: Any) -> None:
        """Of all ranks."""
        for rank in reversed(range(world_size)):
            self.write(step, rank, world_size, attempt, **policy)

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in find_checkpoints(self.context) if checkpoint.is_whole]

    def newest(self) -> Checkpoint | None:
        return newest_checkpoint(self.context, self.messages.append)

    def opened(self, checkpoint: Checkpoint | None) -> tuple[dict[str, Any], torch.Tensor]:
        assert checkpoint is not None
        opened = open_checkpoint(self.context.store, self.context, checkpoint)
        return dict(opened.state), opened.tensors.read("weight", "w", 0, 4 * checkpoint.world_size)


in_folder_and_bucket = pytest.mark.parametrize("run", ["folder", "bucket"], indirect=True)


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    if getattr(request, "param", "folder") == "folder":
        store = open_store(str(tmp_path / "store"))

        def damage(name: str, change: Callable[[bytes], bytes | None]) -> None:
            path = tmp_path / "store" / "train" / KEY / name
            content = change(path.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)

    else:
        folder = request.getfixturevalue("make_bucket")()
        store, boto = open_store(folder.uri, folder.config), request.getfixturevalue("s3_endpoint").boto

        def damage(name: str, change: Callable[[bytes], bytes | None]) -> None:
            place = {"Bucket": folder.uri.removeprefix("s3://").partition("/")[0], "Key": f"train/{KEY}/{name}"}
            content = change(folder.read(place["Key"]))
            boto.delete_object(**place) if content is None else boto.put_object(**place, Body=content)

    return Run(WorkerContext(stage="train", key=KEY, store=store, run=RunHandle("", None)), damage)


# What counts as a checkpoint -----------------------------------------------------------------------------------------------


@in_folder_and_bucket
def test_tensors_and_state_of_all_ranks_round_trip(run):
    assert run.newest() is None and run.messages == []
    for step, world_size in ((7, 1), (8, 3)):
        run.save(step, world_size)
        state, values = run.opened(run.newest())
        assert state == {"step": step, "attempt": "a"}
        assert torch.equal(values, torch.tensor([step + rank / 10 for rank in range(world_size) for _ in range(4)]))


def test_checkpoint_is_complete_once_every_rank_of_an_attempt_has_written(run):
    for rank in (2, 0, 1):
        assert run.newest() is None
        run.write(5, rank, 3)
    newest = run.newest()
    assert newest is not None and newest.step == 5 and len(newest.tensors) == 3
    for step, writes in {
        6: ((1, 3, "a"), (2, 3, "a")),  # without rank 0, which writes the state
        7: ((0, 2, "first"), (1, 2, "second")),
        8: ((0, 2, "a"),),  # of another world size
    }.items():
        for write in writes:
            run.write(step, *write)
        found = [checkpoint for checkpoint in find_checkpoints(run.context) if checkpoint.step == step]
        assert found and not any(checkpoint.is_whole for checkpoint in found) and run.newest() == newest
        assert [checkpoint.state is None for checkpoint in found] == {6: [True], 7: [False, True], 8: [False]}[step]


def test_second_attempt_at_a_step_replaces_the_first_once_it_is_complete(run):
    """The first may be damaged, or from before a rollback. Files of attempts are separate: they may differ in rounding."""
    run.save(5, 2, "zz")
    for rank, expected in ((1, ["aa", "zz"]), (0, ["aa"])):
        run.write(5, rank, 2, "aa")
        assert [checkpoint.attempt for checkpoint in find_checkpoints(run.context)] == expected
        newest = run.newest()
        assert newest is not None and newest.attempt == run.opened(newest)[0]["attempt"] == expected[-1]


def test_newest_is_that_of_the_last_step(run):
    for step in (9, 10, 99_999_999, 100_000_000):  # in the order of numbers, where a name grows by a digit, too
        run.save(step)
        newest = run.newest()
        assert newest is not None and newest.step == step


# What is kept --------------------------------------------------------------------------------------------------------------


@in_folder_and_bucket
def test_last_ones_and_milestones_are_kept(run):
    for step in range(1, 9):
        run.save(step, 2, keep_last=2, keep_every=3)
    assert run.steps() == [3, 6, 7, 8]
    for checkpoint in find_checkpoints(run.context):
        assert run.opened(checkpoint)[0]["step"] == checkpoint.step


def test_checkpoint_that_is_not_kept_leaves_neither_records_nor_files(run):
    run.save(1)
    (first,) = find_checkpoints(run.context)
    run.save(2, keep_last=1)
    assert list(run.context.store.read_parts("train", KEY)) == ["checkpoint-00000002-a-00000-of-00001"]
    for record in first.files:
        with pytest.raises(StorageError, match="is gone"):
            run.context.store.fetch_file("train", KEY, record)


def test_last_complete_one_stays_while_the_next_is_written_and_incomplete_ones_go_after(run):
    run.save(1)
    run.write(2, 0, 2, "lost", keep_last=1)
    assert len(find_checkpoints(run.context)) == 2 and run.steps() == [1], "the incomplete one may yet become complete"
    run.save(3, keep_last=1)
    assert [checkpoint.step for checkpoint in find_checkpoints(run.context)] == [3]


def test_nothing_else_of_the_stage_is_removed(run, tmp_path):
    store = run.context.store
    store.put_part("train", KEY, "part-00001", {"rows": 1})
    store.put_part("train", "cd" * 32, "checkpoint-00000001-a-00000-of-00001", {"rows": 2})
    (tmp_path / "milestone").write_bytes(b"weights")
    milestone = store.put_file("train", KEY, "model-step-00000001.safetensors", tmp_path / "milestone")
    for step in range(1, 5):
        run.save(step, keep_last=1)
    assert store.read_parts("train", KEY)["part-00001"] == {"rows": 1}
    assert store.read_parts("train", "cd" * 32) == {"checkpoint-00000001-a-00000-of-00001": {"rows": 2}}
    assert store.fetch_file("train", KEY, milestone).read_bytes() == b"weights"
    assert run.steps() == [4]


# Damage --------------------------------------------------------------------------------------------------------------------


def test_records_with_other_fields_are_no_checkpoints(run):
    """Anyone who may write to the store can write them, with a checksum that is right."""
    store, file = run.context.store, {"name": "a", "path": "a", "size": 3, "sha256": "0" * 64}
    wrong = [{"tensors": None, "state": file}, {"tensors": file, "state": None}, {"tensors": 3}, {"state": file}, {}]
    for step, record in enumerate(wrong, start=1):
        store.put_part("train", KEY, f"checkpoint-{step:08d}-a-00000-of-00001", record)
    assert find_checkpoints(run.context) == [] and run.steps() == []
    run.save(7)
    assert run.steps() == [7]


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@in_folder_and_bucket
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("rank-00000.safetensors", _flip, "was changed after it was made"),
        ("rank-00001.safetensors", lambda content: content[:-9], "was changed"),
        ("rank-00001.safetensors", lambda _: None, "is gone"),
        ("state.json", _flip, "was changed after it was made"),
    ],
    ids=["flipped", "cut", "gone", "state"],
)
def test_damaged_one_is_reported_and_removed_and_the_one_before_is_used(run, name, change, reason):
    for step in (4, 8):
        run.save(step, 2)
    run.damage(f".work/step-00000008-a/{name}", change)
    assert run.opened(run.newest())[0]["step"] == 4
    (message,) = run.messages
    assert message.startswith("removed the damaged checkpoint of step 8; training resumes from step 4 (")
    assert name in message and reason in message and "to make the artifact again" not in message, (
        "that would remove the others, too"
    )
    assert run.newest() is not None and len(run.messages) == 1 and run.steps() == [4], "nothing of it remains"


def test_nothing_is_removed_if_all_are_damaged(run):
    for step in (4, 8):
        run.save(step)
        run.damage(f".work/step-{step:08d}-a/state.json", lambda _: b"")
    sentence = rf"all checkpoints are damaged \(steps 8, 4; step 8: .*state\.json was changed .*\).*{KEY}/\.parts to train"
    for _ in range(2):
        with pytest.raises(NoReadableCheckpointError, match=sentence):
            run.newest()
    assert run.steps() == [4, 8] and run.messages == []


@pytest.mark.parametrize(("keep_last", "num_damaged"), [(1, 1), (2, 2)])
def test_after_damage_the_next_ones_are_kept_and_the_good_one_goes_in_its_turn(run, keep_last, num_damaged):
    """Also those below the steps of the damaged ones: nothing is lost if training stops before it gets there."""
    damaged = [8, 12][:num_damaged]
    for step in (4, *damaged):
        run.save(step)
    for step in damaged:
        run.damage(f".work/step-{step:08d}-a/state.json", _flip)
    newest = run.newest()
    assert newest is not None and newest.step == 4
    for step, expected in ((6, [4, 6]), (7, [6, 7])):
        run.save(step, attempt="b", keep_last=keep_last)
        assert run.steps() == expected[-keep_last:] and run.opened(run.newest())[0]["step"] == step


@pytest.mark.parametrize("keep_last", [1, 2])
def test_later_steps_of_another_attempt_do_not_count_until_they_are_reached(run, keep_last):
    """They may be damaged: checkpoints written now are kept as if there were no others."""
    for step in (8, 12):
        run.save(step, attempt="a")
    for step, expected in ((2, [2]), (3, [2, 3]), (5, [3, 5])):
        run.save(step, attempt="b", keep_last=keep_last)
        assert run.steps() == [*expected[-keep_last:], 8, 12]
    run.save(13, attempt="b", keep_last=keep_last)
    assert run.steps() == [12, 13][-keep_last:]


@pytest.mark.parametrize("run", ["bucket"], indirect=True)
def test_full_cache_is_not_reported_as_damage(run, tmp_path, monkeypatch):
    """The files may be intact then: training from step 0 would replace good checkpoints."""
    run.save(4)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="cannot be used") as raised:
        run.newest()
    assert not isinstance(raised.value, (DamagedFileError, NoReadableCheckpointError)) and run.steps() == [4]


@in_folder_and_bucket
def test_torn_record_is_not_a_checkpoint_and_can_be_written_again(run, caplog):
    for step in (4, 8):
        run.save(step)
    for content in (b"", b'{"tensors": {"na', b"[]"):
        run.damage(f"{PARTS}/checkpoint-00000008-a-00000-of-00001.json", lambda _, content=content: content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            newest = run.newest()
        assert newest is not None and newest.step == 4
        assert "checkpoint-00000008-a-00000-of-00001.json is damaged" in caplog.text
        run.save(8)
        assert run.opened(run.newest())[0]["step"] == 8


# Writing -------------------------------------------------------------------------------------------------------------------


class SlowStore(ArtifactStore):
    """Files are stored once `go` is set; where `error` is given, storing fails with it."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalFolder(root))
        self.go, self.begun, self.error = threading.Event(), threading.Event(), ""

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        self.begun.set()
        assert self.go.wait(30)
        if self.error:
            raise StorageError(self.error)
        return super().put_file(stage, key, name, source)


@pytest.fixture
def slow(tmp_path):
    store = SlowStore(tmp_path / "store")
    yield Run(WorkerContext(stage="train", key=KEY, store=store, run=RunHandle("", None)), lambda *_: None)
    store.go.set()


def test_training_continues_while_a_checkpoint_is_written_and_the_next_save_waits(slow):
    writer, store = slow.writer(), slow.context.store
    writer.save(1, {"weight/w@0": torch.ones(4)}, {"step": 1})
    assert store.begun.wait(30) and slow.steps() == []
    threading.Timer(0.2, store.go.set).start()
    writer.save(2, {"weight/w@0": torch.ones(4)}, {})
    assert slow.steps()[:1] == [1] and writer.seconds_waited > 0.1
    writer.wait()
    assert slow.steps() == [1, 2]


def test_changes_after_save_are_not_stored(slow):
    weights, history, writer = torch.ones(4), [{"loss": 1.0}], slow.writer()
    writer.save(1, {"weight/w@0": weights}, {"history": history})
    weights.zero_()
    history.append({"loss": 2.0})
    slow.context.store.go.set()
    writer.wait()
    state, values = slow.opened(slow.newest())
    assert state == {"history": [{"loss": 1.0}]} and torch.equal(values, torch.ones(4))


@pytest.mark.parametrize("is_saved_again", [True, False])
def test_error_of_writing_is_raised_by_the_next_save_or_wait(slow, is_saved_again):
    writer, store = slow.writer(), slow.context.store
    store.error = "the store is full"
    store.go.set()
    writer.save(1, {"weight/w@0": torch.ones(4)}, {})
    with pytest.raises(StorageError, match="the store is full"):
        writer.save(2, {"weight/w@0": torch.ones(4)}, {}) if is_saved_again else writer.wait()
    assert slow.newest() is None
    store.error = ""
    writer.save(3, {"weight/w@0": torch.ones(4)}, {})
    writer.wait()
    assert slow.steps() == [3]


# Fragments -----------------------------------------------------------------------------------------------------------------


def _cut(values: torch.Tensor, folder: Path, borders: list[int], kind: str = "weight") -> tuple[Path, ...]:
    """One file for each piece of the values between borders."""
    paths = []
    for low, high in zip([0, *borders], [*borders, len(values)], strict=True):
        path = folder / f"{kind}-{len(paths)}.safetensors"
        save_file({fragment_name(kind, "block.weight", low): values[low:high].clone()}, path)
        paths.append(path)
    return tuple(paths)


@given(st.data())
def test_values_come_back_however_they_were_cut(tmp_path_factory, data):
    values = torch.randn(data.draw(st.integers(1, 40)), generator=torch.Generator().manual_seed(0))
    borders = sorted(data.draw(st.sets(st.integers(0, len(values)), max_size=5)))
    fragments = Fragments(_cut(values, tmp_path_factory.mktemp("cut"), borders))
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    assert torch.equal(fragments.read("weight", "block.weight", start, stop - start), values[start:stop])


def test_values_that_are_missing_are_named(tmp_path):
    first, _, last = _cut(torch.arange(12.0), tmp_path, [4, 8])
    fragments = Fragments((first, last))
    assert torch.equal(fragments.read("weight", "block.weight", 9, 3), torch.tensor([9.0, 10.0, 11.0]))
    for start, length in ((2, 8), (4, 1), (10, 3)):
        with pytest.raises(KeyError, match=rf"weight of block\.weight has \d+ of {length} values from {start} on"):
            fragments.read("weight", "block.weight", start, length)
    for kind, name in (("ema", "block.weight"), ("weight", "other")):
        with pytest.raises(KeyError):
            fragments.read(kind, name, 0, 1)


def _module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2))


def test_shares_of_all_ranks_are_every_value_once(tmp_path):
    module = _module()
    for world_size in (1, 2, 3, 8):
        paths = [tmp_path / f"{world_size}-{rank}" for rank in range(world_size)]
        shares = [dict(own_share("ema", module, rank, world_size)) for rank in range(world_size)]
        names = [name for share in shares for name in share]
        assert sorted(names) == sorted(fragment_name("ema", name, 0) for name, _ in module.named_parameters())
        for share, path in zip(shares, paths, strict=True):
            save_file(share, path)
        filled, fragments = _module(), Fragments(tuple(paths))
        assert fragments.kinds() == {"ema"}
        fragments.fill("ema", filled)
        assert all(torch.equal(mine, value) for mine, value in zip(filled.parameters(), module.parameters(), strict=True))
