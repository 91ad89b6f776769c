"""A local cluster ends with the command that started it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

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
