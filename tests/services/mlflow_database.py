"""A tracking store of MLflow in a file. MLflow takes seconds to make its tables, so they are made once and copied."""

from __future__ import annotations

import functools
import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path


@functools.cache
def _tables() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # MLflow says which tables it makes
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def mlflow_database(folder: Path) -> str:
    """The URI of mlflow.db in a folder, a new store without runs."""
    path = folder / "mlflow.db"
    path.write_bytes(_tables())
    return f"sqlite:///{path}"
