"""The training loop: it equals a plain loop on any number of workers, and survives their loss.

Ranks are plain processes (material/tiny_training.py); what Ray adds to them is in test_train_stage.py.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from material.tiny_training import (
    CONFIG,
    RankLostError,
    assert_close,
    assert_same_bits,
    changed,
    checkpoint_steps,
    damage_newest_checkpoint,
    make_material,
    train,
    worker_context,
)
from pipelines.artifacts.manifest import FileRecord
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError
from pipelines.training.batches import GroupBatch
from pipelines.training.checkpoints import NoReadableCheckpointError, find_checkpoints, read_resume_point
from pipelines.training.engine import effective_zero_stage, zero_options
from pipelines.training.loop import Trainer
from pipelines.training.task import initial_model

OPTIONS = {
    "model": {"qk_norm": True, "dropout": 0.1},
    "learning_rate_schedule": "cosine",
    "max_grad_norm": 0.2,
    "z_loss": 1e-2,
    "weight_decay_on": "matrices",
    "weight_decay": 0.3,
}


# What is trained -----------------------------------------------------------------------------------------------------------


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def fault(*case):
    return pytest.param(*case, marks=pytest.mark.faults)


def test_on_gpus_gradients_are_reduced_during_the_backward_pass():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    chosen = {stage: DeepSpeedZeroConfig(**zero_options(stage, "cuda")).overlap_comm for stage in (1, 2, 3)}
    assert all(chosen.values()) and zero_options(1, "cpu") == {"stage": 1} and zero_options(0, "cuda") == {"stage": 0}


class NeverWaiting(Trainer):
    """Fails if a step waits for the device, which hides the time that the host needs to launch its work."""

    def train_step(self) -> None:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        waits = accelerator.synchronize

        def refuse(*_: object) -> None:
            raise AssertionError("a step waits for the device")

        accelerator.synchronize = refuse
        try:
            super().train_step()
        finally:
            accelerator.synchronize = waits


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_no_step_waits_for_the_device(material, key, zero_stage):
    """DeepSpeed's timers would, four times a step."""
    config = changed(num_steps=4, execution={"zero_stage": zero_stage})
    assert len(train(material, config, key, world_size=2, trainer_class=NeverWaiting).history) == 4


@pytest.mark.parametrize(
    ("given", "precision", "world_size", "gigabytes", "compiled", "chosen"),
    [  # a billion parameters
        (None, "bf16", 8, 80, False, 0),
        (None, "bf16", 8, 40, False, 1),  # 20 GB are more than 40%, 13 are not
        (None, "bf16", 8, 24, False, 2),
        (None, "bf16", 8, 16, False, 3),
        (None, "bf16", 8, 16, True, 2),  # compiled code cannot have its weights swapped
        (None, "fp16", 8, 80, False, 1),  # only these scale the loss
        (None, "fp16", 1, 80, False, 1),
        (None, "bf16", 1, 16, False, 0),  # nobody to share with
        (3, "bf16", 8, 80, False, 3),
        (3, "bf16", 1, 80, False, 0),
        (2, "fp16", 1, 80, False, 2),
        (0, "bf16", 8, 16, False, 0),
    ],
)
def test_the_zero_stage_is_the_lowest_that_fits(given, precision, world_size, gigabytes, compiled, chosen):
    config = changed(precision=precision, execution={"zero_stage": given, "compile": compiled})
    assert effective_zero_stage(config, world_size, 10**9, gigabytes * 1e9) == chosen


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "options"),
    [
        (2, 1, {}),
        slow(1, 0, {}),
        fault(2, 3, {}),
        fault(2, 0, {}),
        fault(3, 1, {}),  # four groups: two ranks take part in a second pass without weight
        (2, 0, {"num_groups": 1}),  # ranks share the rows of a group
        slow(3, 1, {"num_groups": 2, "model": {"dropout": 0.1}}),  # four pieces of two groups
        slow(3, 3, {"num_groups": 1}),
        slow(2, 2, OPTIONS),
        fault(1, 0, OPTIONS),
        fault(2, 3, OPTIONS),
        slow(2, 3, {"model": {"text": True}, "cond_drop_prob": 0.5}),
    ],
    ids=str,
)
def test_workers_train_what_a_plain_loop_trains(material, plainly, key, world_size, zero_stage, options):
    """On gloo: losses to a relative 1e-5, raw and EMA weights to 1e-5.

    Microbatches and activation checkpointing are ways to compute the same; the other options are in the plain loop, too.
    """
    execution = {"microbatches": 2, "activation_checkpointing": True} if options is OPTIONS else {}
    config = changed(execution={"zero_stage": zero_stage, **execution}, **options)
    trained, plain = train(material, config, key, world_size=world_size), plainly(config)
    assert_close(trained, plain, atol=3e-5 if options is OPTIONS else 1e-5)
    np.testing.assert_allclose(trained.column("gradient_norm"), plain.column("gradient_norm"), rtol=1e-4)
    np.testing.assert_allclose(trained.column("token_accuracy"), plain.column("token_accuracy"), atol=1e-6)
    assert options is not OPTIONS or min(plain.column("gradient_norm")) > 0.2, "every step is clipped"


def test_comparison_could_fail(material, plain):
    """Twelve steps move the weights by far more than the tolerance, and the EMA stays apart from them."""
    name = "token_embedding.weight"
    initial = initial_model(material.architecture(CONFIG), 0).state_dict()
    assert (plain.raw[name] - initial[name]).abs().max() > 1e-3 and (plain.raw[name] - plain.ema[name]).abs().max() > 1e-3
    assert plain.history[0]["loss"] - plain.history[-1]["loss"] > 0.01


@pytest.mark.slow
def test_model_without_reuse_trains_fresh_whatever_the_recipe_says(material, key):
    nat = {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False}
    trained = train(material, changed(model=nat), key, world_size=2)
    assert np.isfinite(trained.column("loss")).all() and trained.column("fresh_loss") == trained.column("loss")
    assert not any("reuse_loss" in row for row in trained.history)


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
@pytest.mark.slow
def test_in_half_precision_weights_stay_float32_and_the_ema_is_theirs(material, key, precision, zero_stage, plainly):
    """Losses follow the plain loop under torch's autocast as closely as rounding lets them."""
    config = changed(precision=precision, num_steps=6, execution={"zero_stage": zero_stage})
    trained = train(material, config, key, world_size=2, trainer_class=EmaWatcher)
    other = plainly(config)
    np.testing.assert_allclose(trained.column("loss"), other.column("loss"), rtol=1e-3)
    np.testing.assert_allclose(trained.column("gradient_norm"), other.column("gradient_norm"), rtol=0.02)
    exact = plainly(replace(config, precision="fp32"))
    assert trained.column("loss") != pytest.approx(exact.column("loss"), rel=1e-6), "computed in half precision"
    assert ("loss_scale" in trained.history[0]) is (precision == "fp16")


# Resuming ------------------------------------------------------------------------------------------------------------------


def test_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(material, key):
    """A signal to one rank reaches all with the next step; the step at which they stop is not a multiple of any interval."""
    whole = train(material, CONFIG, f"{key}-whole", world_size=2)
    stopped = train(material, CONFIG, key, world_size=2, stop_at=6)
    assert stopped.result is not None and stopped.result.files == () and stopped.result.step == 7
    assert stopped.column("step") == list(range(1, 8)) and checkpoint_steps(material, key)[-1] == 7
    resumed = train(material, CONFIG, key, world_size=2)
    assert_same_bits(resumed, whole)
    assert resumed.result is not None and resumed.result.num_restarts == 1
    assert resumed.messages == ("training resumes from step 7 with 2 workers",)


class Recorder(Trainer):
    """Notes which groups its rank learned from."""

    def _learn(self, batch: GroupBatch, *rest: Any) -> None:
        if batch.weight:
            with (Path(os.environ["NOTES"]) / f"{self.rank}").open("a") as notes:
                notes.write(f"{self.step} {batch.step} {batch.group} {batch.codes.tolist()}\n")
        super()._learn(batch, *rest)


@pytest.mark.slow
def test_from_two_workers_to_one_and_back_nothing_changes(material, key, tmp_path, monkeypatch):
    """The same groups, each once, and losses to a relative 1e-5 in every step."""
    config = changed(num_steps=24, execution={"zero_stage": 2})
    noted = {}
    for name, spread in (("whole", [(1, None)]), ("moved", [(2, 8), (1, 8), (2, None)])):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("NOTES", str(tmp_path / name))
        for world_size, stop_at in spread:
            trained = train(material, config, f"{key}-{name}", world_size=world_size, trainer_class=Recorder, stop_at=stop_at)
        lines = [line for path in (tmp_path / name).iterdir() for line in path.read_text().splitlines()]
        noted[name] = sorted(lines), trained
    (groups, moved), (expected, whole) = noted["moved"], noted["whole"]
    assert groups == expected and len(groups) == 24 * config.num_groups
    np.testing.assert_allclose(moved.column("loss"), whole.column("loss"), rtol=1e-5)
    assert moved.column("step") == list(range(1, 25))
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
def place(request, material, vqgan, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTES", str(tmp_path))
    if request.param == "folder":
        return material
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    folder = request.getfixturevalue("make_bucket")("store")
    return make_material(open_store(folder.uri, folder.config), vqgan, tmp_path)


@pytest.mark.parametrize(
    ("place", "zero_stage"), [("folder", 1), pytest.param("bucket", 3, marks=pytest.mark.faults)], indirect=["place"]
)
def test_run_whose_worker_was_killed_resumes_from_the_last_checkpoint(place, plain, key, zero_stage):
    config = changed(execution={"zero_stage": zero_stage})
    with pytest.raises((RankLostError, RuntimeError)):
        train(place, config, key, world_size=2, trainer_class=Killed)
    assert checkpoint_steps(place, key) == [4]
    resumed = train(place, config, key, world_size=2, trainer_class=Killed)
    assert_close(resumed, plain)
    assert resumed.result is not None and resumed.result.num_restarts == 1 and checkpoint_steps(place, key) == [4, 8]


class SlowPoisoned(Trainer):
    """Every step takes a tenth of a second at least. Step 7 diverges the first time."""

    def train_step(self):
        time.sleep(0.1)
        super().train_step()
        if self.step == 7 and not self.num_rollbacks:
            self.monitor.record.measured[-1] = self.monitor.record.measured[-1] * math.nan


@pytest.mark.slow
def test_time_of_discarded_steps_and_of_stopped_runs_counts(material, key):
    """The second life has one worker fewer."""
    config, context = changed(execution={"keep_last": 9, "on_divergence": "rollback"}), worker_context(material, key)
    train(material, config, key, world_size=2, trainer_class=SlowPoisoned, stop_at=11)
    first = read_resume_point(context)
    assert first.step == 9 and first.worker_seconds >= (7 + 5) * 0.1 * 2, "four steps, three for nothing, and five more"
    train(material, config, key, trainer_class=SlowPoisoned, stop_at=2)
    second = read_resume_point(context)
    assert second.step > 9 and second.worker_seconds >= first.worker_seconds + (second.step - 9) * 0.1
    newest = find_checkpoints(context)[-1].state
    assert newest is not None
    (Path(material.store.uri) / "train" / key / newest.path).write_text("{}")
    assert 0 < read_resume_point(context).step < second.step, "training resumes from there, too"


@pytest.mark.slow
def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(material, plain, key):
    train(material, CONFIG, key, world_size=2, stop_at=8)
    assert checkpoint_steps(material, key)[-2:] == [8, 9], "an older one is removed when rank 0 is the last to write"
    path = damage_newest_checkpoint(material.store, worker_context(material, key))
    resumed = train(material, CONFIG, key, world_size=2)
    message, start = resumed.messages
    assert message.startswith("removed the damaged checkpoint of step 9") and path in message
    assert start == "training resumes from step 8 with 2 workers"
    assert_close(resumed, plain)


@pytest.mark.slow
def test_training_does_not_start_again_if_all_checkpoints_are_damaged(material, key):
    """On any rank: people may be able to restore the files."""
    train(material, changed(execution={"checkpoint_every": 100}), key, world_size=2, stop_at=5)
    path = damage_newest_checkpoint(material.store, worker_context(material, key))
    with pytest.raises(NoReadableCheckpointError, match=f"steps 6; step 6: .*{path} was changed"):
        train(material, CONFIG, key, world_size=2)
    assert checkpoint_steps(material, key) == [6]


class PreemptedRank(Trainer):
    """Only the node of the last rank is about to go."""

    def __init__(self, task: Any, device: torch.device) -> None:
        if dist.get_rank() == 0:
            task.reporter.preempt_at = None
        super().__init__(task, device)


@pytest.mark.slow
def test_all_ranks_save_once_when_the_node_of_one_is_about_to_go(material, plain, key):
    """Ray's watcher repeats the signal from step 5 on. Training continues until Ray ends it."""
    execution = {"keep_last": 9}
    trained = train(material, changed(execution=execution), key, world_size=2, preempt_at=5, trainer_class=PreemptedRank)
    assert checkpoint_steps(material, key) == [4, 6, 8]
    assert_close(trained, plain)


@pytest.mark.slow
def test_stop_in_the_last_step_completes_the_run(material, plain, key):
    assert_close(train(material, CONFIG, key, stop_at=12), plain)


class FullStore(ArtifactStore):
    """A store without space for checkpoints."""

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        if name.startswith(".work/"):
            raise StorageError("no space left")
        return super().put_file(stage, key, name, source)


def test_checkpoint_that_cannot_be_written_ends_training(material, key):
    with pytest.raises(StorageError, match="no space left"):
        train(replace(material, store=FullStore(material.store.folder)), CONFIG, key)


# Compiled ------------------------------------------------------------------------------------------------------------------


@pytest.mark.faults  # a minute of compiling
def test_compiled_model_trains_the_same(material, key, plainly):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    config = changed(num_steps=4, execution={"compile": True, "zero_stage": 1})
    assert_close(train(material, config, key), plainly(config), rtol=1e-4, atol=1e-4)
