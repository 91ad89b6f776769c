"""A Ray cluster as `ray start` makes it, on the loopback interface: a head with its Jobs API, token on, and further nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.free_ports import free_ports

TOKEN = "of-these-tests-" + "0" * 20
_HOST = "127.0.0.1"
_MEMORY = "--object-store-memory=80000000"


@dataclass
class RayNodes:
    """url: of the Jobs API.   address: other nodes join there.   environment: of all nodes; jobs inherit the head's.
    folder: of Ray's sessions and logs."""

    environment: Mapping[str, str]
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="enat-")))  # sockets have short names only
    url: str = ""
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_head(self, num_cpus: int) -> None:
        """Ready once its Jobs API knows of it."""
        gcs, dashboard = free_ports(2)
        self.url, self.address = f"http://{_HOST}:{dashboard}", f"{_HOST}:{gcs}"
        api = ("--include-dashboard=true", f"--dashboard-host={_HOST}", f"--dashboard-port={dashboard}")
        self._start("head", "--head", f"--port={gcs}", *api, f"--temp-dir={self.folder}", f"--num-cpus={num_cpus}")
        self._until(lambda: _answers(f"{self.url}/api/gcs_healthz") and b"ALIVE" in _read(f"{self.url}/api/v0/nodes"))

    def add_node(self, num_cpus: int) -> subprocess.Popen[bytes]:
        """With a folder of its own, as on another machine: in a shared one nodes unpack a job's code over that of the others."""
        agent = free_ports(1)[0]
        options = (f"--dashboard-agent-listen-port={agent}", f"--temp-dir={self.folder}/node-{len(self.processes)}")
        process = self._start("node", f"--address={self.address}", f"--num-cpus={num_cpus}", *options)
        self._until(lambda: _answers(f"http://{_HOST}:{agent}/api/local_raylet_healthz"))
        return process

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        own = [f"--node-ip-address={_HOST}", _MEMORY, "--num-gpus=0"]
        for port, option in zip(
            free_ports(3), ("metrics-export-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"), strict=True
        ):
            own.append(f"--{option}={port}")
        if not any("dashboard-agent-listen-port" in option for option in options):
            own.append(f"--dashboard-agent-listen-port={free_ports(1)[0]}")
        with (self.folder / f"{name}-{len(self.processes)}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen([*command, *own], env={**self.environment}, stdout=log, stderr=log, start_new_session=True)
            )
        return self.processes[-1]

    def _until(self, condition: object, timeout: float = 120) -> None:
        assert callable(condition)
        deadline = time.monotonic() + timeout
        while not condition():
            logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
            assert self.processes[-1].poll() is None and time.monotonic() < deadline, logs
            time.sleep(0.2)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """A node as if its power were cut: `ray start --block` and all that it started, by their ids."""
        import psutil

        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(30)

    def drain(self, deadline_seconds: int) -> None:
        """Announce the end of the one node beside the head, as a cloud does that takes its machine back."""
        listed = json.loads(_read(f"{self.url}/api/v0/nodes"))["data"]["result"]["result"]
        (node,) = [each["node_id"] for each in listed if not each["is_head_node"] and each["state"] == "ALIVE"]
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={self.address}", f"--node-id={node}"]
        command += [
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=a test",
            f"--deadline-remaining-seconds={deadline_seconds}",
        ]
        subprocess.run(command, env={**self.environment}, check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        import psutil

        alive = [process for process in self.processes if process.poll() is None]
        family = [child for process in alive for child in psutil.Process(process.pid).children(recursive=True)]
        for process in reversed(alive):
            process.send_signal(signal.SIGTERM)
        for process in reversed(alive):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()
        for child in psutil.wait_procs(family, timeout=5)[1]:  # workers whose raylet is gone end by themselves, mostly
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(url: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=30) as answer:
        return answer.read()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def environment(**more: str) -> dict[str, str]:
    """Of a node: nothing of Ray's or MLflow's from around the tests, the token, and few threads."""
    around = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{around['PATH']}"  # a job's `python` is the one of the tests
    return {**around, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **more}


@contextmanager
def ray_nodes(num_cpus: int, *, loopback_only: bool = False, **variables: str) -> Iterator[RayNodes]:
    """A head with its Jobs API. Ends what it started, by process id.   loopback_only: opens no port to the network, and no other
    node can join."""
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if loopback_only else {}
    nodes = RayNodes(environment(**variables, **alone))
    try:
        nodes.start_head(num_cpus)
        yield nodes
    finally:
        nodes.close()
