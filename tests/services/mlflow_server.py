"""A tracking server of MLflow over HTTP. It serves artifacts itself, and sees none of the folders of its clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.free_ports import free_ports
from services.mlflow_database import mlflow_database


@contextmanager
def mlflow_server(folder: Path, url: str | None = None) -> Iterator[str]:
    """Yields its URL, which may be that of one that was stopped. folder: has or gets the database; gets files and a log."""
    if not (folder / "mlflow.db").exists():
        mlflow_database(folder)
    url = url or f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its workers
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
