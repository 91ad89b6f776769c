"""A local cluster that does not start, is lost, or is left behind: processes of Ray, and the command, are killed."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from material.digits_run import ENAT, REPOSITORY, fresh_environment

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_LOST = re.compile(
    r"enat: Ray(?:'s process (?:gcs_server|raylet) has ended| has lost one of its processes) "
    r"\(its (?:log is|logs are in) (?P<log>\S+)\); (?P<remedy>.+)"
)
_VICTIMS = ("gcs_server", "raylet/raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # in their command lines


def _descendants(process: subprocess.Popen[Any]) -> dict[psutil.Process, str]:
    """With their command lines."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[child] = " ".join(child.cmdline())
    return found


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 150
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)
    return found


# A stage whose loss is seen in its middle: by its parts, and values of the config that make it long enough.
_STAGES = {
    "train": ("checkpoint-*.json", "train.num_steps=400", "train.execution.checkpoint_every=20"),
    "generate": ("*.json", "generate.num_samples=800"),
}


@pytest.fixture
def begin(tiny_config: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command, and return when it has made a part of the stage, or a checkpoint of its training."""
    with contextlib.ExitStack() as stack:

        def begin(stage: str = "train") -> subprocess.Popen[str]:
            parts, *values = _STAGES[stage]
            command = [str(ENAT), "run", str(tiny_config), f"targets=[{stage}]", f"workspace={tmp_path}", *values]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen(command, cwd=REPOSITORY, env=fresh_environment(), **pipes))
            stack.callback(process.kill)
            _wait_for(lambda: [*tmp_path.glob(f"store/{stage}/*/.parts/{parts}")], process)
            return process

        yield begin


@pytest.mark.parametrize(("victim", "stage"), [*((victim, "train") for victim in _VICTIMS), ("raylet/raylet", "generate")])
def test_a_run_that_loses_a_process_of_ray_says_so_and_continues(begin, victim: str, stage: str) -> None:
    process = begin(stage)
    before = _descendants(process)
    (found,) = [child for child, line in before.items() if victim in line.split(" --")[0]]
    found.kill()
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    (line,) = err.splitlines()
    assert (lost := _LOST.fullmatch(line)) and lost["remedy"] == "starting Ray again"
    assert Path(lost["log"]).exists()
    assert re.search(rf"✓ tokenizer .* reused\n(.*\n)*✓ {stage} .* made in", out)
    left = psutil.wait_procs(before, timeout=15)[1]
    assert not [before[process] for process in left]


def test_a_run_that_loses_ray_twice_says_how_to_continue(begin) -> None:
    process = begin()
    for _ in range(2):
        (worker,) = _wait_for(lambda: [child for child, line in _descendants(process).items() if "RayTrainWorker" in line], process)
        raylet = worker.parent()
        assert raylet is not None and raylet.name() == "raylet"
        raylet.kill()
        psutil.wait_procs([raylet], timeout=10)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 1
    first, second = map(_LOST.fullmatch, err.splitlines())
    assert first and second and first["log"] != second["log"]
    assert second["remedy"] == "run the same command again to continue from what is committed"


def test_nothing_of_a_killed_command_stays_alive(begin) -> None:
    process = begin()
    started = _descendants(process)
    assert any("RayTrainWorker" in line for line in started.values())
    process.kill()
    left = psutil.wait_procs(started, timeout=15)[1]
    assert not [started[process] for process in left]


_START = """
import sys, threading, time
import psutil
from pipelines.cluster import connection

def kill_the_first_raylet():
    while not (found := [child for child in psutil.Process().children() if child.name() == "raylet"]):
        time.sleep(0.01)
    found[0].kill()

connection.prepare_environment()
threading.Thread(target=kill_the_first_raylet).start()
connection.connect(connection.ClusterConfig(num_cpus=1))
import ray
print(ray.get(ray.remote(lambda: 42).remote()))
print(*(child.name() for child in psutil.Process().children() if child.status() != "zombie"))
"""


def test_ray_that_does_not_start_is_started_again() -> None:
    command = [sys.executable, "-c", _START]
    done = subprocess.run(command, env=fresh_environment(), capture_output=True, text=True, timeout=250, check=True)
    assert "Ray did not start" in done.stderr and "trying again" in done.stderr
    answer, children = done.stdout.splitlines()
    assert answer == "42" and children.split().count("raylet") == children.split().count("gcs_server") == 1
