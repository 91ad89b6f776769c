"""What every training worker runs.

A global batch is `num_groups` equal groups. Everything that is drawn for a group (rows, flips, label drops, mask ratio, masks,
reuse, dropout) comes from (seed, step, group), and ranks take whole groups: so what is trained on does not depend on the number
of workers, and a resumed run draws what an uninterrupted one would have.

Shape legend: B images of a group, L tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from enat.checkpoint import load_enat, load_vqgan, save_weights
from enat.images import make_grid, png_bytes, to_uint8
from enat.loss import LABEL_SMOOTHING, objective
from enat.masking import MaskingConfig, mask_codes
from enat.model import ENAT, ENATConfig
from enat.sampler import SamplerConfig, sample
from pipelines import engine as deepspeed_engine
from pipelines.artifacts import Manifest
from pipelines.external import content_digest
from pipelines.progress import Reporter
from pipelines.s3 import S3Config
from pipelines.token_map import TokenMap, TokenMapInfo
from pipelines.workflow import WorkerContext, Workers

WEIGHTS = "model.safetensors"  # the EMA: what samples are made with
RAW_WEIGHTS = "raw.safetensors"
HISTORY = "history.json"
_REPORT_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset with any field replaced, or all of a model's sizes. What is left out of grid_size, codebook_size and num_classes
    is the token map's; what is given must equal it."""

    preset: str | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    grid_size: int | None = None
    codebook_size: int | None = None
    num_classes: int | None = None
    decoder_attention: str | None = None
    reuse: bool | None = None
    dropout: float | None = None
    mlp_ratio: int | None = None

    def architecture(self, token_map: TokenMapInfo) -> ENATConfig:
        """Raises ValueError where the model does not fit the token map."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None and name != "preset"}
        for name in ("grid_size", "codebook_size", "num_classes"):
            if given.setdefault(name, getattr(token_map, name)) != getattr(token_map, name):
                raise ValueError(
                    f"train.model.{name} is {given[name]}, but the token map of {token_map.dataset} "
                    f"({token_map.resolution} px) has {getattr(token_map, name)}"
                )
        if self.preset is not None:
            return ENATConfig.preset(self.preset, **given)
        missing = [name for name in ("encoder_layers", "decoder_layers", "embed_dim", "num_heads") if name not in given]
        if missing:
            raise ValueError(f"train.model has no preset, so it must give {', '.join(missing)}")
        return ENATConfig(**given)


@dataclass(frozen=True, kw_only=True)
class TrainExecution(Workers):
    """Intervals are in steps. max_failures: how often lost workers are replaced before the stage fails."""

    checkpoint_every: int = 1000
    log_every: int = 50
    sample_every: int = 5000
    max_failures: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoint_every", "log_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.execution.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are the published recipe at 256 px; num_steps 0 gives the untrained model.

    batch_size: of the whole step, in num_groups equal groups (published: 16 devices of 128).
    flip: whether half of the images are taken as their mirror image.
    label_dropout: 0.235 is what the published two drops, 0.15 in the data and 0.1 in the embedding, amount to.
    weights: published weights to take instead of training: a file by path, s3:// or hf://, or the "sha256:..." under which
    `enat import` keeps one.   s3: None takes the run's.
    """

    weights: str | None = None
    s3: S3Config | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    num_steps: int = 500_000
    batch_size: int = 2048
    num_groups: int = 16
    learning_rate: float = 4e-4
    warm_up_steps: int = 5000
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: float = 0.03
    flip: bool = True
    label_dropout: float = 0.235
    label_smoothing: float = LABEL_SMOOTHING
    ema_decay: float = 0.9999
    seed: int | None = None
    execution: TrainExecution = field(default_factory=TrainExecution)

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.batch_size < 1 or self.num_groups < 1 or self.warm_up_steps < 0:
            raise ValueError("train.num_steps and warm_up_steps must be at least 0, batch_size and num_groups at least 1")
        if self.batch_size % self.num_groups:
            raise ValueError(f"train.batch_size {self.batch_size} cannot be cut into {self.num_groups} equal groups")
        if self.num_groups % self.execution.num_workers:
            raise ValueError(
                f"train.num_groups {self.num_groups} cannot be shared by {self.execution.num_workers} workers; "
                "each takes whole groups"
            )
        for name in ("label_dropout", "ema_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be in [0, 1)")

    def identity(self) -> dict[str, Any]:
        """Without what only shows how training goes: previews do not touch the weights."""
        values = dataclasses.asdict(self)
        if self.weights is not None:
            return {"model": values["model"], "weights": content_digest(self.weights, "train.weights", self.s3)}
        return {name: value for name, value in values.items() if name not in ("execution", "sampler", "weights", "s3")}

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up_steps) if self.warm_up_steps else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What the driver gives every worker."""

    config: TrainConfig
    architecture: ENATConfig
    context: WorkerContext
    token_map: Manifest
    tokenizer: Manifest
    reporter: Reporter
    resume_from: str | None = None  # a checkpoint's folder, where Ray Train does not know of one itself


def initial_model(architecture: ENATConfig, seed: int) -> ENAT:
    return ENAT(architecture).initialize(torch.Generator().manual_seed(seed))


def train_loop(task: Mapping[str, TrainTask]) -> dict[str, Any] | None:
    """Ray Train's entry: trains to the end, resuming where a checkpoint is; rank 0 returns what it stored."""
    import ray.train
    import ray.train.torch

    trainer = Trainer(task["task"], ray.train.torch.get_device())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        resume_from = task["task"].resume_from
        trainer.start(Path(resume_from) if resume_from else None)
    else:
        with checkpoint.as_directory() as folder:
            trainer.start(Path(folder))
    while trainer.step < trainer.config.num_steps:
        trainer.train_step()
        if trainer.is_due(trainer.config.execution.log_every):
            trainer.log()
        if trainer.is_due(trainer.config.execution.sample_every):
            trainer.preview()
        if trainer.step % trainer.config.execution.checkpoint_every == 0 and trainer.step < trainer.config.num_steps:
            trainer.check_finite()
            folder = Path(tempfile.mkdtemp(prefix="enat-checkpoint-"))
            trainer.save(folder)
            ray.train.report(
                {"step": trainer.step},
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=f"step-{trainer.step:08d}",
                delete_local_checkpoint_after_upload=True,
            )
    return trainer.store_result() if trainer.rank == 0 else None


class Trainer:
    """One rank: its share of the groups, the engine, the EMA, and the record of how it went."""

    def __init__(self, task: TrainTask, device: torch.device) -> None:
        self.task, self.config, self.device = task, task.config, device
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(self.config.execution.num_threads)
        per_rank = self.config.num_groups // world_size
        self.groups = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        self.token_map = TokenMap.open(task.context.store, task.token_map)
        self.update_ema = get_ema_multi_avg_fn(self.config.ema_decay)
        self.step = 0
        self.history: list[dict[str, float]] = []
        # Since the last log, on the device: sum of losses, of those in reuse mode, and how many groups of each there were.
        self.sums = torch.zeros(4, device=device)
        self.last_log = (time.monotonic(), 0)
        self.last_report = 0.0

    def start(self, checkpoint: Path | None) -> None:
        """Make model, EMA and engine, from a checkpoint where there is one."""
        assert self.config.seed is not None
        if checkpoint is None:
            model = initial_model(self.task.architecture, self.config.seed)
            self.ema = copy.deepcopy(model)
        else:
            model, self.ema = load_enat(checkpoint / RAW_WEIGHTS), load_enat(checkpoint / WEIGHTS)
        self.ema.to(self.device).eval().requires_grad_(False)
        model.to(self.device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.config.learning_rate, betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        self.engine = deepspeed_engine.make_engine(model, optimizer, len(self.groups))
        if checkpoint is not None:
            state = deepspeed_engine.load_state(checkpoint)
            deepspeed_engine.load_moments(checkpoint, self.engine, state["world_size"])
            self.step, self.history = state["step"], state["history"]
        self.last_log = (time.monotonic(), self.step)

    @property
    def model(self) -> ENAT:
        module = self.engine.module
        assert isinstance(module, ENAT)
        return module

    def train_step(self) -> None:
        """One global step: this rank's groups, the update, the EMA. Nothing in it waits for the device."""
        config, seed = self.config, self.config.seed
        assert seed is not None
        deepspeed_engine.set_learning_rate(self.engine, config.learning_rate_at(self.step))
        batch = self.token_map.batch_rows(seed, self.step, config.batch_size)
        size = config.batch_size // config.num_groups
        for group in self.groups:
            own = slice(group * size, (group + 1) * size)
            rng = np.random.default_rng([seed, self.step, group])
            stored_codes, stored_labels = self.token_map.take(batch.rows[own], batch.flipped[own] & config.flip)
            stored_labels[rng.random(size) < config.label_dropout] = self.model.config.null_label
            codes, labels = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in (stored_codes, stored_labels))
            masked = mask_codes(codes, self.model.config.mask_id, config.masking, rng)
            dropout = torch.Generator(self.device).manual_seed(int(rng.integers(2**63)))
            loss, _ = objective(
                self.engine, self.ema, codes, labels, masked, dropout_generator=dropout, label_smoothing=config.label_smoothing
            )
            self.engine.backward(loss)
            self.engine.step()
            value, is_reuse = loss.detach().float(), masked.previous_tokens is not None
            self.sums[0] += value
            self.sums[2] += 1
            if is_reuse:
                self.sums[1] += value
                self.sums[3] += 1
        with torch.no_grad():
            self.update_ema(list(self.ema.parameters()), list(self.model.parameters()), self.step + 1)
        self.step += 1
        self._report()

    def is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.num_steps

    def log(self) -> None:
        """Means since the last log, to the history and (rank 0) to tracking. Raises where the loss is no longer finite."""
        dist.all_reduce(self.sums)
        total, reuse, count, reuse_count = self.sums.tolist()
        if not count:
            return
        now, since = time.monotonic(), self.last_log
        row = {
            "step": self.step,
            "loss": total / count,
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "gradient_norm": deepspeed_engine.gradient_norm(self.engine),
            "images_per_second": (self.step - since[1]) * self.config.batch_size / (now - since[0]),
        }
        self.check_finite(row["loss"])
        if reuse_count:
            row["reuse_loss"] = reuse / reuse_count
        if count > reuse_count:
            row["fresh_loss"] = (total - reuse) / (count - reuse_count)
        self.history.append(row)
        self.sums.zero_()
        self.last_log = (now, self.step)
        if self.rank == 0:
            self.task.context.run.log_metrics({name: value for name, value in row.items() if name != "step"}, self.step)

    def check_finite(self, loss: float = 0.0) -> None:
        """Raises FloatingPointError where training has diverged, so that no such model is saved."""
        norm = deepspeed_engine.gradient_norm(self.engine)
        if not math.isfinite(loss) or not math.isfinite(norm) or norm < 0:  # DeepSpeed writes -1 for a norm that overflowed
            raise FloatingPointError(
                f"training diverged by step {self.step} (loss {loss}, gradient norm {norm}); nothing was saved since the last "
                "checkpoint. Lower train.learning_rate or lengthen train.warm_up_steps"
            )

    def preview(self) -> None:
        """A sample grid of fixed seeds, two images of each of the first ten classes, from rank 0 to tracking."""
        if self.rank:
            return
        vqgan = load_vqgan(self.task.context.store.fetch(self.task.tokenizer, "vqgan.safetensors")).to(self.device)
        labels = torch.arange(min(10, self.model.config.num_classes)).repeat(2)
        codes = sample(self.ema, labels, self.config.sampler, seeds=range(len(labels)))
        side = self.model.config.grid_size
        images = to_uint8(vqgan.decode(codes.view(-1, side, side)))
        grid = make_grid(images, columns=len(labels) // 2, scale=max(1, 64 // images.shape[-1]))
        self.task.context.run.log_bytes(png_bytes(grid), f"samples/step-{self.step:08d}.png")

    def save(self, folder: Path) -> None:
        """This rank's share of a checkpoint."""
        if self.rank == 0:
            save_weights(folder / RAW_WEIGHTS, self.model)
            save_weights(folder / WEIGHTS, self.ema)
        deepspeed_engine.save_rank_state(folder, self.engine, {"step": self.step, "history": self.history})

    def store_result(self) -> dict[str, Any]:
        context = self.task.context
        files = [
            context.write(WEIGHTS, lambda path: save_weights(path, self.ema)),
            context.write(RAW_WEIGHTS, lambda path: save_weights(path, self.model)),
        ]
        return {"files": files, "history": self.history}

    def _report(self) -> None:
        now = time.monotonic()
        if self.rank == 0 and (now - self.last_report > _REPORT_SECONDS or self.step == self.config.num_steps):
            self.last_report = now
            last = self.history[-1] if self.history else None
            note = f"loss {last['loss']:.3f}, {last['images_per_second']:.0f} images/s" if last else ""
            self.task.reporter.report(self.step, note)
