"""Tracking observes: everything of a run stands in MLflow, and nothing of MLflow can stop a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines import config as configuration
from pipelines import tracking, workflow
from pipelines.artifacts import LocalStore, Manifest
from pipelines.tracking import RunHandle, TrackingConfig
from pipelines.workflow import Execution, Node, Session, Stage, StageContext, StageResult

CONFIG = TrackingConfig(experiment="tests")
CLOSED = "http://127.0.0.1:9"  # the discard port, where nothing listens


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    num_steps: int = 3
    source: str = "http://reader:secret@host/images"
    long: str = "x" * 7000
    execution: Execution = field(default_factory=Execution)


def _draw(config: CurveConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    for step in range(config.num_steps):
        context.run.log_metrics({"loss": 1 / (step + 1), "gradient@norm[0]": float(step)}, step)
    context.run.log_bytes(b"picture", "samples/step-00000003.png")
    return StageResult(
        files=[context.write("text", lambda path: path.write_text("text"))], metrics={"final": 0.25}, worker_seconds=2.0
    )


NODES = [
    Node("curve", Stage("curve", 1, _draw), CurveConfig()),
    Node("again@small", Stage("again", 1, _draw), CurveConfig(num_steps=2), {"text": "curve"}),
]


def _run(make_session: Callable[..., Session], store: LocalStore, uri: str, nodes: list[Node] = NODES) -> tuple[Session, Any]:
    parent = tracking.start_run(uri, CONFIG, "whole", {"enat.store": "here"})
    session = make_session(store, run=parent, tracking=CONFIG)
    done = workflow.execute(nodes, session)
    parent.finish()
    return session, done


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An sqlite store, made once: MLflow takes seconds for its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    tracking.start_run(uri, CONFIG, "first", {}).finish()
    return MlflowClient(uri)


@pytest.fixture(scope="module")
def recorded(
    make_session: Callable[..., Session], uri: str, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunHandle, list[Any]]:
    """Two stages run with tracking, then again when there is nothing left to do."""
    store = LocalStore(tmp_path_factory.mktemp("store"))
    _run(make_session, store, uri)
    session, done = _run(make_session, store, uri)
    return session.run, done


@pytest.fixture
def handle(uri: str, client: MlflowClient) -> RunHandle:
    return tracking.start_run(uri, CONFIG, "single", {})


def _stage_runs(client: MlflowClient, *, reused: bool) -> dict[str, Any]:
    experiment = client.get_experiment_by_name("tests")
    filter_string = f"tags.`enat.reused` = '{str(reused).lower()}'"
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], filter_string)}


# What is recorded ----------------------------------------------------------------------------------------------------------


def test_stages_are_runs_nested_in_the_run_of_the_pipeline(client: MlflowClient, recorded) -> None:
    parent, _ = recorded
    children = _stage_runs(client, reused=True)
    assert children.keys() == {"curve", "again@small"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.run_id}
    assert {run.info.status for run in [*children.values(), client.get_run(parent.run_id)]} == {"FINISHED"}
    assert client.get_run(parent.run_id).data.tags["enat.store"] == "here"


def test_a_stage_s_run_names_its_artifact_and_its_inputs(client: MlflowClient, recorded) -> None:
    _, (first, second) = recorded
    tags = _stage_runs(client, reused=False)["again@small"].data.tags
    assert tags["enat.stage"] == "again" and tags["enat.node"] == "again@small"
    assert tags["enat.key"] == second.manifest.key and tags["enat.digest"] == second.manifest.digest
    assert tags["enat.input.text"] == f"curve/{first.manifest.key}"
    assert tags["enat.code"] == second.manifest.provenance["code"]


def test_a_stage_s_config_is_its_parameters(client: MlflowClient, recorded) -> None:
    params = _stage_runs(client, reused=False)["curve"].data.params
    assert params["num_steps"] == "3" and params["execution.batch_size"] == "64"
    assert params["long"] == "x" * 6000, "as much of it as MLflow keeps"


def test_metrics_have_their_steps_and_pictures_lie_beside_them(client: MlflowClient, recorded) -> None:
    run = _stage_runs(client, reused=False)["curve"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert run.data.metrics["final"] == 0.25 and run.data.metrics["cost/worker_seconds"] == 2.0
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/step-00000003.png"]


def test_a_reused_stage_has_the_metrics_of_when_it_was_made(client: MlflowClient, recorded) -> None:
    run = _stage_runs(client, reused=True)["curve"]
    assert run.data.metrics["final"] == 0.25 and "loss" not in run.data.metrics


def test_a_failed_stage_s_run_says_so(
    make_session: Callable[..., Session], local_store: LocalStore, uri: str, client: MlflowClient
) -> None:
    def fail(config: CurveConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        raise RuntimeError("it broke")

    with pytest.raises(workflow.StageError):
        _run(make_session, local_store, uri, [Node("failing", Stage("failing", 1, fail), CurveConfig())])
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id], "run_name = 'failing'")
    assert run.info.status == "FAILED"


# Odd values ----------------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_left_out_and_the_others_stay(client: MlflowClient, handle: RunHandle) -> None:
    handle.log_metrics({"good": 1.0, "nan": math.nan, "up": math.inf, "down": -math.inf}, 1)
    handle.log_metrics({"nan": math.nan}, 2)
    assert client.get_run(handle.run_id).data.metrics == {"good": 1.0}


@pytest.mark.parametrize("name", ["gradient@norm[0]", "α/β", "50%", "a:b", "with space", "final/class_agreement"])
def test_any_name_of_a_metric_or_parameter_is_recorded(client: MlflowClient, handle: RunHandle, name: str) -> None:
    handle.log_metrics({name: 2.0})
    handle.log_params({name: 3})
    data = client.get_run(handle.run_id).data
    assert list(data.metrics.values()) == [2.0] and list(data.params.values()) == ["3"]


def test_more_parameters_than_mlflow_takes_at_once_are_all_recorded(client: MlflowClient, handle: RunHandle) -> None:
    handle.log_params({"many": {f"key{number}": number for number in range(250)}, "empty": {}, "none": None, "list": [1, 2]})
    params = client.get_run(handle.run_id).data.params
    assert len(params) == 253 and params["many.key249"] == "249" and params["list"] == "[1, 2]" and params["none"] == "None"


def test_a_handle_works_after_it_was_sent_to_another_process(client: MlflowClient, handle: RunHandle) -> None:
    import pickle

    pickle.loads(pickle.dumps(handle)).log_metrics({"loss": 0.5}, 7)
    assert client.get_metric_history(handle.run_id, "loss")[0].step == 7


# Out of order --------------------------------------------------------------------------------------------------------------


def test_without_a_server_a_run_is_made_all_the_same_and_warns_once(
    make_session: Callable[..., Session], local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipelines"):
        _, done = _run(make_session, local_store, CLOSED)
    assert [item.is_reused for item in done] == [False, False]
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    assert len(warnings) == 1 and warnings[0].startswith(f"tracking at {CLOSED} does not answer; this run goes on without it")
    assert "\n" not in warnings[0]


def test_a_server_that_goes_away_during_a_run_is_warned_of_once(
    make_session: Callable[..., Session],
    local_store: LocalStore,
    tmp_path: Path,
    uri: str,
    client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The store's file is replaced after the first stage has begun."""
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(Path(uri.removeprefix("sqlite:///")).read_bytes())

    def destroy(config: CurveConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        copy.write_bytes(b"no database")
        return _draw(config, inputs, context)

    nodes = [Node("destroy", Stage("destroy", 1, destroy), CurveConfig()), Node("next", Stage("curve", 1, _draw), CurveConfig())]
    with caplog.at_level(logging.WARNING, "pipelines"):
        _, done = _run(make_session, local_store, f"sqlite:///{copy}", nodes)
    assert len(done) == 2
    assert sum(record.name == "pipelines.tracking" for record in caplog.records) == 1


def test_tracking_that_is_off_touches_nothing(tmp_path: Path) -> None:
    handle = tracking.start_run(f"sqlite:///{tmp_path}/mlflow.db", TrackingConfig(enabled=False), "run", {})
    child = tracking.start_run(f"sqlite:///{tmp_path}/mlflow.db", CONFIG, "child", {}, handle)
    for each in (handle, child):
        each.log_metrics({"loss": 1.0})
        each.log_params({"a": 1})
        each.set_tags({"a": "b"})
        each.log_bytes(b"", "a.png")
        each.finish()
        assert each.run_id is None
    assert list(tmp_path.iterdir()) == []


# Secrets -------------------------------------------------------------------------------------------------------------------


def test_nothing_that_is_recorded_holds_credentials(client: MlflowClient, recorded) -> None:
    for run in _stage_runs(client, reused=False).values():
        everything = str(run.data.params) + str(run.data.tags)
        assert "secret" not in everything and run.data.params["source"] == "http://host/images"


def test_the_run_s_own_config_is_recorded_without_credentials(client: MlflowClient, handle: RunHandle, tiny_config: Path) -> None:
    from pipelines import pipeline

    run = pipeline.load_run(tiny_config, ("tracking.uri=http://writer:secret@host", "store=ftp://writer:secret@host/store"))
    handle.log_params(configuration.redacted(run))
    params = client.get_run(handle.run_id).data.params
    assert params["tracking.uri"] == "http://host" and params["store"] == "ftp://host/store"
    assert "secret" not in str(params)


def test_a_warning_about_a_server_does_not_show_its_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert tracking.start_run("http://writer:secret@127.0.0.1:9", CONFIG, "run", {}).run_id is None
    messages = [record.getMessage() for record in caplog.records]
    assert any("does not answer" in message for message in messages) and not any("secret" in message for message in messages)


# Where ---------------------------------------------------------------------------------------------------------------------


def test_the_configured_server_comes_before_the_environment_s_and_both_before_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.resolve_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking.resolve_uri(TrackingConfig(), tmp_path) == "http://environment"
    assert tracking.resolve_uri(TrackingConfig(uri="http://config"), tmp_path) == "http://config"


def test_pictures_of_a_file_store_lie_beside_it_wherever_the_command_is_run(
    recorded, uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert list(folder.glob("mlflow-artifacts/*/artifacts/samples/step-00000003.png"))
    assert list(tmp_path.iterdir()) == []
