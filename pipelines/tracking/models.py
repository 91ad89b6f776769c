"""Models as MLflow lists them beside runs: one for each checkpoint of a training, found by its artifact and step.

Servers before MLflow 3 have no such models. They are left out there, which a debug line states.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.tracking.errors import first_line, is_away

_log = logging.getLogger(__name__)
_TYPE = "ENAT"
_VERSIONS = "mlflow.modelVersions"  # a tag
_ILLEGAL = re.compile(r"[/:.%\"']")  # in names of models
ARTIFACT_TAG, STEP_TAG = "enat.artifact", "enat.step"  # identify a model


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of a training. artifact: stage/key.   step: after which they were taken."""

    artifact: str
    step: int

    @property
    def tags(self) -> dict[str, str]:
        return {ARTIFACT_TAG: self.artifact, STEP_TAG: str(self.step)}


@dataclass(frozen=True, kw_only=True)
class TrackedModel:
    """A checkpoint as it is listed. name: any; it is made legal.   scores: measured while it was trained."""

    checkpoint: Checkpoint
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def find(client: Any, experiment: str, checkpoint: Checkpoint) -> Any | None:
    """The model of a checkpoint, or None."""
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in checkpoint.tags.items())
    found = client.search_logged_models([experiment], wanted, max_results=1)
    return found[0] if found else None


def make(client: Any, experiment: str, run_id: str, model: TrackedModel) -> Any:
    """Create a model as an output of a run. Its weights are in the store, not in MLflow."""
    from mlflow.entities import LoggedModelOutput

    made = client.create_logged_model(
        experiment,
        _ILLEGAL.sub("_", model.name),
        run_id,
        tags={**model.tags, **model.checkpoint.tags},
        params={name: str(value) for name, value in model.params.items()},
        model_type=_TYPE,
    )
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, model.checkpoint.step)])
    return made


def name_version(client: Any, run_id: str, checkpoint: Checkpoint, name: str, version: str) -> None:
    """Let a model name the version of a registered model that has its weights, as MLflow does for models that it stores."""
    model = find(client, client.get_run(run_id).info.experiment_id, checkpoint)
    if model is not None and _VERSIONS not in model.tags:
        client.set_logged_model_tags(model.model_id, {_VERSIONS: json.dumps([{"name": name, "version": version}])})


def unless_old(action: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An action that does nothing at a server which has no models. If a server refuses a model, a warning says so, and the run
    continues."""

    def act(client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return action(client)
        except (MlflowException, NotImplementedError) as error:
            if is_away(error):
                raise
            is_old = isinstance(error, NotImplementedError) or error.error_code == "ENDPOINT_NOT_FOUND"
            level = logging.DEBUG if is_old else logging.WARNING
            _log.log(level, "a model is not listed beside runs: the tracking server does not take it (%s)", first_line(error))
            return None

    return act
