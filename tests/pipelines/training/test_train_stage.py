"""The stage train: training on Ray equals a plain loop, stops when asked, and resumes after workers or the driver were lost."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console
from safetensors.torch import load_file

from enat.checkpoint import load_enat
from enat.model import ENAT
from material.tiny_training import CONFIG, Trained, assert_close, changed, read_history
from pipelines.artifacts.manifest import FileRecord
from pipelines.cluster import connection
from pipelines.stages import train
from pipelines.tracking.run import RunHandle
from pipelines.training import checkpoints
from pipelines.training.checkpoints import ResumePoint, find_checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.monitor import DivergedError
from pipelines.training.task import TrainResult, initial_model
from pipelines.training.trainer import describe_loss
from pipelines.workflow.stage import StageResult, WorkerContext

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class Fitted(Trained):
    """The result of the stage, and its output."""

    made: StageResult | None = None
    output: str = ""


@pytest.fixture
def fit(material, make_context, key):
    """Train by the stage, under a key that the test has for itself."""

    def fit(
        config: TrainConfig = CONFIG, *, run: RunHandle | None = None, key: str = key, console: Console | None = None
    ) -> Fitted:
        console = console or Console(file=io.StringIO(), width=500)
        replaced = {"run": run} if run else {}
        context = make_context(material.store, "train", key, console=console, **replaced)
        inputs = {name: material.inputs[name] for name in ("tokenizer", "token_map")}
        made = train.run(config, inputs, context)
        files = {record.name: material.store.fetch_file("train", key, record) for record in made.files}
        return Fitted(
            load_file(files["model.safetensors"]),
            load_file(files["raw.safetensors"]),
            read_history(material.store, key, made.records[0]),
            made=made,
            output=console.file.getvalue(),  # type: ignore[attr-defined]
        )

    return fit


@pytest.mark.parametrize(
    ("num_workers", "zero_stage"), [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.faults)]
)
def test_ray_workers_train_what_a_plain_loop_trains(fit, plain, num_workers, zero_stage):
    """More of their combinations without Ray: test_train_loop.py."""
    fitted = fit(changed(execution={"num_workers": num_workers, "zero_stage": zero_stage, "keep_every": 8}))
    assert_close(fitted, plain)
    assert fitted.made is not None
    assert [record.name for record in fitted.made.records] == ["history.json", "model-step-00000008.safetensors"]
    assert fitted.made.summary.num_restarts == 0 and fitted.made.summary.skipped_draws == 0
    assert fitted.made.metrics["final/loss"] == fitted.history[-1]["loss"] and fitted.made.metrics["final/step"] == 12
    assert set(fitted.column("num_workers")) == {num_workers}


@pytest.mark.slow
def test_worker_time_includes_that_of_resumed_commands(material, make_context, monkeypatch):
    """100 worker-seconds were kept with step 4. From there it is two workers with two devices each."""
    history = [{"step": step, "num_workers": 1 if step <= 4 else 2} for step in range(1, 13)]

    def fit(*_: Any) -> TrainResult:
        time.sleep(0.3)
        return TrainResult((FileRecord("model.safetensors", "p", 1, "0" * 64),), (), history, 12, 0, 1, 0)

    monkeypatch.setattr(checkpoints, "read_resume_point", lambda _: ResumePoint(4, 100.0))
    monkeypatch.setattr(train, "_fit", fit)
    monkeypatch.setattr(connection, "require", lambda *_: None)
    inputs = {name: material.inputs[name] for name in ("tokenizer", "token_map")}
    started = time.monotonic()
    config = changed(execution={"num_workers": 2, "gpus_per_worker": 2})
    made = train.run(config, inputs, make_context(material.store, "train"))
    assert 100 + 2 * 0.3 <= made.worker_seconds <= 100 + 2 * (time.monotonic() - started)
    assert made.device_seconds == pytest.approx(2 * made.worker_seconds)
    assert made.work == [], "rows of an older version have no time of a step"


@pytest.mark.parametrize(("num_workers", "worker_seconds"), [((1, 1, 1), 8.0), ((1, 2, 2), 13.0)])
def test_work_is_the_steps_with_their_time(material, num_workers, worker_seconds):
    """Of intervals of four, two and two steps. Elastic training changed the number of workers."""
    rows = zip((4, 6, 8), (0.75, 1.5, 1.0), num_workers, strict=True)
    history = [{"step": step, "step_seconds": seconds, "num_workers": count} for step, seconds, count in rows]
    config = changed(num_steps=8)
    (done,) = train._done(config, material.architecture(config), history)
    assert done.worker_seconds == worker_seconds and done.num_workers == worker_seconds / 8
    assert done.work.count == 8 * config.batch_size and done.work.macs > 0


@dataclasses.dataclass
class Deadly(RunHandle):
    """Tracking of a run whose rank 0 is killed by SIGKILL once, after it logged step 6. It notes every step that is logged.

    context: its checkpoints are waited for before the kill, since the test is about resuming from one.
    """

    uri: str = ""
    run_id: str | None = None
    notes: Path = Path()
    context: WorkerContext | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        is_second_life = self.notes.exists() and "killed" in self.notes.read_text()
        with self.notes.open("a") as notes:
            notes.write(f"{step} ")
        if step == 6 and not is_second_life:
            assert self.context is not None
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not any(found.is_whole for found in find_checkpoints(self.context)):
                time.sleep(0.02)
            with self.notes.open("a") as notes:
                notes.write("killed ")
            os.kill(os.getpid(), signal.SIGKILL)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with self.notes.with_suffix(".tags").open("a") as file:
            file.write("".join(f"{name}={value}\n" for name, value in tags.items()))

    def lives(self) -> list[list[int]]:
        return [[int(step) for step in life.split()] for life in self.notes.read_text().split("killed")]


@pytest.mark.faults
def test_worker_that_is_killed_is_replaced_and_training_resumes_from_the_checkpoint(
    fit, plain, material, key, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    caplog.set_level(logging.INFO, logger="pipelines")
    context = WorkerContext(stage="train", key=key, store=material.store, run=RunHandle("", None))
    run = Deadly(notes=tmp_path / "notes", context=context)
    fitted = fit(changed(execution={"num_workers": 2, "max_failures": 1}), run=run)
    first, second = run.lives()
    assert first == list(range(1, 7)) and second == list(range(second[0], 13))
    assert second[0] in (5, 9), "steps since the last checkpoint are lost, and no more"
    assert_close(fitted, plain)
    assert fitted.made is not None and fitted.made.summary.num_restarts == 1
    lost = r"worker 0 of 2 on 127\.0\.0\.1 \(process \d+\) was lost \(the process or its node has ended\)"
    restarts = rf"training restarts from step {second[0] - 1} with 2 workers, because {lost}"
    for shown in (fitted.output, caplog.text):  # the terminal and the log of the run
        assert len(re.findall(rf"(?<!because ){lost}$", shown, flags=re.MULTILINE)) == 1
        assert len(re.findall(rf"{restarts}$", shown, flags=re.MULTILINE)) == 1
    tags = run.notes.with_suffix(".tags").read_text().splitlines()
    assert tags[-2:] == [f"enat.resumed_from_step={second[0] - 1}", "enat.restarts=1"]


def test_loss_names_the_workers_that_are_gone_and_not_those_that_waited_for_them() -> None:
    places, broken = ["10.0.0.1 (process 1)", "10.0.0.2 (process 2)"], RuntimeError("first\nConnection closed by peer\x1b[31m")
    lost = "worker 1 of 2 on 10.0.0.2 (process 2) was lost (the process or its node has ended)"
    assert describe_loss({0: broken}, [1], places) == lost
    assert describe_loss({0: broken}, [0, 1], places).endswith(
        "on 10.0.0.2 (process 2) were lost (the process or its node has ended)"
    )
    failed = "worker 0 of 2 on 10.0.0.1 (process 1) failed (RuntimeError: Connection closed by peer [31m)"
    assert describe_loss({0: broken}, [], places) == failed


@pytest.mark.faults
def test_elastic_run_begins_with_the_workers_that_the_cluster_has_room_for(fit, plain):
    fitted = fit(changed(execution={"num_workers": 4, "min_workers": 1}))
    assert set(fitted.column("num_workers")) == {2}
    assert_close(fitted, plain)


@pytest.mark.faults
def test_run_that_diverges_fails_at_once_and_is_not_tried_again(fit, material, key, tmp_path):
    """The same steps would diverge again; max_failures is for workers that are lost."""
    run = Deadly(notes=tmp_path / "notes")
    config = changed(learning_rate=1e10, warmup_steps=0, execution={"checkpoint_every": 1, "max_failures": 3})
    with pytest.raises(DivergedError, match=r"training diverged by step (\d+).*on_divergence=rollback"):
        fit(config, run=run)
    (steps,) = run.lives()
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 6


def _ray_train_folders() -> set[Path]:
    return {path for path in Path(tempfile.gettempdir()).glob("enat-ray-train-*") if any(path.iterdir())}


@pytest.mark.faults
def test_sigterm_saves_a_checkpoint_and_the_same_command_resumes(enat, end_enat_when, tiny_config, tmp_path):
    """The checkpoint is there because of the signal: no other is due before the end. It is sent once Ray Train has begun."""
    values = json.loads(tiny_config.read_text())
    values["train"] |= {"num_steps": 100, "execution": {"checkpoint_every": 1000, "log_every": 1}}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**values, "targets": ["train"]}))
    command = ("run", tmp_path / "tiny.yaml", f"workspace={tmp_path / 'runs'}")
    store, before = tmp_path / "runs" / "store", _ray_train_folders()
    code, output = end_enat_when(lambda: bool(_ray_train_folders() - before), *command)
    assert code != 0 and "saving a checkpoint, then stopping" in output
    (step,) = {int(path.name.split("-")[1]) for path in store.glob("train/*/.parts/checkpoint-*.json")}
    assert 1 <= step < 100 and f"training stopped at step {step}, which is saved" in output
    again = enat(*command)
    assert again.returncode == 0, again.stderr
    (history,) = store.glob("train/*/history.json")
    assert [row["step"] for row in json.loads(history.read_text())] == list(range(1, 101))
    assert not list(store.glob("train/*/.parts"))


@pytest.mark.faults
def test_sigterm_saves_a_checkpoint_of_each_training_that_runs_side_by_side(end_enat_when, tiny_config, tmp_path):
    values = json.loads(tiny_config.read_text())
    values["train"] |= {"num_steps": 100_000, "execution": {"checkpoint_every": 100_000, "log_every": 1}}
    values |= {"targets": ["train"], "variants": {"b": {"train": {"learning_rate": 2e-3}}}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(values))
    store, before = tmp_path / "runs" / "store", _ray_train_folders()
    code, output = end_enat_when(
        lambda: len(_ray_train_folders() - before) == 2, "run", tmp_path / "tiny.yaml", "--jobs=2", f"workspace={tmp_path / 'runs'}"
    )
    assert code == 130 and "stopping train, train@b (interrupt again to stop immediately)" in output
    stopped = {path.parts[-3]: int(path.name.split("-")[1]) for path in store.glob("train/*/.parts/checkpoint-*.json")}
    assert len(stopped) == 2 and all(f"training stopped at step {step}, which is saved" in output for step in stopped.values())
    assert not list(store.glob("train/*/.work/lease.json")), "the next command need not wait"


# Without training ----------------------------------------------------------------------------------------------------------


def test_no_steps_give_the_initial_weights_of_the_seed(fit, material, key):
    untrained = fit(changed(num_steps=0))
    initial = initial_model(material.architecture(CONFIG), 0).state_dict()
    for weights in (untrained.raw, untrained.ema):
        assert weights.keys() == initial.keys() and all(weights[name].equal(value) for name, value in initial.items())
    assert untrained.history == []
    model = load_enat(material.store.fetch_file("train", key, untrained.made.files[0]))
    assert isinstance(model, ENAT) and model.config == material.architecture(CONFIG)


def test_more_workers_than_the_cluster_has_cpus_are_refused_at_once(fit):
    with pytest.raises(ValueError, match=r"train\.execution asks for 4 CPUs \(4 workers\), but the cluster has 2"):
        fit(changed(execution={"num_workers": 4}))
    with pytest.raises(ValueError, match=r"train\.execution asks for 3 CPUs \(3 workers\)"):
        fit(changed(execution={"num_workers": 4, "min_workers": 3}))


def test_token_map_of_another_tokenizer_is_refused(material, make_context):
    other = dataclasses.replace(material.inputs["tokenizer"], key="cd" * 32)
    with pytest.raises(
        ValueError, match=r"the token map of drawn \(16 px\) has tokenizer \w{12}, but the model expects tokenizer \w{12}"
    ):
        train.run(CONFIG, {**material.inputs, "tokenizer": other}, make_context(material.store, "train"))
