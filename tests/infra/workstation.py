"""The services of compose.yaml as processes of this machine. Commands and variables are those of the manifests, word for word, with
other addresses and folders. An S3 server of the tests replaces MinIO, and sqlite replaces PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
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
from typing import Any

from manifests import INFRA, compose, filled, stages
from what_runs import what_runs

from services.free_ports import free_ports

COMMANDS = what_runs()
SECRETS = {  # of infra/.env; the password needs at least twelve characters
    "AWS_ACCESS_KEY_ID": "key-of-these-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-these-tests",
    "MLFLOW_TRACKING_USERNAME": "admin-of-these-tests",
    "MLFLOW_TRACKING_PASSWORD": "password-of-these-tests",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "form-of-these-tests",
    "POSTGRES_PASSWORD": "database-of-these-tests",
    "RAY_AUTH_TOKEN": "of-these-tests-" + "0" * 20,
}
_HOST = "127.0.0.1"
_OBJECTS = "--object-store-memory=80000000"
_BIN = Path(sys.executable).parent


@contextmanager
def s3_process() -> Iterator[str]:
    """Start an S3 endpoint without buckets. Yields its URL."""
    (port,) = free_ports(1)
    url = f"http://{_HOST}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"{url}/moto-api/data.json"):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        return False


@dataclass
class Workstation:
    """`url`: the Jobs API. `mlflow`: the tracking server. `folder`: volumes. `agents`: ports of nodes by service.
    `taken`: places of the commands that were run."""

    s3: str
    folder: Path
    logs: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    agents: dict[str, int] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._gcs, self._dashboard, self._mlflow = free_ports(3)
        self.url, self.mlflow = f"http://{_HOST}:{self._dashboard}", f"http://{_HOST}:{self._mlflow}"
        for name in ("home", "workspace", "cache", "mlflow", "state", "etc"):
            (self.folder / name).mkdir()
        (self.folder / "etc" / "auth.ini").write_text(self.here((INFRA / "mlflow-auth.ini").read_text()))

    def here(self, text: str, agent: int = 0) -> str:
        """Replace addresses and folders of a manifest by those of this machine, and compose's variables by secrets and defaults.

        `agent`: the port of the node's agent.
        """
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: SECRETS[match[1]], text)
        text = re.sub(r"postgresql\+psycopg2://\S*", "sqlite:////var/lib/mlflow/mlflow.db", filled(text))
        places = {
            "object-store:9000": self.s3.removeprefix("http://"),
            "mlflow:5000": f"{_HOST}:{self._mlflow}",
            "5000": str(self._mlflow),
            "enat-head-svc:8265": f"{_HOST}:{self._dashboard}",
            "8265": str(self._dashboard),
            "ray-head:6379": f"{_HOST}:{self._gcs}",
            "6379": str(self._gcs),
            "52365": str(agent),
            "0.0.0.0": _HOST,
            "/opt/venv/bin": str(_BIN),
            "/opt/enat/.venv": sys.prefix,
            "/opt/enat/configs/imagenet256.yaml": str(self.config),
            "/opt/s3": str(INFRA / "s3"),
            "/etc/mlflow": str(self.folder / "etc"),
            "/etc/enat": str(self.folder / "etc"),
            "/var/lib/mlflow": str(self.folder / "mlflow"),
            "/var/lib/enat": str(self.folder / "state"),
            "/var/cache/enat": str(self.folder / "cache"),
            "/home/enat": str(self.folder / "home"),
            "/workspace": str(self.folder / "workspace"),
        }
        pattern = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
        return re.sub(pattern, lambda match: places[match[0]], text)

    @property
    def config(self) -> Path:
        return self.folder / "imagenet256.yaml"

    def words(self, place: str, agent: int = 0) -> list[str]:
        self.taken.add(place)
        return [self.here(word, agent) for word in COMMANDS[place]]

    # Variables ---------------------------------------------------------------------------------------------------------------

    def of_image(self, *names: str) -> dict[str, str]:
        """ENV of these stages of the Dockerfile. One thread per process, because many processes share a small machine."""
        given = {"OMP_NUM_THREADS": "1"}
        for name in names:
            for instruction, rest in stages()[name]:
                if instruction == "ENV":
                    given |= dict(word.split("=", 1) for word in shlex.split(self.here(rest)))
        return given | {"PATH": given["PATH"].replace("$PATH", os.environ["PATH"])}

    def variables(self, service: str) -> dict[str, str]:
        image = ("mlflow",) if service in {"mlflow", "bucket"} else ("base-cpu",)
        given = {name: self.here(value) for name, value in compose()["services"][service]["environment"].items()}
        return self.of_image(*image) | given

    @property
    def submitter(self) -> dict[str, str]:
        """The environment of a pod that submits jobs: from the image and from the manifest."""
        return self.of_image("base-cpu") | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRETS["RAY_AUTH_TOKEN"]}

    # Processes ---------------------------------------------------------------------------------------------------------------

    def run(self, place: str, env: Mapping[str, str], timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return self.call(self.words(place), env, timeout)

    def call(self, words: list[str], env: Mapping[str, str], timeout: float = 280) -> subprocess.CompletedProcess[str]:
        cwd = self.folder / "workspace"
        return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    def start(self, service: str, command: str, health: str, *more: str) -> subprocess.Popen[bytes]:
        """Start a service and wait until it is healthy. `command`, `health`: places of its command and of its health check."""
        log = self.logs / service
        with log.open("wb") as file:
            self.processes.append(
                subprocess.Popen(
                    [*self.words(command), *more], env=self.variables(service), cwd=self.folder / "workspace",
                    stdout=file, stderr=file, start_new_session=True,
                )
            )  # fmt: skip
        deadline = time.monotonic() + 150
        while not self.is_well(service, health):
            assert self.processes[-1].poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        return self.processes[-1]

    def start_node(self, service: str) -> subprocess.Popen[bytes]:
        """Start a Ray node, with the address, free ports and folders that a container has from its own network."""
        listen, metrics, grpc, runtime = free_ports(4)
        self.agents[service] = listen
        own = [
            f"--node-ip-address={_HOST}",
            f"--dashboard-agent-listen-port={listen}",
            f"--metrics-export-port={metrics}",
            _OBJECTS,
        ]
        own += [f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime}", f"--temp-dir={self.folder}/{service}"]
        return self.start(service, f"compose {service}", f"compose {service} healthcheck", *own)

    def is_well(self, service: str, health: str) -> bool:
        return self.call(self.words(health, self.agents.get(service, 0)), self.variables(service), 60).returncode == 0

    def stop(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Stop a process as Docker does: SIGTERM, then SIGKILL. Uses process ids, and only of processes started here."""
        import psutil

        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
        for child in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def read(self, path: str, token: str | None = SECRETS["RAY_AUTH_TOKEN"]) -> Any:
        """Read JSON from the head. Raises urllib.error.HTTPError."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", headers=headers), timeout=30) as answer:
            return json.load(answer)


@contextmanager
def workstation(logs: Path) -> Iterator[Workstation]:
    """Start the bucket, the tracking server, the head and a worker, in the order of compose."""
    folder = Path(tempfile.mkdtemp(prefix="enat-"))  # names of sockets are limited in length
    with s3_process() as s3:
        started = Workstation(s3, folder, logs)
        try:
            made = started.run("compose bucket", started.variables("bucket"))
            assert made.returncode == 0, made.stderr
            started.start("mlflow", "Dockerfile mlflow CMD", "Dockerfile mlflow HEALTHCHECK")
            started.start_node("ray-head")
            started.start_node("ray-worker")
            yield started
        finally:
            for process in reversed(started.processes):
                started.stop(process, 10)
            shutil.rmtree(folder, ignore_errors=True)
