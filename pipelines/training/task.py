"""The task and the result of a training run's workers, and the names of the files that they write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from enat.config import ENATConfig
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.training.config import TrainConfig
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import WorkerContext

if TYPE_CHECKING:
    from enat.model import ENAT


WEIGHTS = "model.safetensors"  # the EMA weights, which generate samples
RAW_WEIGHTS = "raw.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """The task of every worker. `captions`: features, for a text-conditional model."""

    config: TrainConfig
    architecture: ENATConfig
    context: WorkerContext
    token_map: Manifest
    tokenizer: Manifest
    captions: Manifest | None
    reporter: Reporter


@dataclass(frozen=True)
class TrainResult:
    """The result of rank 0. `files`: empty if the run was stopped or has failed. `milestones`: EMA weights of kept steps.

    error: the error of a failed run, if other workers would fail in the same way.
    """

    files: tuple[FileRecord, ...]
    milestones: tuple[FileRecord, ...]
    history: list[dict[str, float]]
    step: int
    skipped_draws: int
    num_restarts: int
    num_rollbacks: int
    error: Exception | None = None


def effective_config(task: TrainTask) -> TrainConfig:
    """The recipe for a task's model: a model without reuse never trains on previous features."""
    if task.architecture.reuse:
        return task.config
    return replace(task.config, masking=replace(task.config.masking, reuse_probability=0.0))


def initial_model(architecture: ENATConfig, seed: int) -> ENAT:
    import torch

    from enat.model import ENAT

    return ENAT(architecture).initialize(torch.Generator().manual_seed(seed))
