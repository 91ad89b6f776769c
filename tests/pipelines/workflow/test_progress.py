"""Progress: reports of workers are summed on the driver, and a lost report does no harm."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import ray
from rich.console import Console

from pipelines.workflow.progress import Bar
from services.ray_nodes import ray_nodes


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def _task_of(bar: Bar) -> Any:
    return next(task for task in bar._display.progress.tasks if task.id == bar._task)


@pytest.mark.usefixtures("ray_cluster")
def test_the_bar_shows_the_sum_of_what_workers_have_done(terminal: Console) -> None:
    with Bar(terminal, "train", 100, "steps") as bar, bar.reporter() as reporter:
        for worker, done in (("a", 10), ("b", 5), ("a", 30)):
            reporter.named(worker).report(done, "loss 0.5" if worker == "a" else "")
        deadline = time.monotonic() + 20
        while _task_of(bar).completed != 35 and time.monotonic() < deadline:
            time.sleep(0.05)
        task = _task_of(bar)
        assert (task.completed, task.total, task.fields["note"]) == (35, 100, "loss 0.5")


@pytest.mark.usefixtures("ray_cluster")
def test_work_continues_if_the_actor_of_the_bar_is_lost(terminal: Console) -> None:
    with Bar(terminal, "train", 100, "steps") as bar, bar.reporter() as reporter:
        ray.kill(reporter._state)
        reporter.report(10)
        (follower,) = [thread for thread in threading.enumerate() if thread.name == "progress"]
        follower.join(timeout=60)
        assert not follower.is_alive()
        bar.update(20)
        assert _task_of(bar).completed == 20


_WHERE_ACTORS_RUN = """
import io, sys
from pipelines.cluster import connection
connection.prepare_environment()
connection.connect(connection.ClusterConfig(address=sys.argv[1]))
import ray
from ray.util.state import list_actors
from rich.console import Console
from pipelines.workflow.progress import Bar
for _ in range(4):
    with Bar(Console(file=io.StringIO()), "train", 1, "steps").reporter() as reporter:
        ray.get(reporter._state.read.remote())
        (place,) = [actor.node_id for actor in list_actors(address=sys.argv[2], detail=True) if actor.state == "ALIVE"]
        (head,) = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
        assert place == head, (place, head)
"""


@pytest.mark.faults
def test_the_actor_of_a_bar_runs_on_the_head_node() -> None:
    with ray_nodes(1) as nodes:
        nodes.add_node(1)
        nodes.add_node(1)
        command = [sys.executable, "-c", _WHERE_ACTORS_RUN, nodes.address, nodes.url]
        done = subprocess.run(command, env={**nodes.environment}, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_log_has_a_line_now_and_then_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, expected in (("0.001", "  train 250 of 1,000 steps  loss 3.2\n"), (None, "")):
        if seconds is None:
            monkeypatch.delenv("ENAT_PROGRESS_SECONDS")
        else:
            monkeypatch.setenv("ENAT_PROGRESS_SECONDS", seconds)
        shown = io.StringIO()
        with Bar(Console(file=shown, width=100), "train", 1000, "steps") as bar:
            monkeypatch.setattr(bar, "_last_line", 0.0)
            bar.update(250, "loss 3.2")
        assert shown.getvalue() == expected
