"""Runs, metrics and pictures in MLflow. The only module that imports mlflow.

Tracking is an observer: when its server is down, slow or refuses a value, one warning is shown and the work goes on. A
`RunHandle` is what workers hold (rank 0 of training logs through one); it opens its own client where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.artifacts import without_credentials

_log = logging.getLogger(__name__)
_PARAMETER_LIMIT = 6000  # MLflow cuts longer values silently
_ILLEGAL = re.compile(r"[^\w\-. /]")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """uri: of the tracking store; None takes MLFLOW_TRACKING_URI, else an sqlite file beside the artifact store."""

    uri: str | None = None
    experiment: str = "enat"
    enabled: bool = True


def resolve_uri(config: TrackingConfig, beside: Path) -> str:
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(beside / 'mlflow.db').absolute()}"


@dataclass
class RunHandle:
    """One MLflow run, or nothing (run_id None): every method then does nothing."""

    uri: str
    run_id: str | None
    parent: RunHandle | None = field(default=None, repr=False)
    _given_up: bool = field(default=False, repr=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step; names are made legal, values that are not finite are left out."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entities = [
            Metric(_ILLEGAL.sub("_", name), float(value), now, step)
            for name, value in metrics.items()
            if abs(float(value)) < float("inf")  # false for NaN, too
        ]
        if entities:
            self._do(lambda client: client.log_batch(self.run_id, metrics=entities, synchronous=True))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Nested configuration as dotted parameters."""
        from mlflow.entities import Param

        flat = [Param(_ILLEGAL.sub("_", name), str(value)[:_PARAMETER_LIMIT]) for name, value in _flatten(values)]
        for first in range(0, len(flat), 100):  # the most that MLflow takes at once
            batch = flat[first : first + 100]
            self._do(lambda client, batch=batch: client.log_batch(self.run_id, params=batch))  # type: ignore[misc]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(name, value) for name, value in tags.items()]
        self._do(lambda client: client.log_batch(self.run_id, tags=entities))

    def log_bytes(self, content: bytes, name: str) -> None:
        """A file, such as "samples/step-000100.png"."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            self.log_file(path, str(Path(name).parent))

    def log_file(self, path: Path, folder: str = ".") -> None:
        self._do(lambda client: client.log_artifact(self.run_id, str(path), None if folder == "." else folder))

    def finish(self, status: str = "FINISHED") -> None:
        self._do(lambda client: client.set_terminated(self.run_id, status))

    def _do(self, action: Callable[[Any], Any]) -> Any:
        if self.run_id is None or self._given_up:
            return None
        try:
            with _quiet():
                return action(_client(self.uri))
        except Exception as error:  # whatever an observer fails with must not stop the work
            self._give_up(_first_line(error))
            return None

    def _give_up(self, reason: str) -> None:
        """Also on behalf of the run that this one is nested in: one warning is enough, and no later stage need try."""
        self._given_up = True
        if self.parent is None or not self.parent._given_up:
            _log.warning("tracking at %s does not answer; this run goes on without it (%s)", without_credentials(self.uri), reason)
        if self.parent is not None:
            self.parent._given_up = True


def start_run(uri: str, config: TrackingConfig, name: str, tags: Mapping[str, str], parent: RunHandle | None = None) -> RunHandle:
    """A new run, nested where a parent is given. Where tracking is off or down: a handle that does nothing."""
    is_off = not config.enabled or (parent is not None and (parent.run_id is None or parent._given_up))
    handle = RunHandle(uri, None if is_off else "pending", parent)

    def create(client: Any) -> str:
        experiment = client.get_experiment_by_name(config.experiment)
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(config.experiment, _artifact_location(uri))
        )
        parents = {"mlflow.parentRunId": parent.run_id} if parent else {}
        run_id: str = client.create_run(experiment_id, run_name=name, tags={**tags, **parents}).info.run_id
        return run_id

    handle.run_id = handle._do(create)
    return handle


def _artifact_location(uri: str) -> str | None:
    """Files of a local sqlite store lie beside it, wherever the command is run from; a server decides for itself."""
    return str(Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts") if uri.startswith("sqlite:///") else None


@cache
def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # read when mlflow is imported
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Alembic tells of every migration, MLflow's libraries of deprecations."""
    logging.getLogger("alembic").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: BaseException) -> str:
    return without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]
