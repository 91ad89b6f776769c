"""A head and a worker as compose.yaml starts them, on this machine: the same options and variables, other ports and folders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from manifests import compose, filled

pytestmark = pytest.mark.faults

SERVICES = compose()["services"]
TOKEN = "of-these-tests-" + "0" * 20
JOB = """
import os, ray
ray.init(logging_level="ERROR")
@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id(), os.environ["AWS_REGION"]
print("found", ray.get(where.remote())[0] != ray.get_runtime_context().get_node_id(), ray.get(where.remote())[1])
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Nodes:
    dashboard: int
    agent: int
    environment: dict[str, str]
    logs: Path


def _environment(name: str) -> dict[str, str]:
    """The service's, with the token for what is asked for; nothing of Ray's from around the tests."""
    around = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
    given = {key: TOKEN if "${RAY_AUTH_TOKEN" in value else filled(value) for key, value in SERVICES[name]["environment"].items()}
    return around | given


def _command(name: str, replaced: dict[str, str], *more: str) -> list[str]:
    program, *rest = [filled(word) for word in SERVICES[name]["command"]]
    options = {word.partition("=")[0]: word for word in rest}
    options |= {key: f"{key}={value}" for key, value in replaced.items()}
    return [str(Path(sys.executable).with_name(program)), *options.values(), *more]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    gcs, dashboard, head_agent, worker_agent, *agents = _free_ports(8)
    folder, logs = tempfile.mkdtemp(prefix="enat-"), tmp_path_factory.mktemp("logs")  # sockets have short names only
    head = _command(
        "ray-head",
        {"--port": str(gcs), "--dashboard-host": "127.0.0.1", "--dashboard-port": str(dashboard)},
        f"--temp-dir={folder}/head", f"--dashboard-agent-listen-port={head_agent}", "--node-ip-address=127.0.0.1",
        f"--metrics-export-port={agents[0]}", f"--dashboard-agent-grpc-port={agents[1]}", "--object-store-memory=80000000",
    )  # fmt: skip
    worker = _command(
        "ray-worker",
        {"--address": f"127.0.0.1:{gcs}", "--num-cpus": "1"},
        f"--dashboard-agent-listen-port={worker_agent}", "--node-ip-address=127.0.0.1",
        f"--metrics-export-port={agents[2]}", f"--dashboard-agent-grpc-port={agents[3]}", "--object-store-memory=80000000",
    )  # fmt: skip
    found = Nodes(dashboard, worker_agent, _environment("ray-head"), logs)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in (("ray-head", head), ("ray-worker", worker)):
            log = (logs / name).open("wb")
            started.append(subprocess.Popen(command, env=_environment(name), stdout=log, stderr=log, start_new_session=True))
            _until_well(found, name, started[-1])
        yield found
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):  # what its daemons left, of this group alone
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _is_well(nodes: Nodes, name: str) -> bool:
    """By the service's own health check, on this test's ports."""
    program, option, check = SERVICES[name]["healthcheck"]["test"][1:]
    assert program == "python"
    check = check.replace(":8265/", f":{nodes.dashboard}/").replace(":52365/", f":{nodes.agent}/")
    return subprocess.run([sys.executable, option, check], capture_output=True, timeout=60, check=False).returncode == 0


def _until_well(nodes: Nodes, name: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not _is_well(nodes, name):
        assert process.poll() is None and time.monotonic() < deadline, (nodes.logs / name).read_text()[-3000:]
        time.sleep(0.5)


def test_health_needs_no_token_and_everything_else_does(nodes: Nodes) -> None:
    assert _is_well(nodes, "ray-head") and _is_well(nodes, "ray-worker")
    url = f"http://127.0.0.1:{nodes.dashboard}/api/jobs/"
    for headers, expected in (({}, 401), ({"Authorization": "Bearer wrong-wrong-wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
        assert refused.value.code == expected
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=30) as answer:
        assert answer.status == 200


def test_a_job_s_driver_runs_on_the_head_and_its_tasks_on_the_worker(nodes: Nodes, tmp_path: Path) -> None:
    """Submitted as kuberay/reevaluate.yaml does; drivers and tasks have the variables of their nodes."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"http://127.0.0.1:{nodes.dashboard}"
    command = [ray, "job", "submit", "--address", address, "--", sys.executable, str(script)]
    done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"found True {SERVICES['ray-worker']['environment']['AWS_REGION']}" in done.stdout


def test_a_job_that_ends_with_drift_fails_the_pod_that_submitted_it(nodes: Nodes) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", f"http://127.0.0.1:{nodes.dashboard}", "--", "bash", "-c", "exit 3"]
    done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    url = f"http://127.0.0.1:{nodes.dashboard}/api/jobs/"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=30) as answer:
        (job,) = [job for job in json.load(answer) if "exit 3" in job["entrypoint"]]
    assert job["status"] == "FAILED" and job["driver_exit_code"] == 3 and "exit code 3" in job["message"]
