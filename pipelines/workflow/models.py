"""What the stages tokenizer and train tell the stages that use a tokenizer or a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from enat.config import ENATConfig, VQGANConfig
from enat.training.averages import Average
from pipelines.artifacts.manifest import Manifest
from pipelines.workflow.summary import Summary

_AVERAGE = re.compile(r"average-([0-9.e-]+)-step-(\d+)\.safetensors")
_MILESTONE = re.compile(r"model-step-(\d+)\.safetensors")
WEIGHTS = "model.safetensors"  # of a trained model: the EMA weights, which generate samples


@dataclass(frozen=True, kw_only=True)
class TokenizerSummary(Summary):
    """config: the architecture.   is_imported: the weights were published elsewhere."""

    config: VQGANConfig
    is_imported: bool


@dataclass(frozen=True, kw_only=True)
class ModelSummary(Summary):
    """model: the architecture.   parameters: how many.   dataset: that it was trained on; "imported" for published weights.

    skipped_draws, num_restarts, num_rollbacks: how the training went; see TrainResult.
    """

    model: ENATConfig
    parameters: int
    tokenizer_digest: str
    num_steps: int
    dataset: str
    is_imported: bool
    skipped_draws: int = 0
    num_restarts: int = 0
    num_rollbacks: int = 0


def milestone_name(step: int) -> str:
    """The file of the EMA weights of a step before the last one."""
    return f"model-step-{step:08d}.safetensors"


def milestones_of(model: Manifest) -> list[int]:
    """The steps before the last one whose EMA weights a training kept."""
    found = (_MILESTONE.fullmatch(record.name) for record in model.records)
    return sorted(int(match[1]) for match in found if match is not None)


def average_name(length: float, step: int) -> str:
    """The file of an average of weights (enat.training.averages) of a relative length, as it was after a step."""
    return f"average-{length:g}-step-{step:08d}.safetensors"


def averages_of(model: Manifest) -> dict[Average, str]:
    """The averages of weights that a training kept, with their files, by step and length."""
    found = {
        Average(int(match[2]), float(match[1])): record.name
        for record in model.records
        if (match := _AVERAGE.fullmatch(record.name)) is not None
    }
    return dict(sorted(found.items(), key=lambda each: (each[0].step, each[0].length)))


def weights_of_step(model: Manifest, step: int | None, key: str = "generate.checkpoint") -> str:
    """The file of a trained model with the EMA weights of a step; None for the last one. key: that asks for the step.

    Raises ValueError for a step whose weights were not kept.
    """
    last = ModelSummary.read(model).num_steps
    if step is None or step == last:
        return WEIGHTS
    name = milestone_name(step)
    if name not in (kept := {record.name: record for record in model.records}):
        steps = [str(int(each.partition("step-")[2].partition(".")[0])) for each in sorted(kept) if each.startswith("model-step-")]
        raise ValueError(
            f"{key} is {step}, but train/{model.key[:12]} has the weights of steps {', '.join([*steps, str(last)])} "
            "only. Give one of these, or train again with a train.execution.keep_every that keeps it"
        )
    return name
