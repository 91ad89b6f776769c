"""Datasets, token maps and references of artifacts, as MLflow lists them beside runs and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.redaction import without_credentials
from pipelines.tracking.run import TrackedInput
from pipelines.workflow.summary import SummaryError

if TYPE_CHECKING:
    from pipelines.workflow.stage import Stage

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


def _dataset_name(manifest: Manifest, stages: Mapping[str, Stage]) -> str:
    stage = stages.get(manifest.stage)
    try:
        name = stage.summary.read(manifest).dataset_name if stage is not None else None
    except SummaryError:  # anyone who may write to the store may have written it
        name = None
    return name or "unnamed"
