"""Metrics of training: one row per interval, and the detection of divergence.

Shape legend: N steps of an interval, G groups of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from enat.execution.peak import matmul_peak
from enat.model import ENAT
from pipelines.cluster.device import peak_memory_gb
from pipelines.data.token_map import TokenMap
from pipelines.training.batches import Batches, rows_of
from pipelines.training.checkpoints import CheckpointWriter
from pipelines.training.config import TrainConfig
from pipelines.training.engine import Engine

MASK_RATIO_BOUNDS = (0.0, 0.6, 0.7, 0.8, 0.9, 1.0)  # Beta(12, 3) has its quartiles at 0.74, 0.81 and 0.88
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_ROWS_NAMED = 8
_LOSS, _ACCURACY, _MASK_RATIO, _IS_REUSE, _MACS = range(5)


class DivergedError(FloatingPointError):
    """Training has diverged. draws: number of the batch that diverged, which a rollback skips."""

    def __init__(self, message: str, draws: int) -> None:
        super().__init__(message, draws)
        self.draws = draws

    def __str__(self) -> str:
        return str(self.args[0])


class TrainMonitor:
    """The metrics of training on one rank. history: the rows so far, equal on all ranks except for speeds."""

    def __init__(self, config: TrainConfig, token_map: TokenMap, device: torch.device, world_size: int) -> None:
        self._config, self._token_map, self._device, self._world_size = config, token_map, device, world_size
        stated = config.execution.peak_tflops
        self._peak = None if stated is None else stated * 1e12
        self.history: list[dict[str, float]] = []
        self.record = GroupRecord(config.num_groups)

    def begin(self, step: int, history: list[dict[str, float]]) -> None:
        """Begin at a step: at the start of training, and again after a rollback."""
        self.history, self.record = history, GroupRecord(self._config.num_groups)
        self._interval = _Interval(step, 0.0, 0.0, time.perf_counter())

    def measure(
        self, step: int, skipped_draws: int, *, engine: Engine, ema: ENAT, batches: Batches, checkpoints: CheckpointWriter
    ) -> dict[str, float] | None:
        """The row of the steps since the last row, or None without any steps. All ranks must call it.

        Raises DivergedError on all ranks.
        """
        interval = self._interval
        num_steps = step - interval.first_step
        if not num_steps:
            return None
        values = self.record.collect(interval.first_step, num_steps, self._device)
        seconds = time.perf_counter() - interval.started  # without the time for the row itself
        averaged, sums = dict(ema.named_parameters()), torch.zeros(2, dtype=torch.float64, device=self._device)
        for names, parameters in engine.pieces():
            with torch.no_grad(), engine.gathered(parameters):
                sums += squared_distance([averaged[name] for name in names], parameters)
        difference, weights = sums.tolist()  # not finite if a weight is not finite or exceeds 1e19
        if self._peak is None:  # measured here, where all ranks have started, and in no interval
            self._peak = matmul_peak(self._device, _DTYPES[self._config.precision])
        self._interval = _Interval(step, batches.seconds_waited, checkpoints.seconds_waited, time.perf_counter())
        row: dict[str, float] = {"step": step, **summarize(values)}
        if (norm := engine.gradient_norm()) is not None:
            row["gradient_norm"] = norm
        row["ema_distance"] = math.sqrt(difference / weights) if weights else math.nan
        self._check(step, skipped_draws, values, row, may_overflow=engine.is_overflow_of_scale())
        flops = 2 * total_macs(values) / seconds
        row |= {
            "learning_rate": self._config.learning_rate_at(step - 1),
            "images_per_second": num_steps * self._config.batch_size / seconds,
            "step_seconds": seconds / num_steps,
            "model_tflops_per_second": flops / 1e12,
            "model_flops_utilization": flops / (self._peak * self._world_size),
            "data_wait_share": (batches.seconds_waited - interval.data_wait) / seconds,
            "checkpoint_wait_share": (checkpoints.seconds_waited - interval.checkpoint_wait) / seconds,
            "memory_gb": peak_memory_gb(self._device),
            "num_workers": self._world_size,
        }
        if self._config.precision == "fp16":
            row["loss_scale"] = engine.loss_scale
        self.history.append({name: value for name, value in row.items() if math.isfinite(value)})
        return row

    def _check(self, step: int, skipped_draws: int, values: np.ndarray, row: Mapping[str, float], *, may_overflow: bool) -> None:
        """Raise DivergedError if training has diverged, before such a model is saved."""
        first_step, last = step - len(values), len(values) - 1
        if (bad := first_not_finite(values)) is not None:
            reason = f"the loss of step {first_step + bad[0] + 1} is not finite"
        elif not math.isfinite(row.get("gradient_norm", 0.0)) and not may_overflow:
            scaled = " at any loss scale" if self._config.precision == "fp16" else ""
            bad, reason = (last, []), f"the gradient of step {step} is not finite{scaled}"
        elif not math.isfinite(row["ema_distance"]):
            bad, reason = (last, []), f"the norm of the weights after step {step} is not finite"
        else:
            lowest = min((past["loss"] for past in self.history), default=math.inf)
            if row["loss"] <= self._config.execution.divergence_factor * lowest:
                return
            bad = (last, [])
            reason = f"the mean loss of steps {first_step + 1} to {step} is {row['loss']:.3g}, the lowest before was {lowest:.3g}"
        draws = first_step + bad[0] + skipped_draws
        groups = bad[1] or range(self._config.num_groups)
        named = "; ".join(f"group {group}: {_rows(rows_of(self._config, self._token_map, draws, group))}" for group in groups[:2])
        raise DivergedError(
            f"training diverged by step {step}: {reason} (batch {draws}, rows of the token map in {named}). Nothing was saved "
            "since the last checkpoint. train.execution.on_divergence=rollback resumes from there and skips such batches. A lower "
            "train.learning_rate, longer train.warmup_steps or train.max_grad_norm define a new run, which begins at step 0",
            draws,
        )


@dataclass
class GroupRecord:
    """Measurements of this rank's groups. Values stay on the device until they are collected, so that steps do not wait for it."""

    num_groups: int
    places: list[tuple[int, int]] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)
    known: list[tuple[float, float, float]] = field(default_factory=list)

    def add(
        self, step: int, group: int, measured: Tensor, *, mask_ratio: float, is_reuse: bool, macs: float, share: float = 1.0
    ) -> None:
        """Add a group, or a piece of its rows. `measured`: float32 (2,), loss and token accuracy.

        macs: MACs of the forward and backward passes.   share: of the group's rows.
        """
        self.places.append((step, group))
        self.measured.append(measured if share == 1 else measured * share)
        self.known.append((mask_ratio * share, is_reuse * share, macs))

    def collect(self, first_step: int, num_steps: int, device: torch.device) -> np.ndarray:
        """Sum over ranks, float64 (N, G, 5): loss, accuracy, mask ratio, whether reused, MACs. Empties the record."""
        values = torch.zeros(num_steps, self.num_groups, 5, dtype=torch.float64, device=device)
        if self.places:
            steps, groups = (torch.tensor(column, device=device) for column in zip(*self.places, strict=True))
            known = torch.tensor(self.known, dtype=torch.float64, device=device)
            own = torch.cat([torch.stack(self.measured).double(), known], dim=1)
            values.index_put_((steps - first_step, groups), own, accumulate=True)  # a rank may have several pieces of a group
        dist.all_reduce(values)
        self.places, self.measured, self.known = [], [], []
        return values.cpu().numpy()


def summarize(values: np.ndarray) -> dict[str, float]:
    """Means over the groups (N, G, 5) of an interval, without metrics to which no group contributes."""
    flat = values.reshape(-1, values.shape[-1])
    loss, ratio, is_reuse = flat[:, _LOSS], flat[:, _MASK_RATIO], flat[:, _IS_REUSE] > 0
    row = {"loss": float(loss.mean()), "token_accuracy": float(flat[:, _ACCURACY].mean())}
    chosen = {"fresh_loss": ~is_reuse, "reuse_loss": is_reuse}
    for low, high in pairwise(MASK_RATIO_BOUNDS):
        chosen[f"loss_by_mask_ratio/{low:.1f}-{high:.1f}"] = (ratio >= low) & ((ratio < high) | (high == MASK_RATIO_BOUNDS[-1]))
    return row | {name: float(loss[some].mean()) for name, some in chosen.items() if some.any()}


def first_not_finite(values: np.ndarray) -> tuple[int, list[int]] | None:
    """Step (relative to the interval) and groups of the first loss that is NaN or infinite; None if all are finite."""
    bad = ~np.isfinite(values[:, :, _LOSS])
    steps = np.flatnonzero(bad.any(axis=1))
    return (int(steps[0]), np.flatnonzero(bad[steps[0]]).tolist()) if len(steps) else None


def total_macs(values: np.ndarray) -> float:
    return float(values[:, :, _MACS].sum())


def squared_distance(averaged: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Squared norms of the difference and of the weights, float64 (2,), to be summed over the blocks of a model."""
    pairs = list(zip(averaged, weights, strict=True))  # in pairs: the difference of a whole model would need its memory again
    norms = [torch.stack([torch.dist(ours, theirs) for ours, theirs in pairs]), torch.stack([theirs.norm() for _, theirs in pairs])]
    return torch.stack(norms).double().square().sum(dim=1)


@dataclass(frozen=True)
class _Interval:
    """The beginning of the interval of the next row."""

    first_step: int
    data_wait: float
    checkpoint_wait: float
    started: float


def _rows(rows: np.ndarray) -> str:
    named = ", ".join(map(str, rows[:_MAX_ROWS_NAMED].tolist()))
    return named + (f" and {len(rows) - _MAX_ROWS_NAMED} more" if len(rows) > _MAX_ROWS_NAMED else "")
