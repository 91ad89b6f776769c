"""What every training worker runs: steps, and beside them checkpoints, figures and previews.

Shape legend: B images, L tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from enat.checkpoint import load_vqgan, save_weights
from enat.cost import training_macs
from enat.images import make_grid, png_bytes, to_uint8
from enat.loss import objective, token_accuracy
from enat.model import ENAT, ENATConfig, TextCondition
from enat.sampler import sample
from pipelines.artifacts import FileRecord, Manifest, StoreError
from pipelines.batches import Batches, GroupBatch, rows_of
from pipelines.caption_features import EMPTY_INDEX, CaptionFeatures
from pipelines.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoints,
    is_milestone,
    newest_checkpoint,
    open_checkpoint,
    own_share,
)
from pipelines.engine import Engine, prepare_forward
from pipelines.progress import Reporter
from pipelines.stop_signal import STOP, StopSignal
from pipelines.token_map import TokenMap
from pipelines.train_config import TrainConfig
from pipelines.train_metrics import (
    GroupRecord,
    first_not_finite,
    matmul_peak,
    memory_bytes,
    squared_distance,
    summarize,
    total_macs,
)
from pipelines.workflow import WorkerContext

WEIGHTS = "model.safetensors"  # the EMA: what samples are made with
RAW_WEIGHTS = "raw.safetensors"
HISTORY = "history.json"
_REPORT_SECONDS = 0.2
_PREVIEWS = 20
_ROWS_NAMED = 8


class DivergedError(FloatingPointError):
    """Training has diverged in a step. draws: number of the draw that did it, which a rollback goes past."""

    def __init__(self, message: str, draws: int) -> None:
        super().__init__(message, draws)
        self.draws = draws

    def __str__(self) -> str:
        return str(self.args[0])


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
    """What rank 0 answers. files: none where the run was stopped or has diverged. milestones: EMA weights of some steps."""

    files: tuple[FileRecord, ...]
    milestones: tuple[FileRecord, ...]
    history: list[dict[str, float]]
    step: int
    skipped_draws: int
    num_restarts: int
    num_rollbacks: int
    diverged: DivergedError | None = None


def effective_config(task: TrainTask) -> TrainConfig:
    """The recipe as the model can follow it: one made without reuse never trains on features of an earlier step."""
    if task.architecture.reuse:
        return task.config
    return replace(task.config, masking=replace(task.config.masking, reuse_probability=0.0))


def initial_model(architecture: ENATConfig, seed: int) -> ENAT:
    return ENAT(architecture).initialize(torch.Generator().manual_seed(seed))


def train_loop(task: Mapping[str, TrainTask]) -> TrainResult | None:
    """Ray Train's entry: trains to the end, or to where it is asked to stop, from the newest checkpoint that there is."""
    import ray.train.torch

    trainer = Trainer(task["task"], ray.train.torch.get_device())
    with trainer.background:
        try:
            return trainer.run()
        except DivergedError as error:  # as an answer: what is raised Ray Train takes for a lost worker, and tries the same again
            return trainer.result((), diverged=error)


class Trainer:
    """One rank: its share of the groups, the engine, the EMA, and the record of how it went."""

    def __init__(self, task: TrainTask, device: torch.device) -> None:
        self.task, self.config, self.device = task, effective_config(task), device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is agreed among ranks travels through it
        execution = self.config.execution
        torch.set_num_threads(execution.num_threads)
        self.token_map = TokenMap.open(task.context.store, task.token_map)
        self.captions = CaptionFeatures.open(task.context.store, task.captions) if task.captions is not None else None
        self.signal = StopSignal(task.reporter)
        self.update_ema = get_ema_multi_avg_fn(self.config.ema_decay)
        self.background = ThreadPoolExecutor(1, thread_name_prefix="tracking")  # no server of metrics holds up a step
        self.peak = self._peak()
        self.batches: Batches | None = None

    def run(self) -> TrainResult | None:
        self.start(self._newest())
        execution, last = self.config.execution, self.config.num_steps
        while self.step < last:
            self.train_step()
            raised = self.signal.poll()
            try:
                if self._is_due(execution.log_every) or raised:
                    self.log()
                if raised or (self.step % execution.checkpoint_every == 0 and self.step < last):
                    self.save()
            except DivergedError as error:
                self.roll_back(error)
                continue
            if self._is_due(execution.sample_every):
                self.preview()
            if raised == STOP and self.step < last:
                self.checkpoints.wait()
                return self.result(()) if self.rank == 0 else None
        self.checkpoints.wait()
        return self.store_result()

    # Start and end ---------------------------------------------------------------------------------------------------------------

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Make model, EMA and engine, from a checkpoint where there is one."""
        config, architecture = self.config, self.task.architecture
        assert config.seed is not None
        self.checkpoints = CheckpointWriter(
            self.task.context,
            rank=self.rank,
            world_size=self.world_size,
            attempt=str(_agreed(uuid4().hex[:12])),  # a new one also after a rollback, which may reach a step again
            keep_last=config.execution.keep_last,
            keep_every=config.execution.keep_every,
        )
        self.step, self.skipped_draws, self.num_restarts, self.num_rollbacks = 0, 0, 0, 0
        self.history: list[dict[str, float]] = []
        opened = open_checkpoint(self.task.context.store, self.task.context, checkpoint) if checkpoint else None
        model = ENAT(architecture) if opened else initial_model(architecture, config.seed)
        if self.captions is not None:
            hidden, pooled = map(torch.from_numpy, self.captions.take(np.array([EMPTY_INDEX])))
            model.set_null_caption(hidden[0], pooled[0])
        self.ema = copy.deepcopy(model).to(self.device).eval().requires_grad_(False)
        prepare_forward(self.ema, config, self.device)
        fragments = opened.tensors() if opened else None
        if fragments is not None:
            fragments.fill("weight", model)
            fragments.fill("ema", self.ema)
        if self.batches is not None:
            self.batches.close()
        num_passes = -(-config.num_groups // self.world_size) * config.execution.microbatches
        self.engine = Engine(model, config, self.device, num_passes)
        if opened is not None and fragments is not None:
            state = opened.state
            self.engine.load(fragments, state["num_updates"], state["loss_scale"])
            self.step, self.skipped_draws = state["step"], state["skipped_draws"]
            self.history = state["history"]
            self.num_restarts, self.num_rollbacks = state["num_restarts"] + 1, state["num_rollbacks"]
        self._begin_batches()
        self.record = GroupRecord(config.num_groups)
        self.interval = _Interval(self.step)

    def roll_back(self, error: DivergedError) -> None:
        """Go back to the newest checkpoint and on with the draws after the one that training diverged at, or raise."""
        execution = self.config.execution
        if execution.on_divergence != "rollback" or self.num_rollbacks >= execution.max_rollbacks:
            raise error
        num_restarts, num_rollbacks = self.num_restarts, self.num_rollbacks + 1
        self.checkpoints.wait()
        dist.barrier()  # a checkpoint is there once all ranks have written it
        del self.engine, self.ema  # there may be no room for two
        self.start(self._newest())
        self.num_restarts, self.num_rollbacks = num_restarts, num_rollbacks
        self.skipped_draws = error.draws + 1 - self.step
        self._begin_batches()
        self._tell(f"{error}; going on from step {self.step} with the draws after it")

    def store_result(self) -> TrainResult | None:
        context, weights = self.task.context, self.engine.weights()
        if self.rank:
            return None
        files = (
            context.write(WEIGHTS, lambda path: save_weights(path, self.ema)),
            context.write(RAW_WEIGHTS, lambda path: save_weights(path, self.engine.model, weights)),
        )
        return self.result(files, milestones=tuple(self._milestones()))

    def result(
        self,
        files: tuple[FileRecord, ...],
        *,
        milestones: tuple[FileRecord, ...] = (),
        diverged: DivergedError | None = None,
    ) -> TrainResult:
        return TrainResult(
            files=files,
            milestones=milestones,
            history=self.history,
            step=self.step,
            skipped_draws=self.skipped_draws,
            num_restarts=self.num_restarts,
            num_rollbacks=self.num_rollbacks,
            diverged=diverged,
        )

    def _milestones(self) -> Iterator[FileRecord]:
        """EMA weights from the checkpoints that were kept for good, as files of their own. Rank 0."""
        context, keep_every = self.task.context, self.config.execution.keep_every
        kept = {found.step: found for found in find_checkpoints(context) if found.is_whole and is_milestone(found.step, keep_every)}
        for step, checkpoint in sorted(kept.items()):
            try:
                fragments = open_checkpoint(context.store, context, checkpoint).tensors()
            except StoreError as error:
                self._tell(f"the weights of step {step} are not kept: {error}")
                continue
            model = ENAT(self.task.architecture)
            model.load_state_dict(self.ema.state_dict())  # for what is no parameter
            fragments.fill("ema", model)
            name = f"model-step-{step:08d}.safetensors"
            yield context.write(name, partial(save_weights, module=model))

    def _newest(self) -> Checkpoint | None:
        """What rank 0 found whole, for all ranks."""
        found = newest_checkpoint(self.task.context, self._tell) if self.rank == 0 else None
        agreed = _agreed(found)
        assert agreed is None or isinstance(agreed, Checkpoint)
        return agreed

    def _begin_batches(self) -> None:
        if self.batches is not None:
            self.batches.close()
        first = self.step + self.skipped_draws
        self.batches = Batches(
            self.config,
            self.token_map,
            self.captions,
            step=first,
            rank=self.rank,
            world_size=self.world_size,
            pin=self.device.type == "cuda",
        )

    # A step ----------------------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """One global step: this rank's groups, the update, the EMA. Nothing in it waits for the device."""
        assert self.batches is not None
        learning_rate = self.config.learning_rate_at(self.step)
        # DeepSpeed takes the mean over passes and ranks; what is wanted is the mean over groups.
        scale = self.batches.per_step * self.world_size / self.config.num_groups
        for batch in self.batches.take_step():
            self._learn(batch.to(self.device), scale * batch.weight, learning_rate)
        with torch.no_grad():
            averaged = dict(self.ema.named_parameters())
            for names, parameters in self.engine.pieces() if self.engine.zero_stage == 3 else [_all_of(self.engine.model)]:
                with self.engine.whole(parameters):
                    self.update_ema([averaged[name] for name in names], parameters, self.step + 1)
        self.step += 1
        self._report()

    def _learn(self, batch: GroupBatch, scale: float, learning_rate: float) -> None:
        count, measured = self.config.execution.microbatches, []
        for codes, condition, masked, dropout_mask in batch.parts(count, self.ema):
            loss, output = objective(
                self.engine,  # type: ignore[arg-type]
                self.ema,
                codes,
                condition,
                masked,
                dropout_mask=dropout_mask,
                label_smoothing=self.config.label_smoothing,
                z_loss=self.config.z_loss,
            )
            self.engine.backward(loss * scale, learning_rate)
            measured.append(torch.stack([loss.detach(), token_accuracy(output, codes)]))
        if batch.weight:
            masked = batch.masked
            macs = training_macs(self.task.architecture, masked.num_masked, masked.previous_num_masked if batch.is_reuse else None)
            self.record.add(
                self.step,
                batch.group,
                torch.stack(measured).mean(dim=0) if count > 1 else measured[0],
                mask_ratio=batch.mask_ratio,
                is_reuse=batch.is_reuse,
                macs=float(macs * len(batch.codes)),
            )

    # Beside the steps ------------------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Means since the last time, to the history and (rank 0) to tracking. Raises DivergedError."""
        interval = self.interval
        num_steps = self.step - interval.first_step
        if not num_steps:
            return
        assert self.batches is not None
        values = self.record.collect(interval.first_step, num_steps, self.device)
        now, (difference, weights) = time.perf_counter(), self._ema_distance()
        self.interval = _Interval(self.step, self.batches.seconds_waited, self.checkpoints.seconds_waited)
        row: dict[str, float] = {"step": self.step, **summarize(values)}
        row["gradient_norm"] = self.engine.gradient_norm()
        self._check(values, row)
        seconds = now - interval.started
        flops = 2 * total_macs(values) / seconds
        row |= {
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "images_per_second": num_steps * self.config.batch_size / seconds,
            "step_seconds": seconds / num_steps,
            "model_tflops_per_second": flops / 1e12,
            "model_flops_utilization": flops / (self.peak * self.world_size),
            "data_wait_share": (self.batches.seconds_waited - interval.data_wait) / seconds,
            "checkpoint_wait_share": (self.checkpoints.seconds_waited - interval.checkpoint_wait) / seconds,
            "memory_gb": memory_bytes(self.device) / 1e9,
            "ema_distance": math.sqrt(difference / weights),
            "num_workers": self.world_size,
        }
        if self.config.precision == "fp16":
            row["loss_scale"] = self.engine.loss_scale
        self.history.append({name: value for name, value in row.items() if math.isfinite(value)})
        self._track(lambda run, step=self.step: run.log_metrics({k: v for k, v in row.items() if k != "step"}, step))

    def save(self) -> None:
        """Begin a checkpoint of this step, unless training has diverged."""
        self.log()
        tensors = dict(self.engine.fragments()) | dict(own_share("ema", self.ema, self.rank, self.world_size))
        state = {
            "step": self.step,
            "skipped_draws": self.skipped_draws,
            "num_updates": self.engine.num_updates,
            "loss_scale": self.engine.loss_scale,
            "num_restarts": self.num_restarts,
            "num_rollbacks": self.num_rollbacks,
            "history": self.history,
        }
        self.checkpoints.save(self.step, tensors, state)

    def preview(self) -> None:
        """A sample grid of fixed seeds, two images of each of the first ten classes or some captions, from rank 0 to tracking."""
        if self.rank:
            return
        vqgan = load_vqgan(self.task.context.store.fetch(self.task.tokenizer, "vqgan.safetensors")).to(self.device)
        condition = self._preview_condition()
        count = len(condition.pooled if isinstance(condition, TextCondition) else condition)
        codes = sample(self.ema, condition, self.config.sampler, seeds=range(count))
        side = self.ema.config.grid_size
        images = to_uint8(vqgan.decode(codes.view(-1, side, side)))
        grid = png_bytes(make_grid(images, columns=count // 2, scale=max(1, 64 // images.shape[-1])))
        self._track(lambda run, name=f"samples/step-{self.step:08d}.png": run.log_bytes(grid, name))

    def _preview_condition(self) -> torch.Tensor | TextCondition:
        if self.captions is None:
            return torch.arange(min(_PREVIEWS // 2, max(1, self.ema.config.num_classes))).repeat(2)
        numbers = np.arange(_PREVIEWS) * len(self.captions) // _PREVIEWS
        return TextCondition(*(torch.from_numpy(array).to(self.device) for array in self.captions.take(numbers)))

    def _check(self, values: Any, row: Mapping[str, float]) -> None:
        """Raises DivergedError, on all ranks alike, so that no such model is saved."""
        first_step = self.step - len(values)
        reason, bad = "", first_not_finite(values)
        if bad is not None:
            reason = f"the loss of step {first_step + bad[0] + 1} is not finite"
        elif not math.isfinite(row["gradient_norm"]) and not self.engine.is_overflow_of_scale():
            bad, reason = (len(values) - 1, []), f"the gradient of step {self.step} is not finite"
        else:
            lowest = min((past["loss"] for past in self.history), default=math.inf)
            if row["loss"] > self.config.execution.divergence_factor * lowest:
                bad = (len(values) - 1, [])
                reason = f"the mean loss of steps {first_step + 1} to {self.step} is {row['loss']:.3g}, after {lowest:.3g}"
        if bad is None:
            return
        draws = first_step + bad[0] + self.skipped_draws
        groups = bad[1] or range(self.config.num_groups)
        named = "; ".join(f"group {group}: {_rows(rows_of(self.config, self.token_map, draws, group))}" for group in groups[:2])
        raise DivergedError(
            f"training diverged by step {self.step}: {reason} (batch {draws}, rows of the token map in {named}); nothing was saved "
            "since the last checkpoint. Lower train.learning_rate, lengthen train.warm_up_steps, clip with train.gradient_clip, or "
            "go past such batches with train.execution.on_divergence=rollback",
            draws,
        )

    def _ema_distance(self) -> tuple[float, float]:
        averaged = dict(self.ema.named_parameters())
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for names, parameters in self.engine.pieces():
            with torch.no_grad(), self.engine.whole(parameters):
                sums += squared_distance([averaged[name] for name in names], parameters)
        difference, weights = sums.tolist()
        return difference, weights

    def _peak(self) -> float:
        stated = self.config.execution.peak_tflops
        if stated is not None:
            return stated * 1e12
        return matmul_peak(
            self.device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        )

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.num_steps

    def _track(self, action: Any) -> None:
        if self.rank == 0:
            self.background.submit(action, self.task.context.run)

    def _tell(self, message: str) -> None:
        if self.rank == 0:
            self.task.reporter.tell(message)

    def _report(self) -> None:
        now = time.monotonic()
        if self.rank == 0 and (now - self.interval.last_report > _REPORT_SECONDS or self.step == self.config.num_steps):
            self.interval.last_report = now
            last = self.history[-1] if self.history else None
            note = f"loss {last['loss']:.3f}, {last['images_per_second']:.0f} images/s" if last else ""
            self.task.reporter.report(self.step, note)


@dataclass
class _Interval:
    """Since when the next row of figures counts."""

    first_step: int
    data_wait: float = 0.0
    checkpoint_wait: float = 0.0
    last_report: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()


def _all_of(model: ENAT) -> tuple[list[str], list[torch.nn.Parameter]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return list(names), list(parameters)


def _agreed(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _rows(rows: Any) -> str:
    named = ", ".join(map(str, rows[:_ROWS_NAMED].tolist()))
    return named + (f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else "")
