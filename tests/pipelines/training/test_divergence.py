"""Divergence: training names the batch, keeps the checkpoints before it, and skips the batch if configured."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from material.tiny_training import (
    assert_same_bits,
    changed,
    checkpoint_steps,
    damage_newest_checkpoint,
    read_weights,
    train,
    worker_context,
)
from pipelines.artifacts.manifest import FileRecord
from pipelines.artifacts.store import ArtifactStore
from pipelines.training.batches import GroupBatch
from pipelines.training.checkpoints import find_checkpoints, open_checkpoint
from pipelines.training.loop import Trainer
from pipelines.training.monitor import DivergedError


class Poisoned(Trainer):
    """The loss of draw 6 is not a number, or that of draw 9 three times what it is, on the last rank's groups."""

    poison: tuple[int, float] = (6, math.nan)

    def _learn(self, batch: GroupBatch, scale: float, learning_rate: float) -> None:
        super()._learn(batch, scale, learning_rate)
        if batch.step == self.poison[0] and batch.weight:
            self.monitor.record.measured[-1] = self.monitor.record.measured[-1] * torch.tensor([self.poison[1], 1.0])


class Spiked(Poisoned):
    poison = (9, 4.0)


@pytest.mark.slow
def test_run_that_diverges_says_where_and_saves_nothing_poisoned(material, key):
    config = changed(execution={"checkpoint_every": 1, "keep_last": 9})
    sentence = (
        r"training diverged by step 7: the loss of step 7 is not finite \(batch 6, rows of the token map in "
        r"group 0: \d+, \d+, \d+, \d+; group 1: [\d, ]+\)\. .*on_divergence=rollback .*train\.learning_rate.* begins at step 0"
    )
    with pytest.raises(DivergedError, match=sentence) as raised:
        train(material, config, key, world_size=2, trainer_class=Poisoned)
    rows = material.token_map.batch_rows(0, 6, 16).rows
    assert f"group 0: {', '.join(map(str, rows[:4]))}; group 1: {', '.join(map(str, rows[4:8]))})" in str(raised.value)
    assert checkpoint_steps(material, key) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_noticed_before_they_are_saved(material, key, zero_stage):
    execution = {"checkpoint_every": 1, "zero_stage": zero_stage, "log_every": 12}
    with pytest.raises(DivergedError, match=r"training diverged by step \d+"):
        train(material, changed(learning_rate=1e30, warmup_steps=0, execution=execution), key, world_size=2)
    for checkpoint in find_checkpoints(worker_context(material, key)):
        for record in checkpoint.tensors:
            saved = read_weights(material, key, record)
            assert all(torch.isfinite(value).all() for name, value in saved.items() if name.startswith(("weight/", "ema/")))


class Overflowing(Trainer):
    """Its loss is finite, its gradient is not."""

    def _learn(self, batch: GroupBatch, scale: float, learning_rate: float) -> None:
        super()._learn(batch, math.inf, learning_rate)


@pytest.mark.slow
def test_fp16_whose_gradient_overflows_at_any_scale_has_diverged(material, key):
    """It would continue forever without changing a weight. A few overflows in a row are normal: they find the scale."""
    config = changed(precision="fp16", num_steps=30, execution={"log_every": 3, "checkpoint_every": 9})
    sentence = "training diverged by step 18: the gradient of step 18 is not finite at any loss scale"
    with pytest.raises(DivergedError, match=sentence):
        train(material, config, key, trainer_class=Overflowing)
    assert checkpoint_steps(material, key) == [9]


@pytest.mark.parametrize(
    ("trainer_class", "interval"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in ((Poisoned, 4), (Spiked, 4), (Poisoned, 8))],
)
def test_after_a_rollback_training_skips_the_batches_that_diverged(material, key, trainer_class, interval):
    """Also if no checkpoint was written yet."""
    draw, last_checkpoint = trainer_class.poison[0], trainer_class.poison[0] // interval * interval
    config = changed(execution={"on_divergence": "rollback", "checkpoint_every": interval})
    trained = train(material, config, key, world_size=2, trainer_class=trainer_class)
    assert trained.result is not None and trained.result.skipped_draws == draw + 1 - last_checkpoint
    assert trained.column("step") == list(range(1, 13)) and np.isfinite(trained.column("loss")).all()
    (message,) = trained.messages
    assert f"(batch {draw}, rows" in message and message.endswith(f"resumes from step {last_checkpoint} with the following batches")
    assert all(torch.isfinite(value).all() for weights in (trained.raw, trained.ema) for value in weights.values())


@pytest.mark.slow
def test_signal_in_the_step_of_a_rollback_is_handled_after_the_next_step(material, key):
    """Steps 5 and 6 are discarded with step 7; the signal of step 7 is handled after the step that follows."""
    config = changed(execution={"on_divergence": "rollback", "keep_last": 9})
    trained = train(material, config, key, trainer_class=Poisoned, preempt_at=6)  # raised in step 6, known to all in step 7
    assert trained.result is not None and trained.result.skipped_draws == 3
    assert checkpoint_steps(material, key) == [4, 5, 8]


class DamagedBeforeRollback(Poisoned):
    """The checkpoint of step 8 is damaged while step 9 runs; step 10 diverges."""

    poison = (9, math.nan)

    def train_step(self) -> None:
        super().train_step()
        if self.step == 9 and self.num_rollbacks == 0:
            self.checkpoints.wait()
            damage_newest_checkpoint(self.task.context.store, self.task.context)


@pytest.mark.slow
def test_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(material, key):
    """Training goes back to the one before, and leaves a checkpoint of that step that can be read."""
    config = changed(execution={"on_divergence": "rollback"})
    train(material, config, key, trainer_class=DamagedBeforeRollback, stop_at=14)  # 10 steps, and 4 once more
    context = worker_context(material, key)
    assert checkpoint_steps(material, key) == [8, 9]
    for checkpoint in find_checkpoints(context):
        open_checkpoint(material.store, context, checkpoint)  # compares digests
    resumed = train(material, config, key, trainer_class=Poisoned)
    assert resumed.result is not None and resumed.result.step == 12 and resumed.column("step") == list(range(1, 13))


class SlowStore(ArtifactStore):
    """Writes checkpoints slowly."""

    def put_file(self, stage: str, key: str, name: str, source: Path) -> FileRecord:
        if name.startswith(".work/"):
            time.sleep(0.5)
        return super().put_file(stage, key, name, source)


@pytest.mark.slow
def test_checkpoint_in_progress_is_completed_before_divergence_is_reported(material, key):
    """Ray ends a worker soon after its result, and would interrupt the writing."""
    slow = replace(material, store=SlowStore(material.store.folder))
    config = changed(execution={"checkpoint_every": 6})
    with pytest.raises(DivergedError, match="diverged by step 7"):
        train(slow, config, key, world_size=2, trainer_class=Poisoned)
    assert checkpoint_steps(material, key) == [6]


class AlwaysPoisoned(Trainer):
    """Diverges in step 7 with any batch."""

    def train_step(self) -> None:
        super().train_step()
        if self.step == 7:
            self.monitor.record.measured[-1] = self.monitor.record.measured[-1] * math.nan


@pytest.mark.slow
def test_run_that_diverges_repeatedly_fails(material, key):
    config = changed(execution={"on_divergence": "rollback", "max_rollbacks": 2})
    with pytest.raises(DivergedError, match="training diverged by step 7") as raised:
        train(material, config, key, trainer_class=AlwaysPoisoned)
    assert raised.value.draws == 6 + 3 + 3


@pytest.mark.faults
def test_draws_that_were_skipped_stay_skipped_after_a_restart(material, key):
    config = changed(execution={"on_divergence": "rollback"})
    whole = train(material, config, f"{key}-whole", trainer_class=Poisoned)
    train(material, config, key, trainer_class=Poisoned, stop_at=11)  # three of them before the rollback
    resumed = train(material, config, key, trainer_class=Poisoned)
    assert resumed.result is not None and resumed.result.skipped_draws == 3
    assert_same_bits(resumed, whole)
