"""The configuration of training: the model's architecture, the recipe, and its execution on a cluster."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from enat.config import LABEL_SMOOTHING, ENATConfig, MaskingConfig, check_choices, check_in
from enat.sampler_config import SamplerConfig
from enat.training.averages import MAX_LENGTH
from pipelines.cluster.resources import ALL, Workers
from pipelines.data.captions import CaptionFeaturesInfo
from pipelines.data.token_map import TokenMapInfo
from pipelines.storage.external import content_digest
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import set_by, with_key

PRECISIONS = ("fp32", "bf16", "fp16")
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
WEIGHT_DECAYS = ("all", "matrices")
SCORE_METRICS = ("frechet_distance", "sliced_distance")
REMEDIES = ("stop", "rollback")
REDUCTIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset with any field replaced, or all sizes of a model."""

    preset: str | None = None
    """Published size: "enat-s", "enat-b", "enat-l" or "enat-xl", or "nat-s" to "nat-xl" for the plain NAT of the same width and
    depth. Null needs all sizes below."""
    text: bool = False
    """Condition on captions instead of classes. `captions.encoder` must be given."""
    encoder_layers: int | None = None
    """Blocks of the encoder. Null takes the preset's."""
    decoder_layers: int | None = None
    """Blocks of the decoder, at least 1. Null takes the preset's."""
    embed_dim: int | None = None
    """Width of the model, a multiple of num_heads. Null takes the preset's."""
    num_heads: int | None = None
    """Attention heads. Null takes the preset's."""
    grid_size: int | None = None
    """Codes per side of an image. Null takes the token map's; any other value is refused."""
    codebook_size: int | None = None
    """Number of different codes. Null takes the token map's; any other value is refused."""
    num_classes: int | None = None
    """Number of classes. Null takes the token map's; any other value is refused."""
    decoder_attention: str | None = None
    """Attention of the decoder, [queries] <- [keys]: "self_cross" ([M] <- [M] and [V], the paper's), "cross" ([M] <- [V], CrossMAE
    type) or "full" ([M] and [V] <- [M] and [V], MAE type). Null takes the preset's, or self_cross."""
    reuse: bool | None = None
    """Whether features of the step before may be reused (paper sec. 4.2). Null takes the preset's, or true."""
    reused_features: str | None = None
    """Which features are reused: "visible" (the paper's), "masked" or "all". Null takes visible."""
    qk_norm: bool | None = None
    """LayerNorm of queries and keys in every head, for stability in half precision. Null takes false."""
    dropout: float | None = None
    """Dropout of the embedded tokens, in [0, 1). Null takes 0.1."""
    mlp_ratio: int | None = None
    """Width of the MLPs as a multiple of embed_dim. Null takes 4."""

    def architecture(self, token_map: TokenMapInfo, captions: CaptionFeaturesInfo | None = None) -> ENATConfig:
        """The architecture for a token map. Raises ValueError if the config does not fit the token map or the captions."""
        values = dataclasses.asdict(self)
        given = {name: value for name, value in values.items() if value is not None and name not in ("preset", "text")}
        known = {name: getattr(token_map, name) for name in ("grid_size", "codebook_size")}
        known["num_classes"] = 0 if self.text else token_map.num_classes
        for name, value in known.items():
            if given.setdefault(name, value) != value:
                owner = f"the token map of {token_map.dataset} ({token_map.resolution} px)"
                has = "a text model has no classes" if self.text and name == "num_classes" else f"{owner} has {value}"
                raise ValueError(f"train.model.{name} is {given[name]}, but {has}")
        if self.text:
            given |= self._text_sizes(token_map, captions)
        missing = [name for name in ("encoder_layers", "decoder_layers", "embed_dim", "num_heads") if name not in given]
        if missing and self.preset is None:
            raise ValueError(f"train.model has no preset, so it must contain {', '.join(missing)}")
        try:
            return ENATConfig(**given) if self.preset is None else ENATConfig.preset(self.preset, **given)
        except ValueError as error:
            raise ValueError(with_key("train.model", ModelConfig, str(error))) from error

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
    """How training runs on a cluster. Except for rounding, the weights do not depend on it."""

    min_workers: int | None = None
    """Fewest workers of elastic training, which uses between min_workers and num_workers of them. Null always uses num_workers."""
    resize_seconds: float = 60.0
    """How often Ray checks for room for more workers. After each growth training resumes from the newest checkpoint, so up to
    checkpoint_every steps are computed again. Unit: seconds."""
    zero_stage: int | None = None
    """ZeRO stage of DeepSpeed, 0 to 3: the optimizer state (1), gradients (2) and weights (3) are sharded over workers. Null
    chooses the lowest one whose state takes at most 40% of a device's memory; the log of the run states it."""
    reduce_in: str = "fp32"
    """Number format in which gradients are summed over workers: "fp32", or "bf16" for half of the traffic."""
    microbatches: int = 1
    """Passes that a group is computed in, for devices whose memory is too small for one pass."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile every block with torch.compile: a slower start, faster steps. Not available with zero_stage 3."""
    checkpoint_every: int = 1000
    """Interval of checkpoints. Unit: steps."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of these multiples are kept, and their EMA weights stay in the artifact. A multiple of checkpoint_every. Null
    keeps none. Unit: steps."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths of further averages of the weights, such as [0.05, 0.1] (Karras et al. 2024), in (0, 0.2886]. They are kept
    at the steps of keep_every and at the end, and `generate.ema_length` makes an average of any length from them. Each takes the
    memory of the weights on every worker. Empty keeps none."""
    log_every: int = 50
    """Interval of logged metrics. Unit: steps."""
    sample_every: int = 5000
    """Interval of preview samples. Unit: steps."""
    max_failures: int = 3
    """How often lost workers are replaced before the stage fails."""
    on_divergence: str = "stop"
    """What to do if the loss diverges: "stop", or "rollback" to the newest checkpoint and skip the batches that caused it."""
    max_rollbacks: int = 3
    """Most rollbacks of one run."""
    divergence_factor: float = 2.0
    """A mean loss of this many times the lowest so far counts as diverged, above 1. A loss that is not finite always does."""
    peak_tflops: float | None = None
    """Peak of one device, to state its utilization against. Null measures matrix products at the first logged step. Unit: TFLOP/s.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("checkpoint_every", "log_every", "sample_every", "keep_last", "keep_every", "microbatches", "min_workers")
        check_in(self, "[1, inf)", *counts)
        check_in(self, "[0, inf)", "resize_seconds", "max_failures", "max_rollbacks")
        check_in(self, "[0, 3]", "zero_stage")
        check_in(self, "(1, inf)", "divergence_factor")
        check_in(self, "(0, inf)", "peak_tflops")
        check_choices(self, on_divergence=REMEDIES, reduce_in=REDUCTIONS)
        for length in self.ema_lengths:
            if not 0 < length <= MAX_LENGTH:
                raise ValueError(f"ema_lengths has {length:g}; lengths must be above 0 and at most {MAX_LENGTH:.4f}")
        if len(set(self.ema_lengths)) != len(self.ema_lengths):
            raise ValueError(f"ema_lengths {list(self.ema_lengths)} has a length twice; give each once")
        if self.ema_lengths and self.keep_every is None:
            raise ValueError("ema_lengths are kept at the steps of keep_every; set keep_every")
        if self.min_workers is not None and self.num_workers != ALL and self.min_workers > self.count:
            raise ValueError(f"min_workers is {self.min_workers}; it must be at most num_workers, which is {self.num_workers}")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every is {self.keep_every}; it must be a multiple of checkpoint_every, which is {self.checkpoint_every}"
            )
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile does not work with zero_stage 3, which swaps weights under the compiled code; choose one")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores of the EMA weights while training continues, from few samples, against the reference of the run. They are a curve in
    MLflow and in the report, and do not change the weights."""

    every: int = 10_000
    """Interval of scores. The last step always has some. Unit: steps."""
    num_samples: int = 1000
    """Samples for each score, at least 2. They have the same seeds and labels at every step. Unit: images."""
    metrics: tuple[str, ...] = SCORE_METRICS
    """"frechet_distance", and "sliced_distance" (sliced Wasserstein distance), which estimates no covariance."""
    execution: Workers | None = None
    """The actor that computes the scores beside the training; num_workers is 1. Null takes the CPUs and GPUs of one training
    worker. If the cluster has no room for it, the first training worker computes the scores between two steps, and others wait."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "every")
        check_in(self, "[2, inf)", "num_samples")
        if wrong := [name for name in self.metrics if name not in SCORE_METRICS]:
            raise ValueError(f"train.scores.metrics names {wrong[0]!r}; choose from {', '.join(SCORE_METRICS)}")
        if not self.metrics:
            raise ValueError("train.scores.metrics is empty; name at least one metric, or leave train.scores out")
        if self.execution is not None and self.execution.num_workers != 1:
            raise ValueError("train.scores.execution.num_workers must be 1: one actor scores one step after the other")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of a generator. Defaults are the published recipe at 256 px, except for its fp16."""

    weights: str | None = None
    """Published weights to import instead of training: a path, s3://, hf://, https://, or the "sha256:..." under which `enat
    import` keeps them. Null trains a model."""
    s3: S3Config | None = set_by("s3 or buckets")
    """Access to the bucket of `weights`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture of the model."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Masks of training."""
    sampler: SamplerConfig | None = None
    """Sampler of the preview samples, and of the registered model. Null takes generate.sampler."""
    num_steps: int = 500_000
    """Optimizer steps. 0 gives the untrained model. Unit: steps."""
    batch_size: int = 2048
    """Images of one optimizer step, over all workers. Unit: images."""
    num_groups: int = 16
    """Equal groups of a batch, each with its own mask ratio (published: 16 devices of 128 images). Workers take whole groups; more
    workers than groups share the rows of each."""
    learning_rate: float = 4e-4
    """Learning rate of AdamW after the warm-up."""
    learning_rate_schedule: str = "constant"
    """After the warm-up: "constant" (published), or "cosine" down to final_learning_rate at num_steps."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly. Unit: steps."""
    betas: tuple[float, float] = (0.99, 0.99)
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = 0.03
    """Weight decay of AdamW."""
    weight_decay_on: str = "all"
    """Parameters that decay: "all" (published), or "matrices" for linear layers without biases, norms and embeddings."""
    max_grad_norm: float | None = None
    """Largest norm of the whole gradient, above 0. Null does not clip (published)."""
    precision: str = "fp32"
    """Number format of matrix products, by autocast: "fp32", "bf16" or "fp16" (published). Weights, optimizer and EMA stay float32.
    """
    flip: bool = True
    """Take each image or its mirror image, with equal probability."""
    cond_drop_prob: float = 0.235
    """Probability, in [0, 1), that a label or caption is replaced by the null one. 0.235 is the total of the published two drops,
    0.15 in the data and 0.1 in the embedding."""
    label_smoothing: float = LABEL_SMOOTHING
    """Label smoothing of the cross-entropy, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of the squared log-partition, against drifting logits (published: 0)."""
    ema_decay: float = 0.9999
    """Decay of the moving average of weights per step, in [0, 1)."""
    scores: ScoresConfig | None = None
    """Scores while training. Null computes none."""
    seed: int | None = None
    """Seed of initialization, order of batches, masks and dropout. Null takes the run's seed."""
    execution: TrainExecution = field(default_factory=TrainExecution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "batch_size", "num_groups")
        check_in(self, "[0, inf)", "num_steps", "warmup_steps", "learning_rate", "final_learning_rate", "weight_decay", "z_loss")
        check_in(self, "[0, 1)", "cond_drop_prob", "ema_decay", "label_smoothing")
        check_in(self, "(0, inf)", "max_grad_norm")
        schedules = {"learning_rate_schedule": LEARNING_RATE_SCHEDULES, "weight_decay_on": WEIGHT_DECAYS}
        check_choices(self, precision=PRECISIONS, **schedules)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; both must be in [0, 1)")
        if self.batch_size % self.num_groups:
            raise ValueError(f"batch_size is {self.batch_size}; it must be a multiple of num_groups, which is {self.num_groups}")
        microbatches = self.execution.microbatches
        if self.group_size % microbatches:
            raise ValueError(f"execution.microbatches is {microbatches}; it must divide a group of {self.group_size} images")
        if self.execution.num_workers != ALL and self.execution.count > self.most_workers:
            count = self.execution.count
            raise ValueError(
                f"batch_size is {self.batch_size}, but execution.num_workers {count} needs at least {count * microbatches} with "
                f"execution.microbatches {microbatches}, so that each pass has an image"
            )
        if self.precision == "fp16" and self.execution.zero_stage == 0:
            raise ValueError("precision fp16 needs execution.zero_stage 1, 2 or 3, which scale the loss")

    @property
    def most_workers(self) -> int:
        """Workers that each get an image for each of their passes."""
        return self.batch_size // self.execution.microbatches

    @property
    def group_size(self) -> int:
        return self.batch_size // self.num_groups

    def identity(self) -> dict[str, Any]:
        """Without what only shows how training goes: previews and scores do not touch the weights."""
        values = dataclasses.asdict(self)
        if self.weights is not None:
            return {"model": values["model"], "weights": content_digest(self.weights, "train.weights", self.s3)}
        return {name: value for name, value in values.items() if name not in ("execution", "sampler", "scores", "weights", "s3")}

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step in 0..num_steps-1. It rises linearly over the warm-up, whose last step has the full rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        height = (self.learning_rate - self.final_learning_rate) / 2
        return self.final_learning_rate + height * (1 + math.cos(math.pi * progress))
