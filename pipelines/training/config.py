"""The configuration of training: the model's architecture, the recipe, and its execution on a cluster."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from enat.config import LABEL_SMOOTHING, ENATConfig, MaskingConfig
from enat.sampler_config import SamplerConfig
from pipelines.cluster.resources import Workers
from pipelines.data.captions import CaptionFeaturesInfo
from pipelines.data.token_map import TokenMapInfo
from pipelines.storage.external import content_digest
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import set_by

PRECISIONS = ("fp32", "bf16", "fp16")
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
WEIGHT_DECAYS = ("all", "matrices")
REMEDIES = ("stop", "rollback")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset with any field replaced, or all of a model's sizes. What is left out of grid_size, codebook_size and num_classes
    is the token map's; what is given must equal it.

    text: condition on captions in place of classes; widths are those of the caption features.
    """

    preset: str | None = None
    text: bool = False
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    grid_size: int | None = None
    codebook_size: int | None = None
    num_classes: int | None = None
    decoder_attention: str | None = None
    reuse: bool | None = None
    reused_features: str | None = None
    qk_norm: bool | None = None
    dropout: float | None = None
    mlp_ratio: int | None = None

    def architecture(self, token_map: TokenMapInfo, captions: CaptionFeaturesInfo | None = None) -> ENATConfig:
        """The architecture for a token map. Raises ValueError if the config does not fit the token map or the captions."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        given = {name: value for name, value in values.items() if name not in ("preset", "text")}
        known = {name: getattr(token_map, name) for name in ("grid_size", "codebook_size")}
        known["num_classes"] = 0 if self.text else token_map.num_classes
        for name, value in known.items():
            if given.setdefault(name, value) != value:
                owner = f"the token map of {token_map.dataset} ({token_map.resolution} px)"
                has = "a text model has no classes" if self.text and name == "num_classes" else f"{owner} has {value}"
                raise ValueError(f"train.model.{name} is {given[name]}, but {has}")
        if self.text:
            given |= self._text_sizes(token_map, captions)
        if self.preset is not None:
            return ENATConfig.preset(self.preset, **given)
        missing = [name for name in ("encoder_layers", "decoder_layers", "embed_dim", "num_heads") if name not in given]
        if missing:
            raise ValueError(f"train.model has no preset, so it must contain {', '.join(missing)}")
        return ENATConfig(**given)

    def _text_sizes(self, token_map: TokenMapInfo, captions: CaptionFeaturesInfo | None) -> dict[str, int]:
        if captions is None:
            raise ValueError("train.model.text requires caption features; set captions.encoder")
        if token_map.num_captions != captions.num_captions:
            raise ValueError(
                f"the token map of {token_map.dataset} has {token_map.num_captions} captions, but there are features of "
                f"{captions.num_captions} captions; make both from the same dataset"
            )
        return {"text_width": captions.width, "num_text_tokens": captions.num_positions}


@dataclass(frozen=True, kw_only=True)
class TrainExecution(Workers):
    """How training runs; what comes out of it does not depend on it but for rounding. Intervals are in steps.

    min_workers: elastic from there to num_workers, by what the cluster has; None for always num_workers.
    resize_seconds: how often Ray looks whether there is room for more of them. With each growth training goes on from the newest
    checkpoint, so that up to checkpoint_every steps are computed again.
    zero_stage: of DeepSpeed, 0 to 3: what of optimizer state (1), gradients (2) and weights (3) is shared out among workers; one
    worker alone has all of it.
    microbatches: passes that a group is computed in, for devices on which it does not fit in one.
    activation_checkpointing, compile: memory for time, and start-up time for speed (torch.compile of every block).
    keep_last, keep_every: checkpoints that are kept: the newest ones, and those whose step is a multiple, whose EMA weights also
    stay in the artifact (None for none).
    max_failures: how often lost workers are replaced before the stage fails.
    on_divergence: "stop", or "rollback" to the newest checkpoint and past the batches that did it, at most max_rollbacks times.
    divergence_factor: a mean loss this many times the lowest so far counts as diverged, as one that is not finite does.
    peak_tflops: of one device, what its utilisation is stated against; None measures matrix products at the first row.
    """

    min_workers: int | None = None
    resize_seconds: float = 60.0
    zero_stage: int = 1
    microbatches: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    log_every: int = 50
    sample_every: int = 5000
    max_failures: int = 3
    on_divergence: str = "stop"
    max_rollbacks: int = 3
    divergence_factor: float = 2.0
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoint_every", "log_every", "sample_every", "keep_last", "keep_every", "microbatches", "min_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.execution.{name} is {value}; it must be at least 1")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"train.execution.min_workers is {self.min_workers}, more than num_workers, which is {self.num_workers}"
            )
        if not 0 <= self.resize_seconds < math.inf:
            raise ValueError(f"train.execution.resize_seconds is {self.resize_seconds}; it must be finite and at least 0")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(f"train.execution.keep_every is {self.keep_every}; it must be a multiple of checkpoint_every")
        if self.zero_stage not in range(4):
            raise ValueError(f"train.execution.zero_stage is {self.zero_stage}; DeepSpeed has 0, 1, 2 and 3")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("train.execution.compile does not go with zero_stage 3, which swaps weights under the compiled code")
        if self.on_divergence not in REMEDIES:
            raise ValueError(f"train.execution.on_divergence is {self.on_divergence!r}; choose one of {', '.join(REMEDIES)}")
        if self.divergence_factor <= 1:
            raise ValueError(f"train.execution.divergence_factor is {self.divergence_factor}; it must be above 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are the published recipe at 256 px but for its fp16; num_steps 0 gives the untrained model.

    masking: of a model without reuse, reuse_probability counts as 0.
    batch_size: of the whole step, in num_groups equal groups (published: 16 devices of 128).
    learning_rate_schedule: after the warm-up "constant" (published), or "cosine" down to final_learning_rate at num_steps.
    gradient_clip: largest norm of the whole gradient; None does not clip (published).
    precision: of matrix products, by autocast; weights, optimizer and EMA stay float32. Published: fp16.
    weight_decay_on: "all" (published), or "matrices" for linear layers alone: no biases, norms, embeddings.
    flip: whether half of the images are taken as their mirror image.
    label_dropout: of labels or captions. 0.235 is what the published two drops, 0.15 in the data and 0.1 in the embedding,
    amount to.
    z_loss: weight of the squared log-partition, against drifting logits; published: none.
    weights: published weights to take instead of training: a file by path, s3:// or hf://, or the "sha256:..." under which
    `enat import` keeps one.
    """

    weights: str | None = None
    s3: S3Config | None = set_by("s3 or buckets")
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    num_steps: int = 500_000
    batch_size: int = 2048
    num_groups: int = 16
    learning_rate: float = 4e-4
    learning_rate_schedule: str = "constant"
    final_learning_rate: float = 0.0
    warm_up_steps: int = 5000
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: float = 0.03
    weight_decay_on: str = "all"
    gradient_clip: float | None = None
    precision: str = "fp32"
    flip: bool = True
    label_dropout: float = 0.235
    label_smoothing: float = LABEL_SMOOTHING
    z_loss: float = 0.0
    ema_decay: float = 0.9999
    seed: int | None = None
    execution: TrainExecution = field(default_factory=TrainExecution)

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.batch_size < 1 or self.num_groups < 1 or self.warm_up_steps < 0:
            raise ValueError("train.num_steps and warm_up_steps must be at least 0, batch_size and num_groups at least 1")
        if self.batch_size % self.num_groups:
            raise ValueError(f"train.batch_size {self.batch_size} cannot be cut into {self.num_groups} equal groups")
        if self.group_size % self.execution.microbatches:
            raise ValueError(
                f"a group of {self.group_size} images cannot be cut into train.execution.microbatches {self.execution.microbatches}"
            )
        if self.num_groups < self.execution.num_workers:
            raise ValueError(
                f"train.num_groups {self.num_groups} cannot be shared by {self.execution.num_workers} workers; "
                "each takes whole groups"
            )
        for name in ("label_dropout", "ema_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be finite and at least 0")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"train.gradient_clip is {self.gradient_clip}; it must be above 0, or left out")
        for name, known in (
            ("precision", PRECISIONS),
            ("learning_rate_schedule", LEARNING_RATE_SCHEDULES),
            ("weight_decay_on", WEIGHT_DECAYS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.precision == "fp16" and self.execution.zero_stage == 0:
            raise ValueError("train.precision fp16 needs train.execution.zero_stage 1, 2 or 3, which scale the loss")

    @property
    def group_size(self) -> int:
        return self.batch_size // self.num_groups

    def identity(self) -> dict[str, Any]:
        """Without what only shows how training goes: previews do not touch the weights."""
        values = dataclasses.asdict(self)
        if self.weights is not None:
            return {"model": values["model"], "weights": content_digest(self.weights, "train.weights", self.s3)}
        return {name: value for name, value in values.items() if name not in ("execution", "sampler", "weights", "s3")}

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step in 0..num_steps-1. It rises linearly over the warm-up, whose last step has the full rate."""
        if step < self.warm_up_steps:
            return self.learning_rate * (step + 1) / self.warm_up_steps
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warm_up_steps) / max(1, self.num_steps - self.warm_up_steps)
        height = (self.learning_rate - self.final_learning_rate) / 2
        return self.final_learning_rate + height * (1 + math.cos(math.pi * progress))
