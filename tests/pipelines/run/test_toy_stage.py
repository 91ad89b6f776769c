"""A new stage is one file and one line of the graph: it is planned, run, costed, listed, submitted and evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_stage
from click.testing import CliRunner

from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cli.artifacts import artifacts
from pipelines.jobs import submission
from pipelines.reevaluation import plan as reevaluation_plan
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.workflow import config as configuration
from pipelines.workflow import driver
from pipelines.workflow.costs import cost_metrics
from pipelines.workflow.stage import Node

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"


@pytest.fixture(autouse=True)
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "GRAPH", (*graph.GRAPH, graph.Part(toy_stage.STAGE)))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def run() -> RunConfig:
    return load_run(DIGITS, ["targets=[histogram]", "seed=7"])


def _commit_inputs(nodes: list[Node], store: ArtifactStore) -> dict[str, Manifest]:
    """Artifacts of all stages but the toy's, as if a run had made them, an hour each."""
    made: dict[str, Manifest] = {}
    for node in nodes:
        if node.stage is toy_stage.STAGE:
            continue
        inputs = {name: made[id] for name, id in node.inputs.items()}
        made[node.id] = store.commit(
            Manifest(
                stage=node.stage.name,
                key=driver.stage_key(node, inputs),
                stage_version=node.stage.version,
                config=configuration.redacted(node.config),
                inputs={
                    name: {"stage": m.stage, "key": m.key, "digest": m.digest}
                    for name, m in inputs.items()
                    if node.stage.is_in_key(name)
                },
                files=(),
                summary=summary_of(node.stage.name),
                provenance={
                    "created": "2026-01-01",
                    "code": "test",
                    "seconds": 1.0,
                    "worker_seconds": 3600.0,
                    "device_seconds": 0.0,
                },
            )
        )
    return made


@pytest.fixture
def made(run: RunConfig, store: ArtifactStore, make_session: Callable[..., Any]) -> dict[str, Manifest]:
    nodes = graph.build(run)
    _commit_inputs(nodes, store)
    return {item.node.id: item.manifest for item in driver.execute(nodes, make_session(store))}


def test_stage_is_planned_with_its_inputs(run: RunConfig) -> None:
    nodes = {node.id: node for node in graph.build(run)}
    assert nodes["histogram"].inputs == {"samples": "generate"} and "evaluate" not in nodes
    assert nodes["histogram"].config.seed == 7, "the seed of the run"
    assert "histogram@untrained" in nodes


def test_stage_runs_and_is_costed(made: dict[str, Manifest], store: ArtifactStore) -> None:
    summary = toy_stage.HistogramSummary.read(made["histogram"])
    assert (summary.num_labels, summary.seed) == (10, 7)
    metrics = cost_metrics(store, made["histogram"], graph.stages())
    assert metrics["cost/evaluation_worker_hours"] == metrics["cost/generation_worker_hours"] == 1
    assert metrics["cost/training_worker_hours"] == 1 and metrics["cost/tokenizing_worker_hours"] == 3


def test_stage_is_listed(made: dict[str, Manifest], store: ArtifactStore) -> None:
    answer = CliRunner().invoke(artifacts, ["ls", "--store", store.uri, "--stage", "histogram"], catch_exceptions=False)
    assert "10 labels counted" in answer.stdout and "digits" in answer.stdout and "2 artifacts" in answer.stdout


def test_stage_is_submitted(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {each.node: each.workers.num_workers for each in submission.resource_requests(run)}
    assert requests["histogram"] == 3 and "train" in requests and not {"evaluate", "reference"} & requests.keys()
    with_table = graph.Part(toy_stage.STAGE, lambda run, reader: toy_stage.HistogramConfig(table="table.csv"))
    monkeypatch.setattr(graph, "GRAPH", (*graph.GRAPH[:-1], with_table))
    with pytest.raises(ValueError, match=r"histogram\.table is table\.csv, a path of this machine"):
        submission.prepare(DIGITS, ["targets=[histogram]"], allow_local_store=True)


def test_stage_is_evaluated_again(made: dict[str, Manifest], store: ArtifactStore) -> None:
    model = reevaluation_plan.Model(SimpleNamespace(), store, made["train"])  # type: ignore[arg-type]
    plan = reevaluation_plan.make_plan(model, None, reevaluation_plan.Request.of(None, []))
    assert {node.id: node.inputs for node in plan.nodes}["histogram"] == {"samples": "generate"}
    assert plan.nodes[-1].id == "evaluate" and plan.given["model"] == made["train"]
    fresh = {node.id: node.stage.name for node in reevaluation_plan.recomputed(plan, "token").nodes}
    assert fresh["histogram"] == "fresh-histogram" and fresh["reference"] == "reference"


def test_an_evaluation_is_repeated_with_its_inputs(made: dict[str, Manifest], store: ArtifactStore) -> None:
    """Not with the dataset, which may no longer exist: reference and judge have the inputs of the last evaluation."""
    every = _commit_inputs(graph.build(load_run(DIGITS, ["seed=7"])), store)
    model = reevaluation_plan.Model(SimpleNamespace(), store, every["train"])  # type: ignore[arg-type]
    plan = reevaluation_plan.make_plan(model, every["evaluate"], reevaluation_plan.Request.of(None, []))
    assert [node.id for node in plan.nodes] == ["generate", "histogram", "evaluate"]
    assert set(plan.given) == {"model", "tokenizer", "reference", "dataset"}
    assert plan.given["reference"] == every["reference"]
    again = reevaluation_plan.make_plan(model, every["evaluate"], reevaluation_plan.Request.of(None, ["reference.num_epochs=3"]))
    assert "reference" not in again.given and {"reference", "dataset"} <= {node.id for node in again.nodes}
