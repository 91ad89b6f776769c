"""What MLflow and the log record of a run, however it ends, and where a job may track its runs."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.cli import main
from pipelines.cluster.resources import Execution
from pipelines.run import kept_log, runner
from pipelines.run.config import RunConfig
from pipelines.storage.base import AccessError
from pipelines.storage.local import LocalFolder
from pipelines.tracking import run as tracking
from pipelines.tracking.run import TrackingConfig
from pipelines.workflow import node_run, provenance
from pipelines.workflow.provenance import CodeState
from pipelines.workflow.stage import Node, PublishContext, Stage, StageContext, StageError, StageResult
from services.mlflow_database import mlflow_database

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"
STATE = CodeState(version="1.0", commit="a" * 40, diff_digest="b" * 64, digest="c" * 64)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = mlflow_database(tmp_path_factory.mktemp("tracking"))
    tracking.start_run(made, TrackingConfig(), "first", {}).finish()
    return made


@pytest.fixture
def client(uri: str, tmp_path: Path) -> MlflowClient:
    """A client that does not find the runs of earlier tests."""
    client = MlflowClient(uri)
    if (experiment := client.get_experiment_by_name("enat")) is not None:
        client.rename_experiment(experiment.experiment_id, f"before-{tmp_path.name}")
    return client


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Restore what a run changes: logging, and the handlers of signals."""
    loggers = [logging.getLogger(name) for name in (None, "pipelines", "enat")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, before_run, level in before:
        logger.handlers = before_run
        logger.setLevel(level)


def _write(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    return StageResult(files=[context.write("text", lambda path: path.write_text("text"))])


def _run(stage: Stage, uri: str, folder: Path) -> dict[str, Any]:
    """A run of one stage."""
    config = RunConfig(name="whole", workspace=str(folder / "runs"), tracking=TrackingConfig(uri=uri))
    return runner.run(config, "whole.yaml", Console(file=io.StringIO()), build=lambda _: [Node("only", stage, Execution())])


def _found(client: MlflowClient) -> dict[str, Any]:
    experiment = client.get_experiment_by_name("enat")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.mark.slow
def test_a_run_of_packaged_code_records_its_commit_and_changes(
    client: MlflowClient, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "code_version", lambda: STATE.label)
    monkeypatch.setattr(node_run, "code_version", lambda: STATE.label)
    monkeypatch.setattr(provenance, "read_state", lambda *_: STATE)
    monkeypatch.setattr(provenance, "read_changes", lambda: b"--- a/enat/model.py\n")
    _run(Stage("only", 1, _write), uri, tmp_path)
    run = _found(client)["whole"]
    known = {"enat.commit": "a" * 40, "enat.diff_sha256": "b" * 64, "enat.code_sha256": "c" * 64}
    assert known.items() <= run.data.tags.items()
    (changes,) = client.list_artifacts(run.info.run_id)
    assert Path(client.download_artifacts(run.info.run_id, changes.path, str(tmp_path))).read_bytes() == b"--- a/enat/model.py\n"


def test_errors_of_publishing_are_logged(client: MlflowClient, uri: str, tmp_path: Path) -> None:
    def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
        raise RuntimeError("nobody listens")

    _run(Stage("only", 1, _write, publish=publish), uri, tmp_path)
    whole = _found(client)["whole"]
    files = [file.path for file in client.list_artifacts(whole.info.run_id)]
    assert "enat.commit" not in whole.data.tags and files == ["run.log"], "a checkout has no record"
    (log,) = (tmp_path / "runs" / "logs").glob("whole-*.log")
    text = log.read_text()
    assert "only was made, but not published" in text and "Traceback" in text and 'raise RuntimeError("nobody listens")' in text
    assert {run.info.status for run in _found(client).values()} == {"FINISHED"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_ends_is_killed_in_mlflow(
    client: MlflowClient, uri: str, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for what it starts in the background

    def run(config: Any, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        signal.raise_signal(number)  # to this thread: sent to the process, another thread may get it, and this one sees it later
        return _write(config, inputs, context)

    monkeypatch.setattr(main.commands, "main", lambda **_: _run(Stage("only", 1, run), uri, tmp_path))
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130 and capsys.readouterr().err.startswith("enat: interrupted; run the same command to continue")
    assert {name: run.info.status for name, run in _found(client).items()} == {"whole": "KILLED", "only": "KILLED"}


_LEAVES_SLOWLY = """
import atexit, sys
from pipelines.cli import main
def command(**_):
    atexit.register(lambda: (print("leaving", flush=True), sys.stdin.read(), print("left")))
main.commands.main = command
sys.argv = ["enat", "run"]
main.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_the_exit_is_ignored(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _LEAVES_SLOWLY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert any(line == "leaving\n" for line in process.stdout)
    process.send_signal(number)
    rest, _ = process.communicate("", timeout=60)
    assert (process.returncode, rest) == (0, "left\n")


@pytest.mark.faults
def test_sigterm_while_ray_works_ends_the_runs_of_mlflow(end_enat_when: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Ray installs its own handler, which would end the process at once. SIGTERM is sent after a worker has logged a loss."""
    overrides = ("targets=[tokenizer]", "tokenizer.recipe.num_steps=100000", f"workspace={tmp_path}")
    database = tmp_path / "mlflow.db"

    def is_training() -> bool:
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as tables,
        ):
            return tables.execute("select count(*) from metrics where key = 'loss'").fetchone()[0] > 0
        return False  # MLflow is just making them

    code, output = end_enat_when(is_training, "run", DIGITS, *overrides)
    assert code == 130 and "interrupted; run the same command to continue" in output
    found = _found(MlflowClient(f"sqlite:///{database}"))
    assert {name.partition(" · ")[0]: run.info.status for name, run in found.items()} == {
        "digits": "KILLED",
        "dataset": "FINISHED",
        "tokenizer": "KILLED",
    }


# Where a job tracks its runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_the_traceback_of_a_failed_run_is_in_the_store_and_in_mlflow(
    client: MlflowClient, uri: str, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a failure and of bad input, which a job would else leave in its folder only."""

    def fail(*_: Any) -> StageResult:
        raise error("nothing at http://user:hunter2@host/x")

    config = RunConfig(name="whole", workspace=str(tmp_path / "runs"), tracking=TrackingConfig(uri=uri))
    console = Console(file=io.StringIO())
    monkeypatch.setenv(kept_log.IN_JOB, "{}")
    with pytest.raises((StageError, ValueError)):
        runner.run(config, "whole.yaml", console, build=lambda _: [Node("only", Stage("only", 1, fail), Execution())])
    (kept,) = (tmp_path / "runs" / "store" / ".logs").iterdir()
    run_id = _found(client)["whole"].info.run_id
    shown = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown == [f"log {kept}", f"tracking {uri} (run {run_id})"]
    copy = Path(client.download_artifacts(run_id, "run.log", str(tmp_path))).read_text()
    assert copy == kept.read_text() and "Traceback" in copy and "in fail" in copy and "http://host/x" in copy
    assert "hunter2" not in copy
    assert {stage for stage, _ in open_store(config.store_uri).names()} == {"only"}, "a log is not an artifact"


def test_a_log_that_cannot_be_copied_costs_a_warning(
    client: MlflowClient, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: LocalFolder, name: str, *rest: Any) -> bool:
        if name.startswith(".logs/"):
            raise AccessError("the bucket refuses")
        return put(self, name, *rest)

    def publish(*_: Any) -> None:
        raise RuntimeError("nobody listens")

    put = LocalFolder.put_if_absent
    monkeypatch.setattr(LocalFolder, "put_if_absent", refuse)
    answer = _run(Stage("only", 1, _write, publish=publish), uri, tmp_path)
    assert answer["log"] is None and "log of this run was not copied to the store (the bucket refuses)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workspace", "tracked", "environment", "lost"),
    [
        ("runs", {}, None, "runs"),
        ("runs", {"uri": "sqlite:///here/mlflow.db"}, None, "here/mlflow.db"),
        ("runs", {"enabled": False}, None, None),
        ("runs", {"uri": "http://mlflow:5000"}, None, None),
        ("runs", {}, "http://mlflow:5000", None),
        ("runs", {}, "sqlite:////shared/mlflow.db", None),
        ("/shared/runs", {}, None, None),
    ],
)
def test_a_job_does_not_track_runs_in_its_own_folder(
    workspace: str, tracked: dict[str, Any], environment: str | None, lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a job is removed with it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if environment is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    config = RunConfig(name="it", workspace=workspace, tracking=TrackingConfig(**tracked))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert runner.tracking_uri(config) == tracking.resolve_uri(config.tracking, Path(workspace)), (
        "outside of jobs any folder is allowed"
    )
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    if lost is None:
        runner.tracking_uri(config)
        return
    with pytest.raises(ValueError, match=f"would be tracked under {lost}, in a folder that is removed with the job; give tracking"):
        runner.tracking_uri(config)


def test_no_control_character_and_no_password_reaches_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = "a\x1b[31m.jpg \x9b of http://user:hunter2@host/x\r\nnext"

    def run(**_: Any) -> None:
        runner.log_to(tmp_path / "logs" / "run.log")
        for package in ("pipelines.stages", "enat.files.weights"):
            logging.getLogger(package).warning("%s", foreign)
        raise ValueError(foreign)

    monkeypatch.setattr(main.commands, "main", run)
    with pytest.raises(SystemExit) as ended:
        main.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines == ["enat: a [31m.jpg of http://host/x next"] * 3
