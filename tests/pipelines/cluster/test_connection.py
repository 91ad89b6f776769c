"""A local cluster ends with the command that started it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from pipelines.cluster import connection

_COMMAND = """
import atexit, os, time
import psutil
from pipelines.cluster import connection
connection.prepare_environment()
connection.connect(connection.ClusterConfig(num_cpus=1))
import ray

class Worker:
    def pid(self):
        return os.getpid()
    def leave(self):
        atexit.register(time.sleep, 10_000)  # as a worker that waits for a lock at its exit: Ray has forgotten it by then
        ray.actor.exit_actor()

worker = ray.remote(Worker).remote()
pid = ray.get(worker.pid.remote())
try:
    ray.get(worker.leave.remote())
except ray.exceptions.RayActorError:
    pass
print(pid, *(child.pid for child in psutil.Process().children(recursive=True)))
"""


@pytest.mark.slow
def test_no_process_outlives_the_command_that_started_a_local_cluster() -> None:
    done = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, timeout=200, check=True)
    worker, *started = map(int, done.stdout.split())
    assert worker in started and len(started) > 3
    processes = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(processes, timeout=60)  # those of Ray itself need a moment
    names = [f"{process.name()} ({process.status()})" for process in left]
    for process in left:
        process.kill()
    assert not names


def test_processes_of_one_machine_import_ahead(ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On several machines, nobody knows which processes will need the modules."""
    import ray

    def note(modules: Sequence[str]) -> None:
        (tmp_path / f"{ray.get_runtime_context().get_task_id()} {' '.join(modules)}").touch()

    monkeypatch.setattr(connection, "_import", note)
    nodes = ray.nodes()
    with monkeypatch.context() as several:
        several.setattr(ray, "nodes", lambda: [*nodes, *nodes])
        several.setattr(ray, "remote", lambda **resources: pytest.fail("no process needs to import anything"))
        connection.warm_up(["torch", "enat.sampling.sampler"])
    connection.warm_up(["torch", "enat.sampling.sampler"])
    num_processes = min(int(ray.cluster_resources()["CPU"]), connection._MOST_WARM)
    while len(found := sorted(path.name for path in tmp_path.iterdir())) < num_processes:  # until the time of the test is over
        time.sleep(0.05)
    assert len(found) == num_processes and all(name.endswith(" torch enat.sampling.sampler") for name in found)
