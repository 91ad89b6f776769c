"""Tracking observes: everything of a run stands in MLflow, and nothing of MLflow can stop a run."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
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
from pipelines.tracking import registry as tracking_registry
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle, TrackingConfig
from pipelines.workflow import config as configuration
from pipelines.workflow import driver, stage
from pipelines.workflow.stage import Node, Session, Stage, StageContext, StageResult

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


def _run(make_session: Callable[..., Session], store: ArtifactStore, uri: str, nodes: list[Node] = NODES) -> tuple[Session, Any]:
    parent = tracking.start_run(uri, CONFIG, "whole", {"enat.store": "here"})
    session = make_session(store, run=parent, tracking=CONFIG)
    done = driver.execute(nodes, session)
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


def test_what_an_earlier_run_measured_is_taken_over_in_batches_that_mlflow_takes(handle: RunHandle, client: MlflowClient) -> None:
    """More than the 1,000 values that it takes at once; values that are not finite are left out."""
    rows = [{"step": step, "loss": 1 / step, "group@norm": math.inf if step == 2 else 1.0} for step in range(1, 601)]
    handle.log_history(rows)
    assert handle.run_id is not None and not handle._given_up
    loss, norm = (client.get_metric_history(handle.run_id, name) for name in ("loss", "group_norm"))
    assert [(point.step, point.value) for point in loss] == [(step, 1 / step) for step in range(1, 601)]
    assert len(norm) == 599 and "step" not in client.get_run(handle.run_id).data.metrics


def test_a_reused_stage_has_the_metrics_of_when_it_was_made(client: MlflowClient, recorded) -> None:
    run = _stage_runs(client, reused=True)["curve"]
    assert run.data.metrics["final"] == 0.25 and "loss" not in run.data.metrics


def test_a_failed_stage_s_run_says_so(
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
    make_session: Callable[..., Session], local_store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipelines"):
        _, done = _run(make_session, local_store, CLOSED)
    assert [item.is_reused for item in done] == [False, False]
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    advice = "start the server, or name another by --tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"
    assert warnings == [f"tracking at {CLOSED} does not answer; this run goes on without it ({advice})"]


def test_a_server_that_goes_away_during_a_run_is_warned_of_once(
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


def test_runs_that_start_at_once_share_a_new_experiment(server: str) -> None:
    config = TrackingConfig(experiment="new")
    with ThreadPoolExecutor(6) as threads:
        handles = list(threads.map(lambda _: tracking.start_run(server, config, "run", {}), range(6)))
    client = MlflowClient(server)
    found = client.search_runs([client.get_experiment_by_name("new").experiment_id])
    assert {handle.run_id for handle in handles} == {run.info.run_id for run in found} and len(found) == 6


# Registered models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server over HTTP that serves artifacts itself: it sees nothing of this side's folders."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its workers
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


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


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest) -> Registry:
    uri = request.getfixturevalue("uri" if request.param == "sqlite" else "server")
    return Registry(uri, MlflowClient(uri), f"enat-s-{request.node.originalname}")


def test_a_registered_version_is_found_by_its_alias_with_its_tags_and_files(registry: Registry, tmp_path: Path) -> None:
    assert registry.register("a" * 64) == "1"
    version = registry.client.get_model_version_by_alias(registry.name, "newest")
    assert version.tags["enat.digest"] == "a" * 64 and version.tags["enat.store"] == "s3://bucket/store"
    assert version.description == "# a model" and version.status == "READY"
    assert version.source == f"runs:/{version.run_id}/model"
    folder = Path(download_artifacts(version.source, tracking_uri=registry.uri, dst_path=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"README.md": b"# a model", "manifest.json": b"{}"}


def test_the_same_content_is_one_version_however_often_it_is_registered(registry: Registry) -> None:
    assert [registry.register(digest) for digest in ("a", "b", "a", "b", "a")] == ["1", "2", "1", "2", "1"]
    assert registry.versions() == {"1": "a", "2": "b"}


def test_the_alias_stands_at_what_was_created_last_in_whatever_order_it_was_registered(registry: Registry) -> None:
    registry.register("b", created="2026-02-02T00:00:00+00:00")
    registry.register("a", created="2026-01-01T00:00:00+00:00")
    assert registry.at() == "b"
    registry.register("c", created="2026-03-03T00:00:00+00:00")
    registry.register("b", created="2026-02-02T00:00:00+00:00")
    assert registry.at() == "c"


def test_the_alias_goes_on_to_a_newer_version_that_another_run_registers_meanwhile(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, others = MlflowClient.set_registered_model_alias, iter(["b"])

    def interrupted(*arguments: Any) -> None:
        for digest in others:
            registry.register(digest, created="2026-02-02T00:00:00+00:00")
        move(*arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", interrupted)
    registry.register("a")
    assert registry.at() == "b"


def test_an_alias_that_is_not_there_is_set_and_others_stay_where_they_are(registry: Registry) -> None:
    registry.register("a", alias=None)
    assert registry.client.get_registered_model(registry.name).aliases == {}
    registry.client.set_registered_model_alias(registry.name, "chosen", "1")
    registry.register("b", created="2026-02-02T00:00:00+00:00")
    registry.register("a")
    assert registry.at() == "b" and registry.at("chosen") == "a"


def test_a_version_that_someone_else_made_is_left_alone(registry: Registry) -> None:
    registry.client.create_registered_model(registry.name)
    registry.client.create_model_version(registry.name, "s3://bucket/theirs")
    assert registry.register("a") == "2"
    assert str(registry.client.get_model_version_by_alias(registry.name, "newest").version) == "2"


def test_runs_that_register_at_once_leave_one_version_of_each_content(registry: Registry) -> None:
    digests = [f"digest-{number % 4}" for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        numbers = list(threads.map(lambda digest: registry.register(digest, created=f"2026-01-0{digest[-1]}"), digests))
    versions = registry.versions()
    assert sorted(versions.values()) == sorted(set(digests))
    assert [versions[str(number)] for number in numbers] == digests
    assert registry.at() == "digest-3"


def test_what_a_registry_has_no_room_for_is_cut(registry: Registry) -> None:
    tags = {tracking_registry.DIGEST_TAG: "a", tracking_registry.CREATED_TAG: "2026", "enat.store": "x" * 9000}
    registry.register("a", description="d" * 9000, tags=tags)
    version = registry.client.get_model_version(registry.name, "1")
    assert len(version.description) == 5000 and version.description.endswith("(the rest is in the file README.md of this version)")
    assert len(version.tags["enat.store"]) == 5000


@given(st.text())
def test_any_name_is_made_one_that_mlflow_takes(text: str) -> None:
    name = tracking_registry.model_name(text)
    _validate_model_name(name)
    assert "'" not in name and len(name) <= 256
    assert tracking_registry.model_name(name) == name


@pytest.mark.parametrize("dataset", ["a/b: c", "../up", 'it\'s "so"', "Ünï κόδε 图", "x" * 400, "50%?#&"])
def test_a_model_of_any_dataset_is_registered(registry: Registry, dataset: str) -> None:
    name = f"{registry.name}-{dataset}"
    assert registry.register("a", name=name) == "1"
    assert registry.register("a", name=name) == "1"
    assert registry.client.get_model_version_by_alias(tracking_registry.model_name(name), "newest").tags["enat.digest"] == "a"


@pytest.mark.parametrize("alias", ["newest", "v1a", "1", "ä_b-c", "x" * 255])
def test_aliases_that_mlflow_takes_are_taken(client: MlflowClient, alias: str) -> None:
    assert TrackingConfig(model_alias=alias).model_alias == alias
    client.create_registered_model(f"alias-{alias[:20]}")
    client.create_model_version(f"alias-{alias[:20]}", "s3://bucket/model")
    client.set_registered_model_alias(f"alias-{alias[:20]}", alias, "1")


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V12", "", "a b", "a.b", "a/b", "x" * 256])
def test_an_alias_that_mlflow_refuses_is_refused_before_anything_runs(client: MlflowClient, alias: str) -> None:
    with pytest.raises(ValueError, match=r"tracking\.model_alias is "):
        TrackingConfig(model_alias=alias)
    with pytest.raises(MlflowException):
        client.set_registered_model_alias("any", alias, "1")


def test_a_server_that_takes_runs_but_no_models_is_told_of_once_and_goes_on_tracking(
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


def test_without_a_server_no_model_is_registered_and_one_warning_shown(caplog: pytest.LogCaptureFixture) -> None:
    handle = RunHandle(CLOSED, "0" * 32)
    with caplog.at_level(logging.WARNING, "pipelines"):
        for _ in range(2):
            assert handle.register_model("enat", {}, {tracking_registry.DIGEST_TAG: "a"}, "", "newest") is None
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    assert len(warnings) == 1 and warnings[0].startswith(f"tracking at {CLOSED} does not answer")


# Secrets -------------------------------------------------------------------------------------------------------------------


def test_nothing_that_is_recorded_holds_credentials(client: MlflowClient, recorded) -> None:
    for run in _stage_runs(client, reused=False).values():
        everything = str(run.data.params) + str(run.data.tags)
        assert "secret" not in everything and run.data.params["source"] == "http://host/images"


def test_the_run_s_own_config_is_recorded_without_credentials(client: MlflowClient, handle: RunHandle, tiny_config: Path) -> None:
    from pipelines.run import config as run_config

    run = run_config.load_run(tiny_config, ("tracking.uri=http://writer:secret@host", "store=ftp://writer:secret@host/store"))
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


@pytest.mark.parametrize("uri", ["runs/mlflow.db", "htp://writer:secret@host:5000", "host:5000", "file:///runs"])
def test_a_uri_that_is_none_of_a_server_or_database_is_refused_before_anything_runs(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^the tracking URI is .*; write http://HOST:5000, sqlite:///FILE") as caught:
        tracking.resolve_uri(TrackingConfig(uri=uri), tmp_path)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_URI is"):
        tracking.resolve_uri(CONFIG, tmp_path)
    assert tracking.resolve_uri(TrackingConfig(uri=uri, enabled=False), tmp_path) == uri, "nothing is tracked there"


def test_a_uri_of_a_plugin_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "entry_points", lambda group: [EntryPoint("arn", "plugin:Store", group)])
    assert tracking.resolve_uri(TrackingConfig(uri="arn:aws:server"), tmp_path) == "arn:aws:server"
    with pytest.raises(ValueError, match="the tracking URI is arm:aws"):
        tracking.resolve_uri(TrackingConfig(uri="arm:aws:server"), tmp_path)
