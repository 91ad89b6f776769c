"""The training loop: what it trains equals a plain loop, whatever the workers, and survives their loss.

Ranks are plain processes (tiny_training.py); what Ray adds to them is in test_train_stage.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_training import (
    CONFIG,
    Material,
    RankLostError,
    Trained,
    assert_close,
    changed,
    make_material,
    train,
    train_plainly,
)

from pipelines.artifacts import FileRecord, LocalStore, StoreError, open_store
from pipelines.batches import GroupBatch
from pipelines.checkpoints import find_checkpoints, open_checkpoint
from pipelines.tracking import RunHandle
from pipelines.train_config import TrainConfig
from pipelines.train_loop import Trainer, initial_model
from pipelines.train_monitor import DivergedError
from pipelines.workflow import WorkerContext

Plainly = Callable[[TrainConfig], Trained]
OPTIONS = {
    "model": {"qk_norm": True, "dropout": 0.1},
    "learning_rate_schedule": "cosine",
    "gradient_clip": 0.2,
    "z_loss": 1e-2,
    "weight_decay_on": "matrices",
    "weight_decay": 0.3,
}


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """Of the store, for one test alone."""
    return request.node.name


@pytest.fixture(scope="module")
def plainly(material: Material) -> Plainly:
    """The plain loop's training under a config, computed once."""
    return cache(lambda config: train_plainly(material, config))


@pytest.fixture(scope="module")
def plain(plainly: Plainly) -> Trained:
    return plainly(CONFIG)


def _context(material: Material, key: str) -> WorkerContext:
    return WorkerContext(stage="train", key=key, store=material.store, run=RunHandle("", None))


def _checkpoint_steps(material: Material, key: str) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(_context(material, key)) if checkpoint.is_whole]


def _weights(material: Material, key: str, record: FileRecord) -> dict[str, torch.Tensor]:
    return load_file(material.store.fetch_file("train", key, record))


def _assert_same_bits(mine: Trained, other: Trained) -> None:
    for ours, theirs in ((mine.raw, other.raw), (mine.ema, other.ema)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert mine.column("step") == other.column("step") and mine.column("loss") == other.column("loss")


# What is trained -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "zero_stage"), [(1, 0), (2, 1), (2, 2), (2, 3), pytest.param(2, 0, marks=pytest.mark.faults)]
)
def test_workers_train_what_a_plain_loop_trains(
    material: Material, plain: Trained, key: str, world_size: int, zero_stage: int
) -> None:
    """On gloo: losses to a relative 1e-5, raw and EMA weights to 1e-5, whatever is shared out."""
    trained = train(material, changed(execution={"zero_stage": zero_stage}), key, world_size=world_size)
    assert_close(trained, plain)
    np.testing.assert_allclose(trained.column("gradient_norm"), plain.column("gradient_norm"), rtol=1e-4)
    np.testing.assert_allclose(trained.column("token_accuracy"), plain.column("token_accuracy"), atol=1e-6)


def test_the_comparison_could_fail(material: Material, plain: Trained) -> None:
    """Twelve steps move the weights by far more than the tolerance, and the EMA stays apart from them."""
    name = "token_embedding.weight"
    initial = initial_model(material.architecture(CONFIG), 0).state_dict()
    assert (plain.raw[name] - initial[name]).abs().max() > 1e-3 and (plain.raw[name] - plain.ema[name]).abs().max() > 1e-3
    assert plain.history[0]["loss"] - plain.history[-1]["loss"] > 0.01


@pytest.mark.parametrize(
    ("world_size", "zero_stage"), [(2, 2), *(pytest.param(*pair, marks=pytest.mark.faults) for pair in ((1, 0), (2, 3)))]
)
def test_all_options_at_once_train_what_a_plain_loop_trains(
    material: Material, key: str, world_size: int, zero_stage: int, plainly: Plainly
) -> None:
    """Microbatches and activation checkpointing are ways to compute the same; the others are in the plain loop, too."""
    execution = {"zero_stage": zero_stage, "microbatches": 2, "activation_checkpointing": True}
    config = changed(execution=execution, **OPTIONS)
    other = plainly(config)
    assert min(other.column("gradient_norm")) > 0.2, "every step is clipped"
    trained = train(material, config, key, world_size=world_size)
    assert_close(trained, other, atol=3e-5)
    np.testing.assert_allclose(trained.column("gradient_norm"), other.column("gradient_norm"), rtol=1e-4)


def test_a_text_model_trains_what_a_plain_loop_trains(material: Material, key: str, plainly: Plainly) -> None:
    config = changed(model={"text": True}, label_dropout=0.5, execution={"zero_stage": 3})
    assert_close(train(material, config, key, world_size=2), plainly(config))


def test_groups_that_ranks_cannot_share_equally_train_the_same(material: Material, plain: Trained, key: str) -> None:
    """Four groups, three ranks: two of them take part in a second pass without weight."""
    assert_close(train(material, CONFIG, key, world_size=3), plain)


class EmaWatcher(Trainer):
    """Keeps an EMA of its own of the weights after every step, and compares at the end."""

    def start(self, checkpoint: Any, diverged: Any = None) -> None:
        super().start(checkpoint, diverged)
        self.own_ema = {name: value.clone() for name, value in self.ema.named_parameters()}

    def train_step(self) -> None:
        super().train_step()
        weights = self.engine.weights()
        for name, value in self.own_ema.items() if self.rank == 0 else ():
            value.mul_(self.config.ema_decay).add_(weights[name], alpha=1 - self.config.ema_decay)

    def store_result(self) -> Any:
        assert {parameter.dtype for parameter in (*self.engine.model.parameters(), *self.ema.parameters())} == {torch.float32}
        for name, value in self.ema.named_parameters() if self.rank == 0 else ():
            torch.testing.assert_close(value, self.own_ema[name], rtol=0, atol=1e-6)
        return super().store_result()


@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [
        ("fp16", 1),
        *(
            pytest.param(*pair, marks=pytest.mark.faults)
            for pair in (*(("bf16", stage) for stage in range(4)), ("fp16", 2), ("fp16", 3))
        ),
    ],
)
def test_in_half_precision_weights_stay_float32_and_the_ema_is_theirs(
    material: Material, key: str, precision: str, zero_stage: int, plainly: Plainly
) -> None:
    """Losses follow the plain loop under torch's autocast as closely as rounding lets them."""
    config = changed(precision=precision, num_steps=6, execution={"zero_stage": zero_stage})
    trained = train(material, config, key, world_size=2, trainer_class=EmaWatcher)
    other = plainly(config)
    np.testing.assert_allclose(trained.column("loss"), other.column("loss"), rtol=1e-3)
    np.testing.assert_allclose(trained.column("gradient_norm"), other.column("gradient_norm"), rtol=0.02)
    exact = plainly(replace(config, precision="fp32"))
    assert trained.column("loss") != pytest.approx(exact.column("loss"), rel=1e-6), "computed in half precision"
    assert ("loss_scale" in trained.history[0]) is (precision == "fp16")


# Going on ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_was_stopped_and_resumed_is_one_that_was_not_bit_for_bit(material: Material, key: str, world_size: int) -> None:
    """What one rank is asked reaches all in the next step; the step they stop at is no multiple of anything."""
    whole = train(material, CONFIG, f"{key}-whole", world_size=world_size)
    stopped = train(material, CONFIG, key, world_size=world_size, stop_at=6)
    assert stopped.result is not None and stopped.result.files == () and stopped.result.step == 7
    assert stopped.column("step") == list(range(1, 8)) and _checkpoint_steps(material, key)[-1] == 7
    resumed = train(material, CONFIG, key, world_size=world_size)
    _assert_same_bits(resumed, whole)
    assert resumed.result is not None and resumed.result.num_restarts == 1
    assert resumed.messages == ()


class Recorder(Trainer):
    """Notes which groups its rank learned from."""

    def _learn(self, batch: GroupBatch, *rest: Any) -> None:
        if batch.weight:
            with (Path(os.environ["NOTES"]) / f"{self.rank}").open("a") as notes:
                notes.write(f"{self.step} {batch.step} {batch.group} {batch.codes.tolist()}\n")
        super()._learn(batch, *rest)


def test_from_two_workers_to_one_and_back_nothing_changes(
    material: Material, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 50 steps: the same groups, each once, and losses to a relative 1e-5 in every step."""
    config = changed(num_steps=50, execution={"zero_stage": 2})
    noted = {}
    for name, spread in (("whole", [(1, None)]), ("moved", [(2, 16), (1, 16), (2, None)])):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("NOTES", str(tmp_path / name))
        for world_size, stop_at in spread:
            trained = train(material, config, f"{key}-{name}", world_size=world_size, trainer_class=Recorder, stop_at=stop_at)
        lines = [line for path in (tmp_path / name).iterdir() for line in path.read_text().splitlines()]
        noted[name] = sorted(lines), trained
    (groups, moved), (expected, whole) = noted["moved"], noted["whole"]
    assert groups == expected and len(groups) == 50 * config.num_groups
    np.testing.assert_allclose(moved.column("loss"), whole.column("loss"), rtol=1e-5)
    assert moved.column("step") == list(range(1, 51))
    assert set(moved.column("num_workers")) == {1, 2}


class Killed(Trainer):
    """Its last rank is lost once, after step 6, when the checkpoint of step 4 is whole."""

    def train_step(self) -> None:
        super().train_step()
        mark = Path(os.environ["NOTES"]) / "killed"
        if self.step == 6 and self.rank == self.world_size - 1 and not mark.exists():
            deadline = time.monotonic() + 30
            while not any(checkpoint.is_whole for checkpoint in find_checkpoints(self.task.context)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, material: Material, vqgan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Material:
    monkeypatch.setenv("NOTES", str(tmp_path))
    if request.param == "folder":
        return material
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    folder = request.getfixturevalue("make_bucket")("store")
    return make_material(open_store(folder.uri, folder.config), vqgan, tmp_path)


@pytest.mark.parametrize(
    ("place", "zero_stage"), [("folder", 1), pytest.param("bucket", 3, marks=pytest.mark.faults)], indirect=["place"]
)
def test_a_run_whose_worker_was_killed_goes_on_from_the_last_checkpoint(
    place: Material, plain: Trained, key: str, zero_stage: int
) -> None:
    config = changed(execution={"zero_stage": zero_stage})
    with pytest.raises((RankLostError, RuntimeError)):
        train(place, config, key, world_size=2, trainer_class=Killed)
    assert _checkpoint_steps(place, key) == [4]
    resumed = train(place, config, key, world_size=2, trainer_class=Killed)
    assert_close(resumed, plain)
    assert resumed.result is not None and resumed.result.num_restarts == 1 and _checkpoint_steps(place, key) == [4, 8]


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(material: Material, plain: Trained, key: str) -> None:
    train(material, CONFIG, key, world_size=2, stop_at=8)
    assert _checkpoint_steps(material, key) == [8, 9]
    newest = find_checkpoints(_context(material, key))[-1]
    assert isinstance(material.store, LocalStore)
    path = material.store.root / "train" / key / newest.tensors[1].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    resumed = train(material, CONFIG, key, world_size=2)
    (message,) = resumed.messages
    assert (
        message.startswith("the checkpoint of step 9 is damaged, the one before it is taken") and newest.tensors[1].path in message
    )
    assert_close(resumed, plain)


def test_a_node_that_is_about_to_go_has_a_checkpoint_saved_once(material: Material, plain: Trained, key: str) -> None:
    """Ray's watcher tells from step 5 on, over and over; training goes on until Ray ends it."""
    trained = train(material, changed(execution={"keep_last": 9}), key, world_size=2, preempt_at=5)
    assert _checkpoint_steps(material, key) == [4, 6, 8]
    assert_close(trained, plain)


class PreemptedRank(Trainer):
    """Only the node of the last rank is about to go."""

    def __init__(self, task: Any, device: torch.device) -> None:
        if dist.get_rank() == 0:
            task.reporter.preempt_at = None
        super().__init__(task, device)


def test_what_one_rank_is_told_makes_all_ranks_save(material: Material, key: str) -> None:
    train(material, changed(execution={"keep_last": 9}), key, world_size=2, preempt_at=5, trainer_class=PreemptedRank)
    assert _checkpoint_steps(material, key) == [4, 6, 8]


def test_a_stop_in_the_last_step_ends_as_a_run_that_is_done(material: Material, plain: Trained, key: str) -> None:
    assert_close(train(material, CONFIG, key, stop_at=12), plain)


class FullStore(LocalStore):
    """A store that takes no checkpoint any more."""

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        if name.startswith(".work/"):
            raise StoreError("no space left")
        return super().put_file(stage, key, name, source)


def test_a_checkpoint_that_cannot_be_written_ends_training(material: Material, key: str) -> None:
    assert isinstance(material.store, LocalStore)
    with pytest.raises(StoreError, match="no space left"):
        train(replace(material, store=FullStore(material.store.root)), CONFIG, key)


# Divergence ----------------------------------------------------------------------------------------------------------------


class Poisoned(Trainer):
    """The loss of draw 6 is not a number, or that of draw 9 three times what it is, on the last rank's groups."""

    poison: tuple[int, float] = (6, math.nan)

    def _learn(self, batch: GroupBatch, scale: float, learning_rate: float) -> None:
        super()._learn(batch, scale, learning_rate)
        if batch.step == self.poison[0] and batch.weight:
            self.monitor.record.measured[-1] = self.monitor.record.measured[-1] * torch.tensor([self.poison[1], 1.0])


class Spiked(Poisoned):
    poison = (9, 4.0)


def test_a_run_that_diverges_says_where_and_saves_nothing_poisoned(material: Material, key: str) -> None:
    config = changed(execution={"checkpoint_every": 1, "keep_last": 9})
    sentence = (
        r"training diverged by step 7: the loss of step 7 is not finite \(batch 6, rows of the token map in "
        r"group 0: \d+, \d+, \d+, \d+; group 1: [\d, ]+\); .*Lower train\.learning_rate.*on_divergence=rollback"
    )
    with pytest.raises(DivergedError, match=sentence) as raised:
        train(material, config, key, world_size=2, trainer_class=Poisoned)
    rows = material.token_map.batch_rows(0, 6, 16).rows
    assert f"group 0: {', '.join(map(str, rows[:4]))}; group 1: {', '.join(map(str, rows[4:8]))})" in str(raised.value)
    assert _checkpoint_steps(material, key) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_weights_that_are_not_finite_are_noticed_before_they_are_saved(material: Material, key: str, zero_stage: int) -> None:
    execution = {"checkpoint_every": 1, "zero_stage": zero_stage, "log_every": 12}
    with pytest.raises(DivergedError, match=r"training diverged by step \d+"):
        train(material, changed(learning_rate=1e30, warm_up_steps=0, execution=execution), key, world_size=2)
    for checkpoint in find_checkpoints(_context(material, key)):
        for record in checkpoint.tensors:
            saved = _weights(material, key, record)
            assert all(torch.isfinite(value).all() for name, value in saved.items() if name.startswith(("weight/", "ema/")))


@pytest.mark.parametrize("trainer_class", [Poisoned, Spiked])
def test_after_a_rollback_training_goes_past_the_batches_that_did_it(
    material: Material, key: str, trainer_class: type[Poisoned]
) -> None:
    draw, last_checkpoint = trainer_class.poison[0], trainer_class.poison[0] // 4 * 4
    config = changed(execution={"on_divergence": "rollback"})
    trained = train(material, config, key, world_size=2, trainer_class=trainer_class)
    assert trained.result is not None and trained.result.skipped_draws == draw + 1 - last_checkpoint
    assert trained.column("step") == list(range(1, 13)) and np.isfinite(trained.column("loss")).all()
    (message,) = trained.messages
    assert f"(batch {draw}, rows" in message and message.endswith(f"going on from step {last_checkpoint} with the draws after it")
    assert all(torch.isfinite(value).all() for weights in (trained.raw, trained.ema) for value in weights.values())


def test_a_rollback_before_the_first_checkpoint_begins_anew(material: Material, key: str) -> None:
    trained = train(material, changed(execution={"on_divergence": "rollback", "checkpoint_every": 8}), key, trainer_class=Poisoned)
    assert trained.result is not None and trained.result.skipped_draws == 7 and trained.column("step") == list(range(1, 13))


def test_what_a_node_about_to_go_asked_for_in_the_step_of_a_rollback_is_saved_after_the_next(material: Material, key: str) -> None:
    """Steps 5 and 6 are thrown away with step 7; what was asked for in step 7 is saved after the step that follows."""
    config = changed(execution={"on_divergence": "rollback", "keep_last": 9})
    trained = train(material, config, key, trainer_class=Poisoned, preempt_at=6)  # told in step 6, known to all in step 7
    assert trained.result is not None and trained.result.skipped_draws == 3
    assert _checkpoint_steps(material, key) == [4, 5, 8]


class DamagedBeforeRollback(Poisoned):
    """The checkpoint of step 4 is damaged while step 6 runs; step 7 diverges."""

    poison = (6, math.nan)

    def train_step(self) -> None:
        super().train_step()
        if self.step == 6 and self.num_rollbacks == 0:
            self.checkpoints.wait()
            (record,) = find_checkpoints(self.task.context)[-1].tensors
            path = self.task.context.store.root / "train" / self.task.context.key / record.path  # type: ignore[attr-defined]
            path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_a_damaged_checkpoint_is_written_anew_when_its_step_is_reached_again(material: Material, key: str) -> None:
    """Training goes back to its start, since there is nothing else, and leaves a checkpoint of step 4 that can be read."""
    config = changed(execution={"on_divergence": "rollback"})
    train(material, config, key, trainer_class=DamagedBeforeRollback, stop_at=11)  # 7 steps, and 4 once more
    context = _context(material, key)
    assert _checkpoint_steps(material, key) == [4, 5]
    for checkpoint in find_checkpoints(context):
        open_checkpoint(material.store, context, checkpoint)  # compares digests
    resumed = train(material, config, key, trainer_class=Poisoned)
    assert resumed.result is not None and resumed.result.step == 12 and resumed.column("step") == list(range(1, 13))


class AlwaysPoisoned(Trainer):
    """Diverges in step 7 whatever is drawn."""

    def train_step(self) -> None:
        super().train_step()
        if self.step == 7:
            self.monitor.record.measured[-1] = self.monitor.record.measured[-1] * math.nan


def test_a_run_that_diverges_again_and_again_fails(material: Material, key: str) -> None:
    config = changed(execution={"on_divergence": "rollback", "max_rollbacks": 2})
    with pytest.raises(DivergedError, match="training diverged by step 7") as raised:
        train(material, config, key, trainer_class=AlwaysPoisoned)
    assert raised.value.draws == 6 + 3 + 3


@pytest.mark.faults
def test_draws_that_were_skipped_stay_skipped_after_a_restart(material: Material, key: str) -> None:
    config = changed(execution={"on_divergence": "rollback"})
    whole = train(material, config, f"{key}-whole", trainer_class=Poisoned)
    train(material, config, key, trainer_class=Poisoned, stop_at=11)  # three of them before the rollback
    resumed = train(material, config, key, trainer_class=Poisoned)
    assert resumed.result is not None and resumed.result.skipped_draws == 3
    _assert_same_bits(resumed, whole)


def test_a_model_without_reuse_trains_fresh_whatever_the_recipe_says(material: Material, key: str) -> None:
    nat = {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False}
    trained = train(material, changed(model=nat), key, world_size=2)
    assert np.isfinite(trained.column("loss")).all() and trained.column("fresh_loss") == trained.column("loss")
    assert not any("reuse_loss" in row for row in trained.history)


# What is kept and seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.faults)])
def test_milestones_are_the_ema_at_their_steps(material: Material, key: str, zero_stage: int, plainly: Plainly) -> None:
    config = changed(execution={"keep_every": 4, "keep_last": 1, "zero_stage": zero_stage})
    trained = train(material, config, key, world_size=2)
    assert trained.result is not None
    assert [record.name for record in trained.result.milestones] == [f"model-step-{step:08d}.safetensors" for step in (4, 8)]
    for record, step in zip(trained.result.milestones, (4, 8), strict=True):
        expected = plainly(changed(num_steps=step)).ema
        for name, value in _weights(material, key, record).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    assert _checkpoint_steps(material, key) == [4, 8]


def test_milestones_survive_a_restart(material: Material, key: str) -> None:
    config = changed(execution={"keep_every": 4, "keep_last": 1})
    train(material, config, key, stop_at=5)
    resumed = train(material, config, key)
    assert resumed.result is not None and [record.name[-13:-12] for record in resumed.result.milestones] == ["4", "8"]
    for record in resumed.result.milestones:
        assert _weights(material, key, record)


@dataclass
class Notebook(RunHandle):
    """Tracking that notes in a file which process logged what. hang: seconds that its server takes for every call."""

    uri: str = ""
    run_id: str | None = None
    notes: str = ""
    hang: float = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        time.sleep(self.hang)
        with Path(self.notes).open("a") as notes:
            notes.write(json.dumps([os.getpid(), time.monotonic(), step, dict(metrics)]) + "\n")

    def log_bytes(self, content: bytes, name: str) -> None:
        with Path(self.notes).open("a") as notes:
            notes.write(json.dumps([os.getpid(), time.monotonic(), name, len(content)]) + "\n")

    def read(self) -> list[list[Any]]:
        return [json.loads(line) for line in Path(self.notes).read_text().splitlines()]


@dataclass(frozen=True)
class Watched:
    """A run of two ranks that was tracked, and what tracking got."""

    trained: Trained
    noted: list[list[Any]]


@pytest.fixture(scope="module")
def watched(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    run = Notebook(notes=str(tmp_path_factory.mktemp("notes") / "lines"))
    config = changed(num_steps=20, execution={"sample_every": 8, "peak_tflops": None, "checkpoint_every": 6})
    return Watched(train(material, config, "watched", world_size=2, run=run), run.read())


def test_figures_are_there_and_plausible(watched: Watched, material: Material) -> None:
    history = watched.trained.history
    assert [row["step"] for row in history] == list(range(1, 21))
    buckets = {f"loss_by_mask_ratio/{bounds}" for bounds in ("0.0-0.6", "0.6-0.7", "0.7-0.8", "0.8-0.9", "0.9-1.0")}
    seen = {name for row in history for name in row}
    assert {"fresh_loss", "reuse_loss"} <= seen and len(buckets & seen) >= 3 and not (seen - buckets) & {"loss_scale"}
    for row in history:
        losses = [row[name] for name in row if name in buckets | {"fresh_loss", "reuse_loss"}]
        assert min(losses) <= row["loss"] <= max(losses) and 2 < row["loss"] < 5
        assert 0 <= row["token_accuracy"] <= 1 and 0.01 < row["gradient_norm"] < 100
        assert row["learning_rate"] == pytest.approx(1e-3 * min(1, row["step"] / 4))
        assert row["images_per_second"] * row["step_seconds"] == pytest.approx(16) and 0.1 < row["images_per_second"] < 1e5
        assert 0 < row["model_flops_utilization"] < 1 and row["model_tflops_per_second"] > 0
        assert 0 <= row["data_wait_share"] <= 1 and 0 <= row["checkpoint_wait_share"] <= 1
        assert 0.05 < row["memory_gb"] < 20 and 0 < row["ema_distance"] < 1 and row["num_workers"] == 2


def test_the_share_of_reusing_groups_is_in_the_means(watched: Watched, material: Material, plainly: Plainly) -> None:
    """fresh_loss and reuse_loss average to the loss, weighted by their numbers of groups."""
    plain = plainly(changed(num_steps=20))
    for row, expected in zip(watched.trained.history, plain.history, strict=True):
        share = expected["num_reuse"] / 4
        assert ("reuse_loss" in row, "fresh_loss" in row) == (share > 0, share < 1)
        assert row["loss"] == pytest.approx(share * row.get("reuse_loss", 0) + (1 - share) * row.get("fresh_loss", 0))


def test_one_rank_alone_tracks_every_row_and_every_preview(watched: Watched) -> None:
    assert len({process for process, *_ in watched.noted}) == 1
    rows = {step: metrics for _, _, step, metrics in watched.noted if isinstance(step, int)}
    assert list(rows) == list(range(1, 21))
    assert all(rows[row["step"]]["loss"] == row["loss"] for row in watched.trained.history)
    assert [name for _, _, name, _ in watched.noted if isinstance(name, str)] == [
        f"samples/step-{step:08d}.png" for step in (8, 16, 20)
    ]


def test_an_interval_of_several_steps_is_their_mean(material: Material, plain: Trained, key: str) -> None:
    trained = train(material, changed(execution={"log_every": 5, "checkpoint_every": 6}), key, world_size=2)
    assert trained.column("step") == [5, 6, 10, 12], "a checkpoint's figures are complete"
    losses = plain.column("loss")
    for row, (first, last) in zip(trained.history, [(0, 5), (5, 6), (6, 10), (10, 12)], strict=True):
        assert row["loss"] == pytest.approx(np.mean(losses[first:last]), rel=1e-5)


@pytest.mark.faults
def test_a_tracking_server_that_hangs_holds_up_no_step(material: Material, key: str, tmp_path: Path) -> None:
    """Each call takes as long as many steps. What was not told when training ended is told then."""
    run = Notebook(notes=str(tmp_path / "lines"), hang=0.5)
    trained = train(material, CONFIG, key, run=run)
    assert sum(trained.column("step_seconds")[2:]) < 0.5 * 5
    assert [step for _, _, step, _ in run.read() if isinstance(step, int)] == list(range(1, 13))


# Compiled ------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults  # a minute of compiling
def test_a_compiled_model_trains_the_same(material: Material, key: str, plainly: Plainly) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    config = changed(num_steps=4, execution={"compile": True, "zero_stage": 1})
    assert_close(train(material, config, key), plainly(config), rtol=1e-4, atol=1e-4)
