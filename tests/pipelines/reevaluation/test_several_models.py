"""Re-evaluation of several models and by several processes: failures, interruptions, order, leases."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from model_lab import LONG_AGO, NAME, Lab, Light, register_again
from rich.console import Console

from pipelines.reevaluation import reevaluate, report
from pipelines.reevaluation.reevaluate import LEASE, Outcome, exit_code
from pipelines.registry.evaluation_record import EvaluationRecord
from pipelines.run import runner

pytestmark = pytest.mark.slow

# Several models, several processes -----------------------------------------------------------------------------------------


def test_a_model_that_fails_does_not_stop_the_others(lab: Lab) -> None:
    register_again(lab, "enat-a-lost", **{"enat.artifact": "train/" + "9" * 64})
    lost, found = lab.run(with_config=False)
    assert lost.verdict == "failed" and f"train/{'9' * 12} is not in {lab.root / 'store'} or " in lost.note
    assert found.verdict == "fresh" and exit_code([lost, found]) == 1
    console = Console(file=io.StringIO(), width=200)
    report.show([lost, found], console)
    shown = console.file.getvalue()
    assert "failed: enat-a-lost version 1: train/" in shown and f"fresh: {NAME} version 1: evaluated" in shown


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """Of a run, as commands write it."""
    loggers = [logging.getLogger(), logging.getLogger("pipelines")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    runner.log_to(tmp_path / "logs" / "run.log")
    yield tmp_path / "logs" / "run.log"
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


def _terminal_status(lab: Lab) -> dict[str, str]:
    """Status of the newest run of each name."""
    return {run.info.run_name: run.info.status for run in lab.search(order_by=["attributes.start_time ASC"])}


def test_a_failing_evaluation_does_not_stop_the_next(
    lab: Lab, light: Light, log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {key: value for key, value in lab.tags().items() if key.startswith(("enat.eval", "enat.protocol", "enat.score"))}
    register_again(lab, "enat-a-first", **{**own, "enat.evaluated": LONG_AGO})
    light.error = RuntimeError("no luck")
    failed, evaluated = lab.run(with_config=False, older_than=0.0)
    assert (failed.version.name, failed.verdict, evaluated.verdict) == ("enat-a-first", "failed", "evaluated")
    assert "stage generate failed: RuntimeError: no luck" in failed.note and light.num_runs == 2
    assert EvaluationRecord.of(lab.tags("enat-a-first")).evaluated.isoformat() == LONG_AGO and LEASE not in lab.tags("enat-a-first")
    status = _terminal_status(lab)
    assert (status["reevaluate"], status["enat-a-first-v1"], status[f"{NAME}-v1"]) == ("FAILED", "FAILED", "FINISHED")
    logged = log_file.read_text()
    assert "enat-a-first version 1 failed\nTraceback" in logged and "raise error\nRuntimeError: no luck" in logged
    assert capsys.readouterr().err == "", "the terminal shows the outcome only"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(15)])
def test_interrupted_runs_are_killed_in_mlflow(lab: Lab, light: Light, interruption: BaseException) -> None:
    light.error = interruption
    with pytest.raises(type(interruption)):
        lab.one(with_config=False, older_than=0.0)
    status = _terminal_status(lab)
    assert {status[name] for name in ("reevaluate", f"{NAME}-v1", "generate")} == {"KILLED"}
    assert LEASE not in lab.tags()


def test_models_are_selected_by_name_and_alias(lab: Lab) -> None:
    for name in ("nat-s-photographs", "other-model"):
        register_again(lab, name)
    client = lab.client
    client.create_registered_model("enat-by-hand")
    client.create_model_version("enat-by-hand", "runs:/0/model", await_creation_for=0)
    client.set_registered_model_alias("enat-by-hand", "newest", "1")
    client.set_registered_model_alias(NAME, "best", "1")
    names = lambda **options: [outcome.version.name for outcome in lab.run(is_dry_run=True, **options)]  # noqa: E731
    assert names() == [NAME, "nat-s-photographs"]
    assert names(match=("*-photographs",)) == [NAME, "nat-s-photographs"] and names(match=("other*",)) == ["other-model"]
    assert names(alias="best") == [NAME]
    with pytest.raises(ValueError, match=r"no registered model that matches .* has the alias worst"):
        names(alias="worst")
    with pytest.raises(ValueError, match=r"no registered model that matches enat-x\* has the alias newest"):
        names(match=("enat-x*",))


def test_models_without_an_evaluation_come_first_then_the_oldest(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own = lab.tags()
    for name, moment in (("enat-b", "2026-03-01T00:00:00+00:00"), ("enat-a", "2026-05-01T00:00:00+00:00")):
        recorded = {key: value for key, value in own.items() if key.startswith("enat.eval")}
        register_again(lab, name, **{**recorded, "enat.evaluated": moment})
    register_again(lab, "nat-new")
    seen: list[str] = []
    verdicts = {"nat-new": "failed", "enat-b": "drift", "enat-a": "evaluated", NAME: "evaluated"}

    def evaluate(self: Any, case: Any) -> Outcome:
        seen.append(case.model.version.name)
        return Outcome(version=case.model.version, verdict=verdicts[case.model.version.name])

    monkeypatch.setattr(reevaluate._Evaluator, "evaluate", evaluate)
    outcomes = lab.run(older_than=0.0, limit=2)
    assert seen == ["nat-new", "enat-b", "enat-a"], "a failure does not count for the limit"
    assert {outcome.version.name: outcome.verdict for outcome in outcomes}[NAME] == "due"
    verdicts |= {"nat-new": "busy", "enat-b": "fresh"}
    seen.clear()
    lab.run(older_than=0.0, limit=1)
    assert seen == ["nat-new", "enat-b", "enat-a"]


def _lease(pid: int, hours: float = 1, host: str | None = None) -> str:
    until = datetime.now(UTC) + timedelta(hours=hours)
    return f"{host or socket.gethostname()} {pid} {until.isoformat(timespec='seconds')}"


def test_a_model_that_another_process_evaluates_is_busy(lab: Lab, light: Light) -> None:
    lab.tag(lease=_lease(1, host="elsewhere"))
    outcome = lab.one(older_than=0.0)
    assert (outcome.verdict, outcome.note) == ("busy", "process 1 on elsewhere evaluates it") and exit_code([outcome]) == 0
    lab.tag(lease=_lease(1, hours=-1, host="elsewhere"))
    assert lab.one(older_than=0.0).verdict == "evaluated" and LEASE not in lab.tags()


def test_a_lease_ends_with_its_process_or_its_time() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert reevaluate._holder_of(_lease(ended.pid)) is None
    assert reevaluate._holder_of(_lease(os.getpid())) == f"process {os.getpid()} on {socket.gethostname()}"
    for nobody in (None, "", "someone", "a b c", _lease(os.getpid(), hours=-1)):
        assert reevaluate._holder_of(nobody) is None


@pytest.mark.faults
def test_a_model_that_another_process_has_evaluated_is_fresh(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.tag(evaluated=LONG_AGO)
    examine = reevaluate._examine

    def and_then_another_evaluates(*arguments: Any) -> Any:
        case = examine(*arguments)
        lab.tag(evaluated=datetime.now(UTC).isoformat(timespec="seconds"))
        return case

    monkeypatch.setattr(reevaluate, "_examine", and_then_another_evaluates)
    for options in ({"older_than": 86400.0}, {"older_than": 86400.0, "is_fresh": True}):
        lab.tag(evaluated=LONG_AGO)
        outcome = lab.one(**options)
        assert (outcome.verdict, outcome.note) == ("fresh", "evaluated meanwhile by another process")
    assert LEASE not in lab.tags()


@pytest.mark.faults
def test_two_processes_agree(registered: Lab, tmp_path: Path) -> None:
    lab = registered.copy(tmp_path)
    code = "from pipelines.cli.main import main; main()"
    for attempt, extra in enumerate((["--json"], ["--json", "--fresh"])):
        command_line = [sys.executable, "-c", code, "reevaluate", str(lab.config), *lab.arguments(), *extra]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        both = [
            subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in "ab"
        ]
        outputs = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        verdicts = {json.loads(out)["models"][0]["verdict"] for out, _ in outputs}
        assert verdicts <= {"evaluated", "busy", "fresh"} and "evaluated" in verdicts, attempt
        assert LEASE not in lab.tags()
        recorded = EvaluationRecord.of(lab.tags())
        manifest = lab.store.read_manifest(*recorded.evaluation.split("/"))
        for record in (*manifest.files, *manifest.records):
            lab.store.fetch(manifest, record.name)
        assert recorded.scores["frechet_distance"] == manifest.metrics["frechet_distance"]


@pytest.mark.faults
def test_two_processes_without_a_lease_agree(registered: Lab, tmp_path: Path) -> None:
    """The lease saves work; artifacts and tags are the same without it."""
    lab = registered.copy(tmp_path)
    code = (
        "import os, sys, json; from pathlib import Path; from rich.console import Console\n"
        "from pipelines.cluster import connection; connection.prepare_environment()\n"
        "from pipelines.reevaluation import reevaluate; from pipelines.reevaluation.plan import Request\n"
        "reevaluate.LEASE = f'enat.lease-{os.getpid()}'\n"
        "reevaluate._Evaluator._meanwhile = lambda self, case, tags: case\n"
        "request = Request.of(Path(sys.argv[1]), sys.argv[2:])\n"
        "(outcome,) = reevaluate.reevaluate(request, 'test', reevaluate.Options(), Console(stderr=True))\n"
        "print(json.dumps([outcome.verdict, outcome.note, outcome.evaluation, dict(outcome.now)]))"
    )
    command_line = [sys.executable, "-c", code, str(lab.config), *lab.arguments()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    both = [subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True, env=environment) for _ in "ab"]
    answers = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in both]
    assert {each[0] for each in answers} <= {"evaluated", "fresh"}, answers
    assert answers[0][2:] == answers[1][2:] and answers[0][2] == EvaluationRecord.of(lab.tags()).evaluation
    assert len(list((lab.root / "store" / "evaluate").iterdir())) == 1
