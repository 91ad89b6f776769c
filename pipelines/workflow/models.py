"""What the stages tokenizer and train tell the stages that use a tokenizer or a model."""

from __future__ import annotations

from dataclasses import dataclass

from enat.config import ENATConfig, VQGANConfig
from pipelines.workflow.summary import Summary


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
