"""Tracking observes: everything of a run is recorded in MLflow, and no failure of MLflow can stop a run."""

from __future__ import annotations

import logging
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_model_name

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.resources import Execution
from pipelines.run.loading import load_run
from pipelines.tracking import registry as tracking_registry
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle, TrackingConfig, start_run
from pipelines.workflow import config as configuration
from pipelines.workflow import driver, stage
from pipelines.workflow.node_run import Session
from pipelines.workflow.stage import Node, Stage, StageContext, StageResult
from services.free_ports import free_ports
from services.mlflow_database import mlflow_database
from services.mlflow_server import mlflow_server

CONFIG = TrackingConfig(experiment="tests")
CLOSED = "http://127.0.0.1:9"  # the discard port, where nothing listens


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    num_steps: int = 3
    source: str = ""
    long: str = ""
    unset: str | None = None
    execution: Execution = field(default_factory=Execution)


def _draw(config: CurveConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    for step in range(config.num_steps):
        context.run.log_metrics({"loss": 1 / (step + 1), "gradient@norm[0]": float(step)}, step)
    context.run.log_bytes(b"picture", "samples/step-00000003.png")
    return StageResult(
        files=[context.write("text", lambda path: path.write_text("text"))], metrics={"final": 0.25}, worker_seconds=2.0
    )


CURVE = CurveConfig(
    source="http://reader:secret@host/images", long="x" * 7000, execution=Execution(num_workers=3, worker_batch_size=32)
)
NODES = [
    Node("curve", Stage("curve", 1, _draw), CURVE),
    Node("again@small", Stage("again", 1, _draw), replace(CURVE, num_steps=2), {"text": "curve"}),
]


def _run(make_session: Callable[..., Session], store: ArtifactStore, uri: str, nodes: list[Node] = NODES) -> tuple[Session, Any]:
    parent = tracking.start_run(uri, CONFIG, "whole", {"enat.store": "here"})
    session = make_session(store, run=parent, tracking=CONFIG)
    done = driver.execute(nodes, session)
    parent.finish()
    return session, done


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_database(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    tracking.start_run(uri, CONFIG, "first", {}).finish()
    return MlflowClient(uri)


@pytest.fixture(scope="module")
def recorded(
    make_session: Callable[..., Session], uri: str, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunHandle, list[Any]]:
    """Two stages run with tracking, then again when both are reused."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
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


@pytest.mark.slow
def test_runs_of_stages_are_nested_and_name_their_artifacts(client: MlflowClient, recorded) -> None:
    parent, (first, second) = recorded
    children = _stage_runs(client, reused=True)
    assert children.keys() == {"curve", "again@small"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.run_id}
    assert {run.info.status for run in [*children.values(), client.get_run(parent.run_id)]} == {"FINISHED"}
    assert client.get_run(parent.run_id).data.tags["enat.store"] == "here"
    tags = _stage_runs(client, reused=False)["again@small"].data.tags
    assert tags["enat.stage"] == "again" and tags["enat.node"] == "again@small"
    assert tags["enat.key"] == second.manifest.key and tags["enat.digest"] == second.manifest.digest
    assert tags["enat.input.text"] == f"curve/{first.manifest.key}"
    assert tags["enat.code"] == second.manifest.provenance["code"]


def test_the_run_of_a_stage_has_its_config_metrics_and_images(client: MlflowClient, recorded) -> None:
    """The metrics of a reused stage are those of its artifact."""
    run = _stage_runs(client, reused=False)["curve"]
    assert run.data.params["execution.worker_batch_size"] == "32" and run.data.params["execution.num_workers"] == "3"
    assert not {"num_steps", "unset", "execution.num_cpus"} & run.data.params.keys(), "defaults are not logged"
    assert _stage_runs(client, reused=False)["again@small"].data.params["num_steps"] == "2"
    assert run.data.params["long"] == "x" * 6000, "as much of it as MLflow keeps"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert run.data.metrics["final"] == 0.25 and run.data.metrics["cost/worker_seconds"] == 2.0
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/step-00000003.png"]
    reused = _stage_runs(client, reused=True)["curve"].data.metrics
    assert reused["final"] == 0.25 and "loss" not in reused


def test_a_history_is_logged_in_batches_that_mlflow_accepts(handle: RunHandle, client: MlflowClient) -> None:
    """More than the 1,000 values that it accepts at once. Values that are not finite are left out."""
    rows = [{"step": step, "loss": 1 / step, "group@norm": math.inf if step == 2 else 1.0} for step in range(1, 601)]
    handle.log_history(rows)
    assert handle.run_id is not None and not handle._outbox.is_refused
    loss, norm = (client.get_metric_history(handle.run_id, name) for name in ("loss", "group_norm"))
    assert [(point.step, point.value) for point in loss] == [(step, 1 / step) for step in range(1, 601)]
    assert len(norm) == 599 and "step" not in client.get_run(handle.run_id).data.metrics


def test_the_run_of_a_failed_stage_is_marked_as_failed(
    make_session: Callable[..., Session], local_store: ArtifactStore, uri: str, client: MlflowClient
) -> None:
    def fail(config: CurveConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        raise RuntimeError("it broke")

    with pytest.raises(stage.StageError):
        _run(make_session, local_store, uri, [Node("failing", Stage("failing", 1, fail), CurveConfig())])
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id], "run_name = 'failing'")
    assert run.info.status == "FAILED"


# Odd values ----------------------------------------------------------------------------------------------------------------


_COMMAND = """
import os, signal, sys
from pipelines.tracking import run
config = run.TrackingConfig(experiment="killed")
parent = run.start_run(sys.argv[1], config, sys.argv[2], {})
run.start_run(sys.argv[1], config, f"{sys.argv[2]} stage", {}, parent)
print("started", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.faults
def test_runs_of_a_killed_command_are_marked_as_failed_by_the_next_one(uri: str, client: MlflowClient) -> None:
    """Those of commands that are alive, of other hosts and of other programs are not changed."""

    def begin(name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", _COMMAND, uri, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        return process

    killed, alive = begin("killed"), begin("alive")
    killed.communicate()
    experiment = client.get_experiment_by_name("killed").experiment_id
    (theirs,) = client.search_runs([experiment], "run_name = 'killed'")
    away = {tracking.HOST_TAG: "another host", tracking.PROCESS_TAG: theirs.data.tags[tracking.PROCESS_TAG]}
    client.create_run(experiment, run_name="another host", tags=away)
    client.create_run(experiment, run_name="another program")
    try:
        tracking.start_run(uri, TrackingConfig(experiment="killed"), "next", {}).finish()
        statuses = {run.info.run_name: run.info.status for run in client.search_runs([experiment])}
    finally:
        alive.communicate()
    assert statuses == {
        **dict.fromkeys(("killed", "killed stage"), "FAILED"),
        **dict.fromkeys(("alive", "alive stage", "another host", "another program"), "RUNNING"),
        "next": "FINISHED",
    }


def test_any_name_and_value_is_recorded_except_numbers_that_are_not_finite(client: MlflowClient, handle: RunHandle) -> None:
    """MLflow refuses some characters in names, and more than 100 parameters at once. Another process may use the handle."""
    names = ["gradient@norm[0]", "α/β", "50%", "a:b", "with space", "final/class_agreement"]
    for name in names:
        pickle.loads(pickle.dumps(handle)).log_metrics({name: 2.0, "nan": math.nan, "up": math.inf, "down": -math.inf}, 7)
    many = {f"key{number}": number for number in range(250)}
    handle.log_params({**dict.fromkeys(names, 3), "many": many, "empty": {}, "none": None, "list": [1, 2]})
    data = client.get_run(handle.run_id).data
    assert list(data.metrics.values()) == [2.0] * 6 and list(data.params.values()).count("3") == 6 + 1
    assert client.get_metric_history(handle.run_id, "final/class_agreement")[0].step == 7
    params = data.params
    assert len(params) == 259 and params["many.key249"] == "249" and params["list"] == "[1, 2]" and params["none"] == "None"


# Failures ------------------------------------------------------------------------------------------------------------------


def test_without_a_server_a_run_completes_and_warns_at_its_start_and_end(
    make_session: Callable[..., Session], local_store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipelines"):
        session, done = _run(make_session, local_store, CLOSED.replace("http://", "http://writer:secret@"))
        assert session.run.register_model("enat", {}, {tracking_registry.DIGEST_TAG: "a"}, "", "newest") is None
    assert [item.is_reused for item in done] == [False, False]
    warning, at_end = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    assert warning.startswith(f"tracking at {CLOSED} does not answer") and "MLFLOW_TRACKING_URI" in warning
    assert at_end.startswith(f"tracking at {CLOSED} still does not answer; the same command")
    assert "secret" not in warning + at_end


@pytest.mark.faults
@pytest.mark.parametrize("stops", ["before", "between"])
def test_what_a_server_missed_is_recorded_once_when_it_answers(
    stops: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the answer to a request was lost, whose work was done."""
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.0)
    config, lost = TrackingConfig(experiment=stops), []
    place = f"http://127.0.0.1:{free_ports(1)[0]}"

    def log(parent: RunHandle, child: RunHandle, step: int) -> None:
        parent.set_tags({"step": str(step)})
        child.log_metrics({"loss": 1 / step}, step)
        child.log_bytes(b"%d" % step, f"pictures/{step}.txt")

    with mlflow_server(tmp_path, place) if stops == "between" else nullcontext():
        parent = start_run(place, config, "parent", {})
        child = start_run(place, config, "child", {}, parent)
        log(parent, child, 1)
        if stops == "between":  # the request arrives, and its answer does not
            original = MlflowClient.log_batch

            def unanswered(*arguments: Any, **options: Any) -> None:
                original(*arguments, **options)
                lost.append(options)
                raise requests.exceptions.ConnectionError

            with monkeypatch.context() as patch:
                patch.setattr(MlflowClient, "log_batch", unanswered)
                log(parent, child, 2)
    log(parent, child, 3)
    assert caplog.text.count("does not answer; what it misses is sent once it answers") == 1
    with mlflow_server(tmp_path, place):
        log(parent, child, 4)
        child.finish()
        parent.finish()
        client = MlflowClient(place)
        runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name(stops).experiment_id])}
        assert len(runs) == 2 and {run.info.status for run in runs.values()} == {"FINISHED"}
        assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id == parent.run_id
        assert runs["parent"].data.tags["step"] == "4"
        steps = [1, *([2] if lost else []), 3, 4]
        assert [point.step for point in client.get_metric_history(child.run_id, "loss")] == steps
        names = [file.path for file in client.list_artifacts(child.run_id, "pictures")]
        assert names == [f"pictures/{step}.txt" for step in steps]


def test_a_history_that_no_run_of_the_artifact_has_is_logged_once(uri: str, client: MlflowClient) -> None:
    rows, tags = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)], {"enat.key": "k"}
    made, reused, again = (start_run(uri, TrackingConfig(), name, tags) for name in ("made", "reused", "again"))
    made.log_metrics({"loss": 1.0}, 1)
    reused.log_missing_history(rows, "k")
    again.log_missing_history(rows, "k")

    def steps(run: RunHandle) -> list[int]:
        return [point.step for point in client.get_metric_history(run.run_id, "loss")]

    assert (steps(made), steps(reused), steps(again)) == ([1], [1, 2, 3], [])
    made.log_missing_history(rows, "k")
    assert steps(made) == [1], "another run has all"


def test_a_server_lost_during_a_run_causes_one_warning(
    make_session: Callable[..., Session],
    local_store: ArtifactStore,
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
    assert sum(record.name == "pipelines.tracking.run" for record in caplog.records) == 1


def test_disabled_tracking_writes_nothing(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_runs_that_start_at_once_share_a_new_experiment(server: str) -> None:
    config = TrackingConfig(experiment="new")
    with ThreadPoolExecutor(6) as threads:
        handles = list(threads.map(lambda _: tracking.start_run(server, config, "run", {}), range(6)))
    client = MlflowClient(server)
    found = client.search_runs([client.get_experiment_by_name("new").experiment_id])
    assert {handle.run_id for handle in handles} == {run.info.run_id for run in found} and len(found) == 6


_START = """
import sys, time
from pathlib import Path
import mlflow
from pipelines.tracking import run as tracking
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{name}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
handle = tracking.start_run(f"sqlite:///{folder / 'new' / 'mlflow.db'}", tracking.TrackingConfig(experiment="new"), name, {})
handle.log_metrics({"loss": 1.0})
handle.finish()
print(handle.run_id, handle._outbox.is_refused)
"""


@pytest.mark.faults
def test_processes_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _START, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    while not all((tmp_path / f"ready-{number}").exists() for number in range(4)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    client = MlflowClient(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("new").experiment_id])
    assert {run.info.run_id for run in runs} == {run_id for run_id, _ in answers} and len(runs) == 4
    assert {given_up for _, given_up in answers} == {"False"} and all(run.data.metrics == {"loss": 1.0} for run in runs)


# Registered models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@dataclass
class Registry:
    """A tracking store with a model registry, and models whose names no other test uses."""

    uri: str
    client: MlflowClient
    name: str

    def start_run(self) -> RunHandle:
        return tracking.start_run(self.uri, CONFIG, "trained", {})

    def register(self, digest: str, created: str = "2026-01-01T00:00:00+00:00", **replaced: Any) -> str | None:
        fields = {
            "name": self.name,
            "files": {"README.md": b"# a model", "manifest.json": b"{}"},
            "tags": {
                tracking_registry.DIGEST_TAG: digest,
                tracking_registry.CREATED_TAG: created,
                "enat.store": "s3://bucket/store",
            },
            "description": "# a model",
            "alias": "newest",
        }
        return self.start_run().register_model(**{**fields, **replaced})

    def versions(self) -> dict[str, str]:
        """Number -> digest."""
        found = self.client.search_model_versions(f"name='{self.name}'")
        return {str(version.version): version.tags[tracking_registry.DIGEST_TAG] for version in found}

    def at(self, alias: str = "newest") -> str:
        return self.versions()[str(self.client.get_model_version_by_alias(self.name, alias).version)]


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def registry(request: pytest.FixtureRequest) -> Registry:
    uri = request.getfixturevalue("uri" if request.param == "sqlite" else "server")
    return Registry(uri, MlflowClient(uri), f"enat-s-{request.node.originalname}")


def test_a_registered_version_is_found_by_its_alias_and_registered_once(registry: Registry, tmp_path: Path) -> None:
    assert registry.register("a" * 64) == "1"
    version = registry.client.get_model_version_by_alias(registry.name, "newest")
    assert version.tags["enat.digest"] == "a" * 64 and version.tags["enat.store"] == "s3://bucket/store"
    assert version.description == "# a model" and version.status == "READY"
    assert version.source == f"runs:/{version.run_id}/model"
    folder = Path(download_artifacts(version.source, tracking_uri=registry.uri, dst_path=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"README.md": b"# a model", "manifest.json": b"{}"}
    assert [registry.register(digest) for digest in ("b", "a" * 64, "b", "a" * 64)] == ["2", "1", "2", "1"]
    assert registry.versions() == {"1": "a" * 64, "2": "b"}


def test_the_alias_points_to_the_version_created_last_and_other_aliases_do_not_move(registry: Registry) -> None:
    registry.register("b", created="2026-02-02T00:00:00+00:00", alias=None)
    assert registry.client.get_registered_model(registry.name).aliases == {}
    registry.client.set_registered_model_alias(registry.name, "chosen", "1")
    registry.register("a", created="2026-01-01T00:00:00+00:00")
    assert registry.at() == "b"
    registry.register("c", created="2026-03-03T00:00:00+00:00")
    registry.register("b", created="2026-02-02T00:00:00+00:00")
    assert registry.at() == "c" and registry.at("chosen") == "b"


def test_the_alias_moves_to_a_newer_version_registered_meanwhile(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    move, others = MlflowClient.set_registered_model_alias, iter(["b"])

    def interrupted(*arguments: Any) -> None:
        for digest in others:
            registry.register(digest, created="2026-02-02T00:00:00+00:00")
        move(*arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", interrupted)
    registry.register("a")
    assert registry.at() == "b"


def test_foreign_versions_are_not_changed(registry: Registry) -> None:
    registry.client.create_registered_model(registry.name)
    registry.client.create_model_version(registry.name, "s3://bucket/theirs")
    assert registry.register("a") == "2"
    assert str(registry.client.get_model_version_by_alias(registry.name, "newest").version) == "2"


@pytest.mark.slow
def test_runs_that_register_at_once_leave_one_version_of_each_content(registry: Registry) -> None:
    digests = [f"digest-{number % 4}" for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        numbers = list(threads.map(lambda digest: registry.register(digest, created=f"2026-01-0{digest[-1]}"), digests))
    versions = registry.versions()
    assert sorted(versions.values()) == sorted(set(digests))
    assert [versions[str(number)] for number in numbers] == digests
    assert registry.at() == "digest-3"


def test_texts_longer_than_the_registry_s_limits_are_truncated(registry: Registry) -> None:
    tags = {tracking_registry.DIGEST_TAG: "a", tracking_registry.CREATED_TAG: "2026", "enat.store": "x" * 9000}
    registry.register("a", description="d" * 9000, tags=tags)
    version = registry.client.get_model_version(registry.name, "1")
    assert len(version.description) == 5000 and version.description.endswith("(the rest is in the file README.md of this version)")
    assert len(version.tags["enat.store"]) == 5000


@given(st.text())
def test_any_text_becomes_a_name_that_mlflow_accepts(text: str) -> None:
    name = tracking_registry.model_name(text)
    _validate_model_name(name)
    assert "'" not in name and len(name) <= 256
    assert tracking_registry.model_name(name) == name


def test_a_model_of_any_dataset_is_registered(registry: Registry) -> None:
    for dataset in ("a/b: c", "../up", 'it\'s "so"', "Ünï κόδε 图", "x" * 400, "50%?#&"):
        name = f"{registry.name}-{dataset}"
        assert [registry.register("a", name=name) for _ in "ab"] == ["1", "1"], dataset
        assert registry.client.get_model_version_by_alias(tracking_registry.model_name(name), "newest").tags["enat.digest"] == "a"


def test_aliases_are_checked_as_mlflow_does(client: MlflowClient) -> None:
    client.create_registered_model("aliased")
    client.create_model_version("aliased", "s3://bucket/model")
    for alias in ("newest", "v1a", "1", "ä_b-c", "x" * 255):
        assert TrackingConfig(model_alias=alias).model_alias == alias
        client.set_registered_model_alias("aliased", alias, "1")
    for alias in ("latest", "Latest", "v1", "V12", "", "a b", "a.b", "a/b", "x" * 256):
        with pytest.raises(ValueError, match=r"model_alias is "):
            TrackingConfig(model_alias=alias)
        with pytest.raises(MlflowException):
            client.set_registered_model_alias("aliased", alias, "1")


def test_a_server_that_refuses_models_costs_one_warning_and_no_metrics(
    client: MlflowClient, handle: RunHandle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise MlflowException("this user may not", error_code=7)  # PERMISSION_DENIED

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    with caplog.at_level(logging.WARNING, "pipelines"):
        tags = {tracking_registry.DIGEST_TAG: "a", tracking_registry.CREATED_TAG: "2026"}
        assert handle.register_model("enat-refused", {}, tags, "", "newest") is None
    assert [record.getMessage() for record in caplog.records] == ["enat-refused is not registered as a model (this user may not)"]
    handle.log_metrics({"loss": 1.0})
    assert client.get_run(handle.run_id).data.metrics == {"loss": 1.0}


# Secrets -------------------------------------------------------------------------------------------------------------------


def test_credentials_are_not_recorded(client: MlflowClient, recorded, handle: RunHandle, tiny_config: Path) -> None:
    for run in _stage_runs(client, reused=False).values():
        assert "secret" not in str(run.data.params) + str(run.data.tags) and run.data.params["source"] == "http://host/images"
    config = load_run(tiny_config, ("tracking.uri=http://writer:secret@host", "store=ftp://writer:secret@host/store"))
    handle.log_params(configuration.redacted(config))
    params = client.get_run(handle.run_id).data.params
    assert params["tracking.uri"] == "http://host" and params["store"] == "ftp://host/store"
    assert "secret" not in str(params)


# Where ---------------------------------------------------------------------------------------------------------------------


def test_the_uri_is_that_of_the_config_or_of_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.resolve_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking.resolve_uri(TrackingConfig(), tmp_path) == "http://environment"
    assert tracking.resolve_uri(TrackingConfig(uri="http://config"), tmp_path) == "http://config"
    monkeypatch.setattr(tracking, "entry_points", lambda group: [EntryPoint("arn", "plugin:Store", group)])
    assert tracking.resolve_uri(TrackingConfig(uri="arn:aws:server"), tmp_path) == "arn:aws:server"
    with pytest.raises(ValueError, match="the tracking URI is arm:aws"):
        tracking.resolve_uri(TrackingConfig(uri="arm:aws:server"), tmp_path)


def test_files_of_a_local_store_are_beside_it_in_any_working_directory(
    recorded, uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert list(folder.glob("mlflow-artifacts/*/artifacts/samples/step-00000003.png"))
    assert list(tmp_path.iterdir()) == []


def test_a_uri_that_is_neither_a_server_nor_a_database_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for uri in ("runs/mlflow.db", "htp://writer:secret@host:5000", "host:5000", "file:///runs"):
        with pytest.raises(ValueError, match=r"^the tracking URI is .*http://HOST:5000, sqlite:///FILE") as caught:
            tracking.resolve_uri(TrackingConfig(uri=uri), tmp_path)
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_URI is"):
            tracking.resolve_uri(CONFIG, tmp_path)
        assert tracking.resolve_uri(TrackingConfig(uri=uri, enabled=False), tmp_path) == uri, "nothing is tracked there"
