"""Clients of MLflow, one for each place that a process uses."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_LOCK_ATTEMPTS = 600


@cache
def client_of(uri: str) -> Any:
    """The client for a server or database. Makes the tables of a new SQLite file, and migrates those of an older MLflow."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # read when mlflow is imported
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # of single small files
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path.with_name(f"{path.name}.lock")):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables, or migrates them: processes that do so at once collide
        client.search_registered_models(max_results=1)
    return client


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine, if one can be written. A process that hangs holds up others for a minute."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a reader without the right to write needs no tables
            file = stack.enter_context(path.open("a"))
            for _ in range(_LOCK_ATTEMPTS):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Alembic and MLflow, which log every migration, and the deprecation warnings of MLflow's libraries."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
