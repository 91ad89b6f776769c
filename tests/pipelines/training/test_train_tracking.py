"""Metrics, previews and milestones of training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enat.training.averages import Average, combine, decay_of, exponent_of, read_combination
from material.tiny_training import CONFIG, Trained, changed, checkpoint_steps, read_weights, train
from pipelines.artifacts.manifest import FileRecord
from pipelines.artifacts.store import ArtifactStore
from pipelines.stages import train as train_stage
from pipelines.storage.base import StorageError
from pipelines.tracking.run import RunHandle
from pipelines.workflow.models import average_name


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.faults)])
def test_milestones_are_the_ema_at_their_steps_also_after_a_restart(material, key, zero_stage, plainly):
    config = changed(execution={"keep_every": 4, "keep_last": 1, "zero_stage": zero_stage})
    train(material, config, key, world_size=2, stop_at=5)
    trained = train(material, config, key, world_size=2)
    assert trained.result is not None
    assert [record.name for record in trained.result.milestones] == [f"model-step-{step:08d}.safetensors" for step in (4, 8)]
    for record, step in zip(trained.result.milestones, (4, 8), strict=True):
        expected = plainly(changed(num_steps=step)).ema
        for name, value in read_weights(material, key, record).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    left = checkpoint_steps(material, key)  # rank 0 may clean up before rank 1 has written step 8
    assert {4, 8} <= {*left} and len(left) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_averages_of_other_lengths_are_those_of_all_weights_also_after_a_restart(material, key, zero_stage, plainly):
    """By the recursion over the weights of a plain loop; and one that is put together equals one that was tracked."""
    lengths = (0.05, 0.1, 0.075)
    config = changed(execution={"keep_every": 2, "checkpoint_every": 2, "zero_stage": zero_stage, "ema_lengths": lengths})
    train(material, config, key, world_size=2, stop_at=5)
    trained = train(material, config, key, world_size=2)
    kept = {record.name: record for record in trained.result.milestones if record.name.startswith("average-")}
    assert {*kept} == {average_name(length, step) for length in lengths for step in (2, 4, 6, 8, 10, 12)}
    weights = [plainly(changed(num_steps=step)).raw for step in range(1, 13)]
    for length in lengths:
        average = {name: value.double() for name, value in weights[0].items()}
        for step, raw in enumerate(weights[1:], start=2):
            share = decay_of(step, exponent_of(length))
            average = {name: share * value + (1 - share) * raw[name].double() for name, value in average.items()}
        for name, value in read_weights(material, key, kept[average_name(length, 12)]).items():
            torch.testing.assert_close(value.double(), average[name], rtol=0, atol=1e-5)
    of_two = [Average(step, length) for step in (2, 4, 6, 8, 10, 12) for length in lengths[:2]]
    files = [material.store.fetch_file("train", key, kept[average_name(each.length, each.step)]) for each in of_two]
    found = combine(of_two, Average(12, 0.075))
    tracked, shorter = (read_weights(material, key, kept[average_name(length, 12)]) for length in (0.075, 0.05))
    combined = read_combination(files, found.weights.tolist())
    off, moved = (
        sum((side[name] - tracked[name]).square().sum().item() for name in tracked) ** 0.5 for side in (combined, shorter)
    )
    assert found.error < 0.02 and off < 0.05 * moved


def test_a_run_does_not_resume_with_averages_that_its_checkpoint_does_not_have(material, key, make_context):
    config = changed(execution={"keep_every": 4})
    train(material, config, key, world_size=1, stop_at=5)
    inputs = {name: material.inputs[name] for name in ("tokenizer", "token_map")}
    wanted = changed(execution={"keep_every": 4, "ema_lengths": (0.05, 0.1)})
    with pytest.raises(
        ValueError, match=r"ema_lengths has 0\.05, and training resumes from step \d+, whose checkpoint has no such average"
    ):
        train_stage.run(wanted, inputs, make_context(material.store, "train", key))


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

    def log_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        with Path(self.notes).open("a") as notes:
            notes.write(json.dumps([os.getpid(), time.monotonic(), "history", [row["step"] for row in rows]]) + "\n")

    def log_bytes(self, content: bytes, name: str) -> None:
        with Path(self.notes).open("a") as notes:
            notes.write(json.dumps([os.getpid(), time.monotonic(), name, len(content)]) + "\n")

    def _do(self, action: Callable[[Any], Any]) -> None:
        """What is not noted above is for a server, which is not there."""

    def read(self) -> list[list[Any]]:
        return [json.loads(line) for line in Path(self.notes).read_text().splitlines()]


@dataclass(frozen=True)
class Watched:
    """A run of two ranks that was tracked, and what tracking got."""

    trained: Trained
    noted: list[list[Any]]


@pytest.fixture(scope="module")
def watched(material, tmp_path_factory):
    run = Notebook(notes=str(tmp_path_factory.mktemp("notes") / "lines"))
    config = changed(num_steps=20, execution={"sample_every": 8, "peak_tflops": None, "checkpoint_every": 6})
    return Watched(train(material, config, "watched", world_size=2, run=run), run.read())


def test_metrics_are_complete_and_plausible(watched, material):
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


def test_share_of_reusing_groups_is_in_the_means(watched, material, plainly):
    """fresh_loss and reuse_loss average to the loss, weighted by their numbers of groups."""
    plain = plainly(changed(num_steps=20))
    for row, expected in zip(watched.trained.history, plain.history, strict=True):
        share = expected["num_reuse"] / 4
        assert ("reuse_loss" in row, "fresh_loss" in row) == (share > 0, share < 1)
        assert row["loss"] == pytest.approx(share * row.get("reuse_loss", 0) + (1 - share) * row.get("fresh_loss", 0))


def test_one_rank_alone_tracks_every_row_and_every_preview(watched):
    assert len({process for process, *_ in watched.noted}) == 1
    rows = {step: metrics for _, _, step, metrics in watched.noted if isinstance(step, int)}
    assert list(rows) == list(range(1, 21))
    assert all(rows[row["step"]]["loss"] == row["loss"] for row in watched.trained.history)
    assert [name for _, _, name, _ in watched.noted if isinstance(name, str)] == [
        f"samples/step-{step:08d}.png" for step in (8, 16, 20)
    ]


@pytest.mark.slow
def test_interval_of_several_steps_is_their_mean(material, plainly, key):
    trained = train(material, changed(execution={"log_every": 5, "checkpoint_every": 6}), key, world_size=2)
    assert trained.column("step") == [5, 6, 10, 12], "a checkpoint's figures are complete"
    losses = plainly(CONFIG).column("loss")
    for row, (first, last) in zip(trained.history, [(0, 5), (5, 6), (6, 10), (10, 12)], strict=True):
        assert row["loss"] == pytest.approx(np.mean(losses[first:last]), rel=1e-5)


@pytest.mark.slow
def test_resumed_run_has_the_rows_of_the_runs_before(material, key, tmp_path):
    """A command is a run of its own in MLflow. Workers that Ray replaces are part of the same run, which has its rows."""
    noted = {}
    for run_id, stop_at in (("first", 3), ("first", 6), ("second", None)):
        run = Notebook(run_id=run_id, notes=str(tmp_path / f"{run_id}-{stop_at}"))
        train(material, CONFIG, key, run=run, stop_at=stop_at)
        noted[run_id, stop_at] = [(step, what) for _, _, step, what in run.read() if not str(step).startswith("samples")]
    assert [step for step, _ in noted["first", 3]] == [1, 2, 3, 4]
    assert [step for step, _ in noted["first", 6]] == [5, 6, 7, 8, 9, 10, 11]
    ((first, steps), *rest) = noted["second", None]
    assert (first, steps) == ("history", list(range(1, 12))) and [step for step, _ in rest] == [12]


class CountingStore(ArtifactStore):
    """Notes that the tokenizer was asked for, and has none where the environment says so."""

    def fetch_file(self, stage: str, key: str, record: FileRecord) -> Path:
        if stage == "tokenizer":
            with Path(os.environ["NOTES"]).open("a") as notes:
                notes.write("asked ")
            if "NO_TOKENIZER" in os.environ:
                raise StorageError("the bucket does not answer")
        return super().fetch_file(stage, key, record)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.slow
def test_previews_load_the_tokenizer_once_and_report_an_error_once(material, key, tmp_path, monkeypatch, is_there):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    if not is_there:
        monkeypatch.setenv("NO_TOKENIZER", "1")
    place, run = replace(material, store=CountingStore(material.store.folder)), Notebook(notes=str(tmp_path / "lines"))
    trained = train(place, changed(execution={"sample_every": 4}), key, run=run)
    assert trained.column("step") == list(range(1, 13)) and trained.ema
    grids = [step for _, _, step, _ in run.read() if str(step).startswith("samples")]
    if is_there:
        assert trained.messages == () and len(grids) == 3 and (tmp_path / "notes").read_text() == "asked "
    else:
        (message,) = trained.messages
        assert message.endswith("training continues (StorageError: the bucket does not answer)") and grids == []


@dataclass
class Broken(RunHandle):
    """Tracking with an error that it does not handle."""

    uri: str = ""
    run_id: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        raise KeyError("unforeseen")


@pytest.mark.slow
def test_unexpected_error_of_tracking_is_reported_once(material, key):
    trained = train(material, CONFIG, key, run=Broken())
    (message,) = trained.messages
    assert message.endswith("training continues (KeyError: 'unforeseen')") and trained.ema


@pytest.mark.faults
def test_hanging_tracking_server_does_not_delay_steps(material, key, tmp_path):
    """Each call takes as long as many steps. Remaining calls are made when training ends."""
    run = Notebook(notes=str(tmp_path / "lines"), hang=0.5)
    trained = train(material, CONFIG, key, run=run)
    assert sum(trained.column("step_seconds")[2:]) < 0.5 * 5
    assert [step for _, _, step, _ in run.read() if isinstance(step, int)] == list(range(1, 13))
