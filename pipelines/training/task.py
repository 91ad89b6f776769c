"""The task and the result of a training run's workers, and the names of the files that they write."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from enat.config import ENATConfig
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.training.config import TrainConfig
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import WorkerContext

if TYPE_CHECKING:
    from enat.model import ENAT


RAW_WEIGHTS = "raw.safetensors"
HISTORY = "history.json"
SCORES = "scores.json"
_SCORE_PART = re.compile(r"scores-(\d{8,})")


def score_part(step: int) -> str:
    """The name of the record of the scores of a step."""
    return f"scores-{step:08d}"


def read_scores(context: WorkerContext) -> dict[int, dict[str, Any]]:
    """The scores so far, by step."""
    parts = context.store.read_parts(context.stage, context.key).items()
    return {int(match[1]): record for name, record in parts if (match := _SCORE_PART.fullmatch(name))}


class Scoring(Protocol):
    """Computes the scores of the EMA weights of a step, as a part record of the stage."""

    def submit(self, step: int, model: ENAT) -> None: ...

    def finish(self) -> None: ...


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
    scoring: Scoring | None = None


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
