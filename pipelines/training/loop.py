"""The training loop of every worker: steps, checkpoints, metrics and previews.

Shape legend: B images, L tokens.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from enat.checkpoint import save_weights
from enat.cost import training_macs
from enat.model import ENAT
from enat.training.averages import decay_of, exponent_of
from enat.training.loss import objective, token_accuracy
from pipelines.artifacts.manifest import FileRecord
from pipelines.data.captions import EMPTY_INDEX, CaptionFeatures
from pipelines.data.token_map import TokenMap
from pipelines.formatting import show_count
from pipelines.storage.base import StorageError
from pipelines.training.batches import Batches, GroupBatch, pieces_per_group
from pipelines.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    NoReadableCheckpointError,
    average_kind,
    milestone_weights,
    newest_checkpoint,
    open_checkpoint,
    own_share,
)
from pipelines.training.engine import Engine, prepare_forward
from pipelines.training.monitor import DivergedError, TrainMonitor
from pipelines.training.previews import Previewer
from pipelines.training.stop_signal import CONTINUE, STOP, StopSignal
from pipelines.training.task import (
    RAW_WEIGHTS,
    TrainResult,
    TrainTask,
    effective_config,
    initial_model,
    read_scores,
    score_part,
)
from pipelines.workflow.models import WEIGHTS, average_name

_log = logging.getLogger(__name__)

_REPORT_SECONDS = 0.2


def train_loop(task: Mapping[str, TrainTask]) -> TrainResult | None:
    """Entry point for Ray Train: resume from the newest checkpoint and train to the end or until asked to stop."""
    import ray.train.torch

    with closing(Trainer(task["task"], ray.train.torch.get_device())) as trainer:
        try:
            with task["task"].context.run.system_metrics() if trainer.rank == 0 else nullcontext():
                return trainer.run()
        except (DivergedError, NoReadableCheckpointError) as error:
            return trainer.result(error=error)  # Ray Train would take an exception for a lost worker and retry


class Trainer:
    """One rank of training: its share of the groups, the engine, the EMA, checkpoints and metrics."""

    def __init__(self, task: TrainTask, device: torch.device) -> None:
        self.task, self.config, self.device = task, effective_config(task), device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # collectives of objects use the current device
        execution = self.config.execution
        torch.set_num_threads(execution.num_threads)
        self.token_map = TokenMap.open_shared(task.context.store, task.token_map)
        self.captions = CaptionFeatures.open(task.context.store, task.captions) if task.captions is not None else None
        self.signal = StopSignal(task.reporter)
        self.update_ema = get_ema_multi_avg_fn(self.config.ema_decay)
        self.background = ThreadPoolExecutor(1, thread_name_prefix="tracking")  # a slow tracking server must not delay a step
        self.monitor = TrainMonitor(self.config, self.token_map, device, self.world_size)
        assert self.config.sampler is not None
        self.previewer = Previewer(task.context.store, task.tokenizer, self.config.sampler, self.captions, self._tell)
        self.batches: Batches | None = None
        self.started, self.worker_seconds_before = time.monotonic(), 0.0
        self.step, self.skipped_draws, self.num_restarts, self.num_rollbacks = 0, 0, 0, 0
        self.last_report = 0.0
        self.has_reported_tracking = False

    def run(self) -> TrainResult | None:
        self.start(self._newest())
        if self.monitor.history and self.history_run != self.task.context.run.run_id:  # the rows are in an earlier command's run
            self._track(lambda run, rows=[*self.monitor.history]: run.log_history(rows))
        execution, last, signal = self.config.execution, self.config.num_steps, CONTINUE
        while self.step < last:
            self.train_step()
            signal = max(signal, self.signal.poll())
            try:
                if self._is_logged(self.step) or signal:
                    self.log()
                if signal or (self.step % execution.checkpoint_every == 0 and self.step < last):
                    self.save()
            except DivergedError as error:
                self.roll_back(error)
                continue  # the signal is handled after the next step
            if self._is_due(execution.sample_every):
                self.preview()
            if self.config.scores is not None and self._is_due(self.config.scores.every):
                self.score()
            if signal == STOP and self.step < last:
                self.checkpoints.wait()
                self._finish_scoring()
                return self.result() if self.rank == 0 else None
            signal = CONTINUE
        self.checkpoints.wait()
        self._finish_scoring()
        return self.store_result()

    def close(self) -> None:
        """End the background threads after the remaining metrics have been logged."""
        if self.batches is not None:
            self.batches.close()
        self.background.shutdown()
        self.task.context.run.flush()

    # Start and end ---------------------------------------------------------------------------------------------------------------

    def start(self, checkpoint: Checkpoint | None, diverged: DivergedError | None = None) -> None:
        """Create model, EMA and engine, from a checkpoint if given. `diverged`: skip the draws up to the one that diverged."""
        config, architecture = self.config, self.task.architecture
        assert config.seed is not None
        self.checkpoints = CheckpointWriter(
            self.task.context,
            rank=self.rank,
            world_size=self.world_size,
            attempt=str(_broadcast(uuid4().hex[:12])),  # also new after a rollback, which may reach a step again
            keep_last=config.execution.keep_last,
            keep_every=config.execution.keep_every,
        )
        self.step, self.skipped_draws, self.num_restarts, self.num_rollbacks = 0, 0, 0, 0
        history: list[dict[str, float]] = []
        self.history_run: str | None = None
        opened = open_checkpoint(self.task.context.store, self.task.context, checkpoint) if checkpoint else None
        model = ENAT(architecture) if opened else initial_model(architecture, config.seed)
        if self.captions is not None:
            hidden, pooled = map(torch.from_numpy, self.captions.take(np.array([EMPTY_INDEX])))
            model.set_null_caption(hidden[0], pooled[0])
        self.ema = copy.deepcopy(model).to(self.device).eval().requires_grad_(False)
        prepare_forward(self.ema, config, self.device)
        lengths = config.execution.ema_lengths
        self.averages = {length: copy.deepcopy(model).to(self.device).requires_grad_(False) for length in lengths}
        if opened is not None:
            opened.tensors.fill("weight", model)
            opened.tensors.fill("ema", self.ema)
            for length, average in self.averages.items():
                opened.tensors.fill(average_kind(length), average)
        num_units = config.num_groups * pieces_per_group(config, self.world_size)
        num_passes = -(-num_units // self.world_size) * config.execution.microbatches
        self.engine = Engine(model, config, self.device, num_passes)
        if self.rank == 0:
            self.task.reporter.log(f"training on {show_count(self.world_size, 'worker')} with ZeRO stage {self.engine.zero_stage}")
            self._track(lambda run: run.set_tags({"enat.zero_stage": str(self.engine.zero_stage)}))
        if opened is not None:
            state = opened.state
            self.engine.load(opened.tensors, state)
            self.step, self.skipped_draws, history = state["step"], state["skipped_draws"], state["history"]
            self.history_run = state.get("run_id")  # checkpoints of older versions have none
            self.num_restarts, self.num_rollbacks = state["num_restarts"] + 1, state["num_rollbacks"]
            if diverged is None:  # a rollback discards steps, but their time counts
                self.worker_seconds_before = state.get("worker_seconds", 0.0)
        if diverged is not None:
            self.skipped_draws = diverged.draws + 1 - self.step
        if self.batches is not None:
            self.batches.close()
        first, place = self.step + self.skipped_draws, {"rank": self.rank, "world_size": self.world_size}
        self.batches = Batches(config, self.token_map, self.captions, step=first, **place, pin=self.device.type == "cuda")
        self.monitor.begin(self.step, history)
        if self.rank == 0 and diverged is None:
            self._tell_of_start(is_resumed=opened is not None)
        if self.rank == 0:  # later steps are computed again, after a rollback with other batches
            for step in (step for step in read_scores(self.task.context) if step > self.step):
                self.task.context.store.discard_part(self.task.context.stage, self.task.context.key, score_part(step))

    def _tell_of_start(self, *, is_resumed: bool) -> None:
        """Tell from which step training continues, and which workers were lost before."""
        num_losses, losses = self.task.reporter.take_losses()
        workers = show_count(self.world_size, "worker")
        if losses:
            self._tell(f"training restarts from step {self.step} with {workers}, because {'; '.join(losses)}")
        elif is_resumed:
            self._tell(f"training resumes from step {self.step} with {workers}")
        else:
            return
        tags = {"enat.resumed_from_step": str(self.step), "enat.restarts": str(num_losses)}
        self._track(lambda run: run.set_tags(tags))

    def roll_back(self, error: DivergedError) -> None:
        """Return to the newest checkpoint and continue with the draws after the one that diverged, or raise the error."""
        execution = self.config.execution
        self.checkpoints.wait()  # before raising, too: Ray ends a worker soon after its result
        dist.barrier()  # a checkpoint is complete when all ranks have written it
        if execution.on_divergence != "rollback" or self.num_rollbacks >= execution.max_rollbacks:
            raise error
        num_restarts, num_rollbacks = self.num_restarts, self.num_rollbacks + 1
        del self.engine, self.ema, self.averages  # memory may not hold two
        self.start(self._newest(), error)
        self.num_restarts, self.num_rollbacks = num_restarts, num_rollbacks
        self._tell(f"{error}; training resumes from step {self.step} with the following batches")

    def store_result(self) -> TrainResult | None:
        context, weights = self.task.context, self.engine.weights()
        if self.rank:
            return None
        ema = context.write(WEIGHTS, lambda path: save_weights(path, self.ema))
        raw = context.write(RAW_WEIGHTS, lambda path: save_weights(path, self.engine.model, weights))
        milestones = [*milestone_weights(context, self.ema, self.config.execution, self._tell)]
        last = {average_name(length, self.step): average for length, average in self.averages.items()}
        of_last_step = [context.write(name, partial(save_weights, module=average)) for name, average in last.items()]
        return self.result(ema, raw, milestones=[*milestones, *of_last_step])

    def result(self, *files: FileRecord, milestones: Iterable[FileRecord] = (), error: Exception | None = None) -> TrainResult:
        counts = (self.step, self.skipped_draws, self.num_restarts, self.num_rollbacks)
        return TrainResult(files, tuple(milestones), self.monitor.history, *counts, error)

    def _newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, found by rank 0 for all ranks. If rank 0 fails, all ranks raise its error."""
        found: Checkpoint | Exception | None = None
        if self.rank == 0:
            try:
                found = newest_checkpoint(self.task.context, self._tell)
            except StorageError as error:
                found = error
        found = _broadcast(found)
        if isinstance(found, Exception):
            raise found
        return found

    # A step ----------------------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """One global step: this rank's groups, the update, the EMA. Does not wait for the device."""
        assert self.batches is not None
        learning_rate = self.config.learning_rate_at(self.step)
        # DeepSpeed takes the mean over passes and ranks; the recipe asks for the mean over groups, or equal pieces of them.
        scale = self.batches.per_step * self.world_size / self.batches.num_units
        self.engine.measures_norm = self._is_logged(self.step + 1)
        for batch in self.batches.take_step():
            self._learn(batch.to(self.device), scale * batch.weight, learning_rate)
        with torch.no_grad():
            averages = [(self.update_ema, dict(self.ema.named_parameters()))]
            for length, average in self.averages.items():
                decay = decay_of(self.step + 1, exponent_of(length))
                averages.append((get_ema_multi_avg_fn(decay), dict(average.named_parameters())))
            for names, parameters in self.engine.pieces() if self.engine.zero_stage == 3 else [_all_of(self.engine.model)]:
                with self.engine.gathered(parameters):
                    for update, averaged in averages:
                        update([averaged[name] for name in names], parameters, self.step + 1)
        self.step += 1
        self._report()

    def _learn(self, batch: GroupBatch, scale: float, learning_rate: float) -> None:
        count, measured = self.config.execution.microbatches, []
        for codes, condition, masked, dropout_mask in batch.microbatches(count, self.ema):
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
            self.monitor.record.add(
                self.step,
                batch.group,
                torch.stack(measured).mean(dim=0) if count > 1 else measured[0],
                mask_ratio=batch.mask_ratio,
                is_reuse=batch.is_reuse,
                macs=float(macs * batch.num_images),
                share=1 / batch.num_pieces,
            )

    # Beside the steps ------------------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Add the means since the last row to the history and, on rank 0, to tracking. Raises DivergedError."""
        assert self.batches is not None
        row = self.monitor.measure(
            self.step,
            self.skipped_draws,
            engine=self.engine,
            ema=self.ema,
            batches=self.batches,
            checkpoints=self.checkpoints,
        )
        if row is not None:
            values = {name: value for name, value in row.items() if name != "step"}
            self._track(lambda run, step=self.step: run.log_metrics(values, step))

    def save(self) -> None:
        """Begin to write a checkpoint of this step. Raises DivergedError before anything is written."""
        self.log()
        tensors = dict(self.engine.fragments()) | dict(own_share("ema", self.ema, self.rank, self.world_size))
        for length, average in self.averages.items():
            tensors |= dict(own_share(average_kind(length), average, self.rank, self.world_size))
        state = {
            "step": self.step,
            "skipped_draws": self.skipped_draws,
            **self.engine.counters(),
            "num_restarts": self.num_restarts,
            "num_rollbacks": self.num_rollbacks,
            "history": self.monitor.history,
            "worker_seconds": self.worker_seconds_before + (time.monotonic() - self.started) * self.world_size,
            "run_id": self.task.context.run.run_id,
            "ema_lengths": [*self.averages],
        }
        self.checkpoints.save(self.step, tensors, state)

    def preview(self) -> None:
        """Log a grid of samples from rank 0."""
        if self.rank == 0 and (grid := self.previewer.grid(self.ema)) is not None:
            self._track(lambda run, name=f"samples/step-{self.step:08d}.png": run.log_bytes(grid, name))

    def score(self) -> None:
        """Have the EMA weights scored, unless the run has done so before it was interrupted."""
        scoring = self.task.scoring
        if self.rank == 0 and scoring is not None and self.step not in read_scores(self.task.context):
            if self.step == self.config.num_steps:
                scoring.finish()  # the last step is never left out
            scoring.submit(self.step, self.ema)

    def _finish_scoring(self) -> None:
        if self.rank == 0 and self.task.scoring is not None:
            self.task.scoring.finish()

    def _is_due(self, interval: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step % interval == 0 or step == self.config.num_steps

    def _is_logged(self, step: int) -> bool:
        """Whether a step has a row of metrics. Steps with a checkpoint have one, so that its history is complete."""
        return self._is_due(self.config.execution.log_every, step) or self._is_due(self.config.execution.checkpoint_every, step)

    def _track(self, action: Any) -> None:
        if self.rank == 0:
            self.background.submit(action, self.task.context.run).add_done_callback(self._report_failure)

    def _report_failure(self, tracked: Future[None]) -> None:
        """Report an unexpected error once. Tracking itself reports a server that is down."""
        if (error := tracked.exception()) is not None:
            _log.warning("metrics or previews up to step %d were not logged", self.step, exc_info=error)
            if not self.has_reported_tracking:
                self.has_reported_tracking = True
                self._tell(f"metrics or previews were not logged; training continues ({type(error).__name__}: {error})")

    def _tell(self, message: str) -> None:
        if self.rank == 0:
            self.task.reporter.tell(message)

    def _report(self) -> None:
        now = time.monotonic()
        if self.rank == 0 and (now - self.last_report > _REPORT_SECONDS or self.step == self.config.num_steps):
            self.last_report = now
            last = self.monitor.history[-1] if self.monitor.history else None
            note = f"loss {last['loss']:.3f}, {last['images_per_second']:.0f} images/s" if last else ""
            self.task.reporter.report(self.step, note)


def _all_of(model: ENAT) -> tuple[list[str], list[torch.nn.Parameter]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return list(names), list(parameters)


def _broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
