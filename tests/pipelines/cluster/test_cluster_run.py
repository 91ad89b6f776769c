"""Whole runs submitted to a cluster, with token, store in a bucket and MLflow behind HTTP; nodes, drivers and heads are killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.artifacts.open import open_store
from services.mlflow_server import mlflow_server
from services.ray_nodes import TOKEN, RayNodes, ray_nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
PATIENCE = 500
PASSWORD = "hunter2-of-the-cluster"  # in reach of jobs, as the token and the key of the bucket are
STEPS = 160
# Long enough to be killed in the middle of, with a checkpoint every ten steps.
DEMO_STEPS = 300  # with a node lost more than half a minute, after which a log shows progress
# The demo: fewer steps, images and samples, and a tokenizer that is trained on one CPU, since nodes here have no more.
SHORTER = (
    "tokenizer.recipe.num_steps=60",
    "tokenizer.execution.cpus_per_worker=1",
    "reference.num_epochs=2",
    f"train.num_steps={DEMO_STEPS}",
    "generate.num_samples=100",
    "generate.shard_size=50",
)
TRAINING = (f"train.num_steps={STEPS}", "train.execution.checkpoint_every=10", "train.execution.max_failures=5")


@dataclass(frozen=True)
class Mlflow:
    """folder: database, files of runs, log."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(folder) as url:
        yield Mlflow(url, folder)


class Runs:
    """A run on a cluster: submitted, followed, and its results. config: of the tiny run by default."""

    def __init__(self, config: Path, bucket: Any, server: Mlflow, workspace: Path) -> None:
        self.config, self.bucket, self.server, self.mlflow, self.workspace = config, bucket, server, server.url, workspace
        self.places = (f"store={bucket.uri}", f"workspace={workspace}", f"tracking.uri={server.url}", "tracking.enabled=true")

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
        """Until there is a complete checkpoint that no earlier call has seen."""
        seen = self.checkpoints()
        deadline = time.monotonic() + PATIENCE
        while not self.checkpoints() - seen:
            assert time.monotonic() < deadline, self.enat(nodes, "jobs", "logs", id).stdout[-3000:]
            time.sleep(0.2)

    def checkpoints(self) -> set[str]:
        """Those that every rank has written, by step and attempt."""
        found = re.findall(r"/\.parts/checkpoint-(\d+-\w+)-\d{5}-of-(\d{5})", "\n".join(file.name for file in self.bucket.list()))
        return {checkpoint for (checkpoint, ranks), written in Counter(found).items() if written == int(ranks)}

    def manifests(self, stage: str) -> list[Any]:
        return [manifest for manifest in open_store(self.bucket.uri).manifests() if manifest.stage == stage]

    def tracked(self, stage: str) -> list[Any]:
        """Runs of a stage in MLflow, or of the model, oldest first."""
        client = MlflowClient(self.mlflow)
        experiment = client.get_experiment_by_name("enat")
        wanted = (
            f"tags.`enat.node` = '{stage}'" if stage != "digits" else "tags.`enat.name` = 'digits' and tags.`enat.variant` = 'main'"
        )
        return client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"])

    def steps(self, run: Any) -> list[int]:
        return [point.step for point in self._losses(run)]

    def continued_from(self, run: Any) -> list[int]:
        """Steps of the run that this one continued: they are logged all at once."""
        points = self._losses(run)
        return [point.step for point in points if point.timestamp == points[0].timestamp]

    def _losses(self, run: Any) -> list[Any]:
        return MlflowClient(self.mlflow).get_metric_history(run.info.run_id, "loss")


@pytest.fixture
def runs(tiny_config: Path, make_bucket: Callable[..., Any], mlflow: Mlflow, tmp_path: Path) -> Runs:
    """A bucket of its own for each test. The experiment of an earlier test gets another name."""
    client = MlflowClient(mlflow.url)
    if (experiment := client.get_experiment_by_name("enat")) is not None:
        client.rename_experiment(experiment.experiment_id, f"enat-{tmp_path.name}-before")
    return Runs(tiny_config, make_bucket("team/store"), mlflow, tmp_path / "workspace")


def _variables(folder: Path) -> dict[str, str]:
    return {"ENAT_CACHE": str(folder / "cache"), "MLFLOW_TRACKING_USERNAME": "lab", "MLFLOW_TRACKING_PASSWORD": PASSWORD}


def _assert_no_secret(nodes: RayNodes, runs: Runs, *texts: str) -> None:
    """Nothing that a job has in its environment: not in printed and listed texts, in MLflow's database, files and log, in the
    workspace, or in the store."""
    secrets = [TOKEN, PASSWORD, os.environ["AWS_SECRET_ACCESS_KEY"]]
    assert {*secrets} <= {*nodes.environment.values()}
    written = [path for folder in (runs.server.folder, runs.workspace) for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "log", "samples.png", "changes.diff", "digits.html"} - {path.name for path in written} <= {"changes.diff"}
    texts_and_files = {
        f"text {number}": text.encode() for number, text in enumerate((*texts, runs.enat(nodes, "jobs", "ls", "--json").stdout))
    }
    texts_and_files |= {str(path): path.read_bytes() for path in written}
    texts_and_files |= {file.name: runs.bucket.read(file.name) for file in runs.bucket.list()}
    assert not [(place, secret) for place, content in texts_and_files.items() for secret in secrets if secret.encode() in content]


def test_a_run_continues_after_a_node_is_lost_and_replaced(runs: Runs, tmp_path: Path) -> None:
    with ray_nodes(1, **_variables(tmp_path)) as nodes:
        other = nodes.add_node(1)
        runs.config = DIGITS
        job = runs.submit(nodes, *SHORTER)  # two workers, one on each node
        assert job["outcome"] == "submitted"
        runs.wait_until_training(nodes, job["id"])
        nodes.kill(other)
        nodes.add_node(1)
        done = runs.follow(nodes, job["id"])
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
        assert re.search(rf"^  train \d+ of {DEMO_STEPS} steps", done.stdout, flags=re.MULTILINE), "the followed log shows progress"
        made = {stage: len(runs.manifests(stage)) for stage in ("dataset", "token_map", "train", "evaluate", "report")}
        assert made == {"dataset": 1, "token_map": 1, "train": 2, "evaluate": 2, "report": 1}, "also of the untrained variant"
        (trained,) = (manifest for manifest in runs.manifests("train") if manifest.config["num_steps"])
        assert trained.metrics["final/step"] == DEMO_STEPS and trained.summary["num_restarts"] >= 1
        (run,) = runs.tracked("train")
        assert run.info.status == "FINISHED" and runs.steps(run)[-1] == DEMO_STEPS
        (parent,) = runs.tracked("digits")
        assert parent.info.status == "FINISHED"
        pinned = {name: job["metadata"][name] for name in ("enat.code", "enat.commit", "enat.diff_sha256", "enat.code_sha256")}
        assert pinned.items() <= parent.data.tags.items()
        files = {file.path for file in MlflowClient(runs.mlflow).list_artifacts(parent.info.run_id)}
        assert ("changes.diff" in files) == bool(pinned["enat.diff_sha256"])
        _assert_no_secret(nodes, runs, done.stdout, done.stderr, json.dumps(job))


def test_a_stopped_run_resumes_when_it_is_submitted_again(runs: Runs, tmp_path: Path) -> None:
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
        first, second = runs.tracked("train")
        assert len(runs.continued_from(first)) == 1 and len(runs.continued_from(second)) >= 10, "it resumed from a checkpoint"
        assert runs.steps(second) == [*range(1, STEPS + 1)]
        assert runs.submit(nodes)["outcome"] == "succeeded"


def test_a_run_whose_head_was_lost_resumes_on_another_cluster(runs: Runs, tmp_path: Path) -> None:
    with ray_nodes(2, **_variables(tmp_path / "first")) as nodes:
        job = runs.submit(nodes)
        runs.wait_until_training(nodes, job["id"])
        nodes.kill(nodes.processes[0])
        lost = runs.enat(nodes, "jobs", "ls")
        assert lost.returncode == 2 and "no Ray cluster with a Jobs API" in lost.stderr
    with ray_nodes(2, **_variables(tmp_path / "second")) as nodes:
        again = runs.submit(nodes)
        assert (again["id"], again["attempt"], again["outcome"]) == (job["id"], 1, "submitted"), "the new head knows of no attempt"
        done = runs.follow(nodes, again["id"])
        assert done.returncode == 0, done.stdout[-4000:]
        second = runs.tracked("train")[-1]
        assert len(runs.continued_from(second)) >= 10, "it resumed from a checkpoint"
        assert runs.steps(second) == [*range(1, STEPS + 1)]
