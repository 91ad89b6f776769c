"""What the driver gives the workers of a training run, what it gets back, and the names of the files that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from enat.config import ENATConfig
from enat.model import ENAT
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.training.config import TrainConfig
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import WorkerContext

WEIGHTS = "model.safetensors"  # the EMA: what samples are made with
RAW_WEIGHTS = "raw.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What the driver gives every worker. captions: features, for a text-conditional model."""

    config: TrainConfig
    architecture: ENATConfig
    context: WorkerContext
    token_map: Manifest
    tokenizer: Manifest
    captions: Manifest | None
    reporter: Reporter


@dataclass(frozen=True)
class TrainResult:
    """What rank 0 answers. files: none where the run was stopped or has failed. milestones: EMA weights of some steps.
    error: what it failed with, where other workers would fail with it again."""

    files: tuple[FileRecord, ...]
    milestones: tuple[FileRecord, ...]
    history: list[dict[str, float]]
    step: int
    skipped_draws: int
    num_restarts: int
    num_rollbacks: int
    error: Exception | None = None


def effective_config(task: TrainTask) -> TrainConfig:
    """The recipe as the model can follow it: one made without reuse never trains on features of an earlier step."""
    if task.architecture.reuse:
        return task.config
    return replace(task.config, masking=replace(task.config.masking, reuse_probability=0.0))


def initial_model(architecture: ENATConfig, seed: int) -> ENAT:
    return ENAT(architecture).initialize(torch.Generator().manual_seed(seed))
