"""A run of configs/digits.yaml by the command line, small enough for tests. Many tests read it, and it runs once.

It takes more than a minute, so it starts in the background as soon as pytest knows that a selected test needs it. Under
pytest-xdist the first worker starts it, every worker reads it, and the controlling process ends it if it is still running.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.listeners import Listeners

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
ENAT = Path(sys.executable).with_name("enat")

TINY_DIGITS = (
    "tokenizer.recipe.num_steps=30",
    "token_map.shard_size=64",
    "reference.num_epochs=1",
    "train.num_steps=20",
    "train.execution={num_workers: 1, checkpoint_every: 5, log_every: 5, sample_every: 10}",
    "generate.num_samples=40",
    "generate.shard_size=20",
)


def fresh_environment() -> dict[str, str]:
    """The environment of a new shell. Settings of this process's own Ray must not reach the command under test."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DS_", "TORCH_"))}
    return {**inherited, "COLUMNS": "132"}


@dataclass(frozen=True)
class CommandLineRun:
    """One run of `enat run`: its output, and where it wrote."""

    overrides: tuple[str, ...]
    workspace: Path
    process: subprocess.CompletedProcess[str]
    seconds: float
    listeners: frozenset[tuple[str, str, str]]
    """(stage, process, address) of every socket on which the run listened."""

    @property
    def store(self) -> Any:
        from pipelines.artifacts.open import open_store

        return open_store(str(self.workspace / "store"))

    def planned(self) -> dict[str, Any]:
        """Nodes of the run by id, each with its manifest in the store."""
        from pipelines.run import graph
        from pipelines.run.loading import load_run
        from pipelines.workflow import driver

        run = load_run(DIGITS, (*self.overrides, f"workspace={self.workspace}"))
        return {planned.node.id: planned for planned in driver.plan(graph.build(run), self.store)}


def _folder(config: pytest.Config) -> Path:
    """One folder for all workers of pytest-xdist. pytest removes it with the other folders of old sessions."""
    base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return (base.parent if hasattr(config, "workerinput") else base) / "digits-run"


def _start(folder: Path) -> None:
    """Start this file as a program in a process group of its own: the run may outlive the worker that starts it."""
    folder.mkdir()
    command = [sys.executable, "-m", "material.digits_run", str(folder)]
    process = subprocess.Popen(command, cwd=REPOSITORY / "tests", env=fresh_environment(), start_new_session=True)
    (folder / "process").write_text(str(process.pid))


def _is_running(folder: Path) -> bool:
    """Whether the run has not ended, or will not before `ended` is there."""
    with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):  # the first worker may not have started it yet
        is_over = psutil.Process(int((folder / "process").read_text())).status() == psutil.STATUS_ZOMBIE
        return not is_over or (folder / "ended").exists()
    return not (folder / "process").exists() or (folder / "ended").exists()


def _run(folder: Path) -> None:
    """Run the command to its end. The file `ended` appears last."""
    started = time.monotonic()
    cache = str(folder / "cache")

    def stage() -> str:
        """The last stage that was done."""
        done = [line.split()[1] for line in (folder / "out").read_text().splitlines() if line.startswith("✓")]
        return done[-1] if done else ""

    listeners = Listeners(f"ENAT_CACHE={cache}", stage)
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err, listeners.watch():
        ended = subprocess.run(
            [str(ENAT), "run", str(DIGITS), *TINY_DIGITS, f"workspace={folder / 'runs'}"],
            cwd=REPOSITORY,
            env={**os.environ, "ENAT_CACHE": cache},
            stdout=out,
            stderr=err,
            check=False,
        )
    values = {"arguments": ended.args, "exit_code": ended.returncode, "seconds": time.monotonic() - started}
    values |= {"listeners": sorted(listeners.found)}
    (folder / "ending").write_text(json.dumps(values))
    (folder / "ending").rename(folder / "ended")


def _reads_the_run(item: pytest.Item) -> bool:
    return "digits_run" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files whose tests read the run to the end, where it has ended."""
    files = {item.path for item in items if _reads_the_run(item)}
    items.sort(key=lambda item: item.path in files)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the run if a selected test reads it."""
    starts_here = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    if starts_here and any(map(_reads_the_run, session.items)) and not session.config.option.collectonly:
        _start(_folder(session.config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the run in the process that ends last. It is still running if the tests that read it were not reached."""
    process = _folder(session.config) / "process"
    if not hasattr(session.config, "workerinput") and process.exists() and not process.with_name("ended").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(process.read_text()), signal.SIGKILL)


@pytest.fixture(scope="session")
def digits_run(pytestconfig: pytest.Config) -> CommandLineRun:
    """configs/digits.yaml with few steps, from nothing to the report: all real images, all stages, one variant."""
    folder = _folder(pytestconfig)
    while not (folder / "ended").exists():  # pytest's timeout ends a run that hangs
        assert _is_running(folder), f"the run was lost:\n{(folder / 'err').read_text()}"
        time.sleep(0.1)
    ending = json.loads((folder / "ended").read_text())
    texts = ((folder / name).read_text() for name in ("out", "err"))
    process = subprocess.CompletedProcess(ending["arguments"], ending["exit_code"], *texts)
    listeners = frozenset(map(tuple, ending["listeners"]))
    return CommandLineRun(TINY_DIGITS, folder / "runs", process, ending["seconds"], listeners)


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
