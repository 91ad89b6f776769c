"""Read runs and their files, and registered models and their tags, from MLflow.

Unlike run.py, which only warns, these functions raise an error that names the reason.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.storage.redaction import without_credentials
from pipelines.tracking.client import client_of, quiet
from pipelines.tracking.errors import access_problem, first_line
from pipelines.tracking.registry import ModelVersion, as_model_version, set_version_tags
from pipelines.tracking.run import OUT_OF_ORDER

_FILTER_AT_MOST = 10_000  # characters
_ARTIFACT_TAGS = ("enat.artifact", "enat.evaluation")  # tags of a version that name an artifact as stage/key


class TrackingError(RuntimeError):
    """A tracking store that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run. started: UTC.   metrics: the newest value of each.   parent_id: the run that it is nested in."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    started: datetime
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def parent_id(self) -> str | None:
        return self.tags.get("mlflow.parentRunId")


def experiments(uri: str) -> dict[str, str]:
    """Name -> id of the experiments that are not deleted.

    Raises ValueError if no store exists at the URI, no server answers, or the server refuses the user; otherwise TrackingError.
    """
    with _reading(uri) as client:
        return {found.name: found.experiment_id for found in _pages(client.search_experiments)}


def search_runs(uri: str, experiment_ids: Sequence[str], filter_string: str = "", *, limit: int | None = None) -> list[TrackedRun]:
    """Runs that are not deleted, newest first. Raises ValueError if MLflow cannot parse the filter."""
    if not experiment_ids:
        return []
    if len(filter_string) > _FILTER_AT_MOST:  # MLflow's parser takes a minute for 100,000 letters
        raise ValueError(f"the filter has {len(filter_string):,} characters; at most {_FILTER_AT_MOST:,} are allowed")
    query = {"experiment_ids": list(experiment_ids), "filter_string": filter_string, "max_results": min(limit or 1000, 1000)}
    with _reading(uri) as client:
        return [_as_run(run) for run in islice(_pages(client.search_runs, **query), limit)]


def read_run(uri: str, run_id: str) -> TrackedRun | None:
    """A run, or None if it does not exist or was deleted."""
    from mlflow.exceptions import MlflowException

    with _reading(uri) as client:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return _as_run(run) if run.info.lifecycle_stage == "active" else None


def read_file(uri: str, run_id: str, name: str, max_bytes: int) -> bytes | None:
    """A file at the top level of a run's files, or None if it does not exist. Raises ValueError if it is larger than max_bytes."""
    with _reading(uri) as client:
        found = next((file for file in client.list_artifacts(run_id) if file.path == name and not file.is_dir), None)
        if found is None:
            return None
        if (found.file_size or 0) > max_bytes:
            raise ValueError(f"{name} of run {run_id} is {found.file_size:,} bytes; at most {max_bytes:,} are read")
        with tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[Any]:
    """A client, whose errors are raised as ValueError or TrackingError with the reason."""
    from mlflow.exceptions import MlflowException

    shown = without_credentials(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"no runs are tracked at {shown}, which does not exist; run a config first, or set another tracking URI")
    try:
        with quiet():
            yield client_of(uri)
    except ValueError:
        raise
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
            raise ValueError(f"MLflow refuses the request to {shown}: {first_line(error)}") from error
        if (problem := access_problem(error)) is not None:
            raise ValueError(f"tracking at {shown} {problem.reason}: {problem.advice}") from error
        raise TrackingError(f"tracking at {shown} cannot be read ({first_line(error)})") from error


def _pages(search: Callable[..., Any], **query: Any) -> Iterator[Any]:
    """The results of all pages of a search."""
    found = search(**query)
    yield from found
    while found.token:
        found = search(**query, page_token=found.token)
        yield from found


def _as_run(run: Any) -> TrackedRun:
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        started=datetime.fromtimestamp((run.info.start_time or 0) / 1000, UTC),
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )


def find_model(uri: str, reference: str) -> dict[str, str]:
    """Tags of a registered version by name@alias, models:/name@alias or models:/name/version.

    Raises ValueError if the version does not exist, and the errors of experiments().
    """
    from mlflow.exceptions import MlflowException

    plain = reference.removeprefix("models:/")
    name, _, which = plain.rpartition("@" if "@" in plain else "/")
    if not name or not which:
        raise ValueError(f"{reference} does not name a registered model; write name@alias or models:/name/version")
    with _reading(uri) as client:
        try:
            version = (client.get_model_version_by_alias if "@" in plain else client.get_model_version)(name, which)
        except MlflowException as error:
            if error.error_code in OUT_OF_ORDER or access_problem(error) is not None:
                raise
            raise ValueError(
                f"the registry at {without_credentials(uri)} has no model {reference} ({first_line(error)})"
            ) from error
    return {str(key): str(value) for key, value in version.tags.items()}


def registered_artifacts(uri: str) -> dict[str, str]:
    """Artifacts of registered versions and of their last evaluations: "stage/key" -> "name version number". The next evaluation is
    compared with the last one. Versions of others have no such tags.

    Raises the errors of experiments().
    """
    with _reading(uri) as client:
        versions = [*_pages(client.search_model_versions, max_results=1000)]
    tagged = [(version.tags.get(tag), version) for version in versions for tag in _ARTIFACT_TAGS]
    return {str(artifact): f"{version.name} version {version.version}" for artifact, version in tagged if artifact}


def versions_at(uri: str, alias: str) -> list[ModelVersion]:
    """The version that an alias points to, of every registered model, ordered by name. Raises the errors of experiments()."""
    with _reading(uri) as client:
        models = _pages(client.search_registered_models, max_results=100)
        chosen = [(model.name, model.aliases[alias]) for model in models if alias in model.aliases]
        return [as_model_version(client.get_model_version(*each)) for each in sorted(chosen)]


def read_version(uri: str, name: str, version: str) -> ModelVersion:
    """The current state of a version. Raises TrackingError if it was deleted, and the errors of experiments()."""
    with _reading(uri) as client:
        return as_model_version(client.get_model_version(name, version))


def tag_version(uri: str, version: ModelVersion, tags: Mapping[str, str | None]) -> None:
    """Set tags of a version. The value None deletes a tag. Raises TrackingError if they cannot be written."""
    with _reading(uri) as client:
        set_version_tags(client, version, tags)
