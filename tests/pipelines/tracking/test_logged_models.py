"""Checkpoints as MLflow lists them beside runs: outputs of a training, inputs of what reads them, with scores on a dataset."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.tracking import models
from pipelines.tracking.models import Checkpoint, TrackedModel
from pipelines.tracking.registry import CREATED_TAG, DIGEST_TAG
from pipelines.tracking.run import RunHandle, TrackedInput, TrackingConfig, start_run
from services.mlflow_database import mlflow_database
from services.mlflow_server import mlflow_server

CONFIG = TrackingConfig(experiment="models")
FIRST, LAST = (Checkpoint(artifact="train/abc", step=step) for step in (40, 80))
REFERENCE = TrackedInput(name="digits reference", digest="d" * 64, source="/store/reference/1", context="reference")
VARIANT = "enat.variant"


def _models() -> list[TrackedModel]:
    named = ((FIRST, 'enat-1.5M: "a"/b%', {"scores/fid": 7.0}), (LAST, "enat-1.5M", {}))
    return [
        TrackedModel(checkpoint=each, name=name, params={"parameters": 10}, tags={VARIANT: "main"}, scores=scores)
        for each, name, scores in named
    ]


@pytest.fixture(scope="module", params=["database", pytest.param("server", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    if request.param == "database":
        yield mlflow_database(folder)
        return
    with mlflow_server(folder) as url:
        yield url


def _run(uri: str, name: str) -> RunHandle:
    return start_run(uri, CONFIG, name, {})


def _listed(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(CONFIG.experiment)
    return {model.tags[models.STEP_TAG]: model for model in client.search_logged_models([experiment.experiment_id])}


@pytest.fixture(scope="module")
def training(uri: str) -> RunHandle:
    run = _run(uri, "train")
    run.log_inputs([REFERENCE])
    run.log_models(_models(), REFERENCE)
    run.finish()
    return run


def test_checkpoints_are_outputs_of_their_training_and_listed_once(uri: str, training: RunHandle) -> None:
    client, listed = MlflowClient(uri), _listed(uri)
    assert {step: model.name for step, model in listed.items()} == {"40": "enat-1_5M_ _a__b_", "80": "enat-1_5M"}
    assert all(model.source_run_id == training.run_id and model.status == "READY" for model in listed.values())
    assert listed["40"].params == {"parameters": "10"} and listed["40"].tags[models.ARTIFACT_TAG] == "train/abc"
    outputs = client.get_run(training.run_id).outputs.model_outputs
    assert {(each.model_id, each.step) for each in outputs} == {(listed["40"].model_id, 40), (listed["80"].model_id, 80)}
    (score,) = listed["40"].metrics
    assert (score.key, score.value, score.step) == ("scores/fid", 7.0, 40)
    assert (score.dataset_name, score.dataset_digest) == ("digits reference", "d" * 12)
    again = _run(uri, "train again")
    again.log_models(_models(), REFERENCE)
    again.finish()
    assert len(_listed(uri)) == len(client.search_logged_models([listed["40"].experiment_id])) == 2


def test_what_reads_a_checkpoint_names_it_and_gives_it_its_scores(uri: str, training: RunHandle) -> None:
    for variant in ("main", "steps4"):
        run = _run(uri, f"evaluate {variant}")
        run.log_inputs([REFERENCE])
        run.log_model_input(LAST)
        run.log_model_scores(LAST, {"fid": 3.5, "kid": float("nan")}, REFERENCE, variant, VARIANT)
        run.log_model_scores(Checkpoint(artifact="train/none", step=1), {"fid": 1.0}, REFERENCE, variant, VARIANT)
        run.finish()
        model = _listed(uri)["80"]
        assert [each.model_id for each in MlflowClient(uri).get_run(run.run_id).inputs.model_inputs] == [model.model_id]
    found = {(each.key, each.value, each.step, each.dataset_name) for each in model.metrics}
    assert found == {("fid", 3.5, 80, "digits reference"), ("steps4/fid", 3.5, 80, "digits reference")}


def test_a_listed_checkpoint_names_its_registered_version(uri: str, training: RunHandle) -> None:
    tags = {DIGEST_TAG: "x", CREATED_TAG: "2026-01-01T00:00:00+00:00"}
    run = _run(uri, "registers")
    for _ in range(2):
        assert run.register_model("enat-1.5M", {"README.md": b"a card"}, tags, "", None, checkpoint=LAST) == "1"
    run.finish()
    listed = _listed(uri)
    assert listed["80"].tags["mlflow.modelVersions"] == '[{"name": "enat-1.5M", "version": "1"}]'
    assert "mlflow.modelVersions" not in listed["40"].tags


class _OldServer(http.server.BaseHTTPRequestHandler):
    """Forwards requests to a server, except those about models, which it refuses. By default it answers as an older server does."""

    behind, status, content = "", 404, b"<html>not found</html>"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        if "logged-models" in self.path or "/outputs" in self.path:
            self._reply(self.status, self.content)
            return
        request = urllib.request.Request(self.behind + self.path, body, {"Content-Type": "application/json"}, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                self._reply(200, answer.read())
        except urllib.error.HTTPError as error:
            self._reply(error.code, error.read())

    do_POST = do_PATCH = do_GET  # noqa: N815

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(("status", "level"), [(404, "DEBUG"), (400, "WARNING")])
def test_a_server_that_takes_no_models_gets_all_else(
    uri: str, status: int, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older server causes a debug line. A server that has models and refuses one causes a warning."""
    if not uri.startswith("http"):
        pytest.skip("databases are of this version")
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "this name is not allowed"}).encode()
    for name, value in {"behind": uri, "status": status, **({"content": refusal} if status == 400 else {})}.items():
        monkeypatch.setattr(_OldServer, name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _OldServer) as server, caplog.at_level(logging.DEBUG, "pipelines"):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        run = _run(f"http://127.0.0.1:{server.server_port}", "old")
        run.log_models(_models())
        run.log_model_input(LAST)
        run.log_metrics({"loss": 1.0})
        run.finish()
        server.shutdown()
        thread.join()
    found = MlflowClient(uri).get_run(run.run_id)
    assert found.data.metrics == {"loss": 1.0} and found.info.status == "FINISHED"
    assert {record.levelname for record in caplog.records if record.name.startswith("pipelines")} == {level}
    assert "the tracking server does not take it" in caplog.text and ("not allowed" in caplog.text) == (status == 400)


def test_the_load_of_the_machine_is_logged_if_it_is_asked_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    client = MlflowClient(uri)
    for is_asked in (True, False):
        run = start_run(uri, TrackingConfig(experiment="models", system_metrics=is_asked), "load", {})
        logged = threading.Event()
        with run.system_metrics():
            for _ in range(100 if is_asked else 5):
                if any(name.startswith("system/") for name in client.get_run(run.run_id).data.metrics):
                    break
                logged.wait(0.1)
        run.finish()
        names = set(client.get_run(run.run_id).data.metrics)
        expected = {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes", "system/disk_usage_percentage"}
        assert expected <= names if is_asked else names == set()


def test_a_load_that_cannot_be_measured_does_not_stop_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.system_metrics import system_metrics_monitor

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such counters")

    monkeypatch.setattr(system_metrics_monitor, "SystemMetricsMonitor", fail)
    run = RunHandle(f"sqlite:///{tmp_path / 'mlflow.db'}", "x", has_system_metrics=True)
    with run.system_metrics():
        worked = True
    assert worked and "the load of this machine is not logged (no such counters)" in caplog.text
