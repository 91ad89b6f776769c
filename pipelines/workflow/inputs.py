"""Datasets, token maps, references and checkpoints of artifacts, as MLflow lists them beside runs and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.redaction import without_credentials
from pipelines.tracking.models import Checkpoint
from pipelines.tracking.run import TrackedInput
from pipelines.workflow.models import ModelSummary
from pipelines.workflow.summary import SummaryError

if TYPE_CHECKING:
    from pipelines.workflow.stage import Stage

_OF_WEIGHTS = ("checkpoint", "ema_length")  # keys of stage generate
_DATA = ("dataset", "token_map", "captions", "reference")  # stages, in the order in which they are listed


def tracked_inputs(store: ArtifactStore, stages: Mapping[str, Stage], manifests: Iterable[Manifest]) -> list[TrackedInput]:
    """Those of the artifacts that are data, each once. Other artifacts, such as models, are left out."""
    found = {manifest.digest: manifest for manifest in manifests if manifest.stage in _DATA}
    return [
        TrackedInput(
            name=f"{_dataset_name(manifest, stages)}{'' if manifest.stage == 'dataset' else f' {manifest.stage}'}",
            digest=manifest.digest,
            source=without_credentials(store.place(manifest.stage, manifest.key)),
            context=manifest.stage,
        )
        for manifest in sorted(found.values(), key=lambda manifest: _DATA.index(manifest.stage))
    ]


def checkpoint_of(model: Manifest, step: int | None = None) -> Checkpoint | None:
    """The weights of a trained or imported model after a step; None for the last one. None for a manifest that cannot be read."""
    try:
        last = ModelSummary.read(model).num_steps
    except SummaryError:  # anyone who may write to the store may have written it
        return None
    return Checkpoint(artifact=f"{model.stage}/{model.key}", step=last if step is None else step)


def read_checkpoint(config: Any, inputs: Mapping[str, Manifest]) -> Checkpoint | None:
    """The weights of the model that a stage reads, of the step that its config or its samples name.

    None if it reads no model, or an average of several weights.
    """
    settings = inputs["samples"].config if "samples" in inputs else {name: getattr(config, name, None) for name in _OF_WEIGHTS}
    step, average = (settings.get(name) for name in _OF_WEIGHTS)
    if "model" not in inputs or average is not None:
        return None
    return checkpoint_of(inputs["model"], step if isinstance(step, int) else None)


def _dataset_name(manifest: Manifest, stages: Mapping[str, Stage]) -> str:
    stage = stages.get(manifest.stage)
    try:
        name = stage.summary.read(manifest).dataset_name if stage is not None else None
    except SummaryError:  # anyone who may write to the store may have written it
        name = None
    return name or "unnamed"
