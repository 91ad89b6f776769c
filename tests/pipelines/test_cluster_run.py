"""Whole runs submitted to a cluster, with token, store in a bucket and MLflow behind HTTP; nodes, drivers and heads are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray_nodes import TOKEN, RayNodes, free_ports, ray_nodes

from pipelines.artifacts import open_store

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300
STEPS = 160
# Long enough to be killed in the middle of, with a checkpoint every ten steps.
TRAINING = (f"train.num_steps={STEPS}", "train.execution.checkpoint_every=10", "train.execution.max_failures=5")


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server of its own; its URL."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_ports(1)[0]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _is_well(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield url
    finally:
        _end(server)


def _is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
    for each in family:
        each.terminate()
    for each in psutil.wait_procs(family, timeout=10)[1]:
        each.kill()
    process.wait()


class Runs:
    """The tiny run under a name, on a cluster: submitted, looked at, and what came of it."""

    def __init__(self, config: Path, bucket: Any, mlflow: str, workspace: Path) -> None:
        self.config, self.bucket, self.mlflow = config, bucket, mlflow
        self.places = (f"store={bucket.uri}", f"workspace={workspace}", f"tracking.uri={mlflow}", "tracking.enabled=true")

    def enat(self, nodes: RayNodes, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", *map(str, arguments), "--address", nodes.url]
        return subprocess.run(
            command, cwd=REPOSITORY, env={**nodes.environment}, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def submit(self, nodes: RayNodes, *overrides: str) -> dict[str, Any]:
        done = self.enat(nodes, "submit", self.config, *self.places, *TRAINING, *overrides, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def follow(self, nodes: RayNodes, id: str) -> subprocess.CompletedProcess[str]:
        return self.enat(nodes, "jobs", "logs", id, "--follow")

    def wait_until_training(self, nodes: RayNodes, id: str) -> None:
        """Until a checkpoint is there that no earlier call has seen."""
        seen = self.checkpoints()
        deadline = time.monotonic() + PATIENCE
        while not self.checkpoints() - seen:
            assert time.monotonic() < deadline, self.enat(nodes, "jobs", "logs", id).stdout[-3000:]
            time.sleep(0.2)

    def checkpoints(self) -> set[str]:
        return {file.name for file in self.bucket.list() if file.name.startswith("train/") and "/.parts/checkpoint-" in file.name}

    def manifests(self, stage: str) -> list[Any]:
        return [manifest for manifest in open_store(self.bucket.uri).manifests() if manifest.stage == stage]

    def tracked(self, stage: str) -> list[Any]:
        """Runs of a stage in MLflow, oldest first."""
        client = MlflowClient(self.mlflow)
        experiment = client.get_experiment_by_name("enat")
        return client.search_runs([experiment.experiment_id], f"run_name = '{stage}'", order_by=["attributes.start_time ASC"])

    def steps(self, run: Any) -> list[int]:
        return [point.step for point in MlflowClient(self.mlflow).get_metric_history(run.info.run_id, "loss")]


@pytest.fixture
def runs(tiny_config: Path, make_bucket: Callable[..., Any], mlflow_server: str, tmp_path: Path) -> Runs:
    """A bucket of its own for each test, and whatever experiment there was is out of sight."""
    client = MlflowClient(mlflow_server)
    if (experiment := client.get_experiment_by_name("enat")) is not None:
        client.rename_experiment(experiment.experiment_id, f"enat-{tmp_path.name}-before")
    return Runs(tiny_config, make_bucket("team/store"), mlflow_server, tmp_path / "workspace")


def _variables(folder: Path) -> dict[str, str]:
    return {"ENAT_CACHE": str(folder / "cache")}


def _assert_no_secret(nodes: RayNodes, runs: Runs, *texts: str) -> None:
    """Not in what is said and listed, and not in MLflow."""
    secrets = [TOKEN, os.environ["AWS_SECRET_ACCESS_KEY"]]
    tracked = [str(run.to_dictionary()) for stage in ("tiny", "train", "evaluate") for run in runs.tracked(stage)]
    assert tracked
    for text in (*texts, *tracked, runs.enat(nodes, "jobs", "ls", "--json").stdout):
        assert not [secret for secret in secrets if secret in text]


def test_a_run_goes_on_where_a_node_is_lost_in_training_and_another_one_comes(runs: Runs, tmp_path: Path) -> None:
    with ray_nodes(1, **_variables(tmp_path)) as nodes:
        other = nodes.add_node(1)
        job = runs.submit(nodes, "train.execution.num_workers=2")  # one on each node
        assert job["outcome"] == "submitted"
        runs.wait_until_training(nodes, job["id"])
        nodes.kill(other)
        nodes.add_node(1)
        done = runs.follow(nodes, job["id"])
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
        assert {manifest.stage for manifest in open_store(runs.bucket.uri).manifests()} >= {
            "dataset",
            "train",
            "evaluate",
            "report",
        }
        (trained,) = runs.manifests("train")
        assert trained.metrics["final/step"] == STEPS and trained.summary["num_restarts"] >= 1
        (run,) = runs.tracked("train")
        assert run.info.status == "FINISHED" and runs.steps(run)[-1] == STEPS
        (parent,) = runs.tracked("tiny")
        assert parent.info.status == "FINISHED"
        _assert_no_secret(nodes, runs, done.stdout, done.stderr, json.dumps(job))


def test_a_run_that_was_stopped_goes_on_when_it_is_submitted_again(runs: Runs, tmp_path: Path) -> None:
    with ray_nodes(2, **_variables(tmp_path)) as nodes:
        job = runs.submit(nodes)
        runs.wait_until_training(nodes, job["id"])
        stopped = json.loads(runs.enat(nodes, "jobs", "stop", job["id"], "--json").stdout)
        assert (stopped["stopped"], stopped["status"]) == (True, "STOPPED")
        again = runs.submit(nodes)
        assert (again["id"], again["attempt"]) == (f"{job['id']}-2", 2)
        done = runs.follow(nodes, again["id"])
        assert done.returncode == 0, done.stdout[-4000:]
        reused = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("✓") and line.endswith("reused")}
        assert reused == {"dataset", "tokenizer", "token_map", "reference"}
        first, second = map(runs.steps, runs.tracked("train"))
        assert first[0] == 1 and second[0] > 10 and second[-1] == STEPS, "it went on from a checkpoint"
        assert runs.submit(nodes)["outcome"] == "succeeded"


def test_a_run_whose_head_was_lost_goes_on_on_another_cluster(runs: Runs, tmp_path: Path) -> None:
    with ray_nodes(2, **_variables(tmp_path / "first")) as nodes:
        job = runs.submit(nodes)
        runs.wait_until_training(nodes, job["id"])
        nodes.kill(nodes.processes[0])
        lost = runs.enat(nodes, "jobs", "ls")
        assert lost.returncode == 2 and "there is no Ray cluster with a Jobs API" in lost.stderr
    with ray_nodes(2, **_variables(tmp_path / "second")) as nodes:
        again = runs.submit(nodes)
        assert (again["id"], again["attempt"], again["outcome"]) == (job["id"], 1, "submitted"), "the new head knows of no attempt"
        done = runs.follow(nodes, again["id"])
        assert done.returncode == 0, done.stdout[-4000:]
        second = runs.steps(runs.tracked("train")[-1])
        assert second[0] > 10 and second[-1] == STEPS, "it went on from a checkpoint"
