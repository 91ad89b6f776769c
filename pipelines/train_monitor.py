"""What every interval of training measured: one row of figures, and whether training has diverged.

Shape legend: N steps of an interval, G groups of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from enat.model import ENAT
from pipelines.batches import Batches, rows_of
from pipelines.checkpoints import CheckpointWriter
from pipelines.engine import Engine
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

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS_NAMED = 8


class DivergedError(FloatingPointError):
    """Training has diverged in a step. draws: number of the draw that did it, which a rollback goes past."""

    def __init__(self, message: str, draws: int) -> None:
        super().__init__(message, draws)
        self.draws = draws

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class _Interval:
    """Since when the next row counts."""

    first_step: int
    data_wait: float
    checkpoint_wait: float
    started: float


class TrainMonitor:
    """One rank's part of what is seen of training. history: the rows so far, the same on every rank but for speeds."""

    def __init__(self, config: TrainConfig, token_map: TokenMap, device: torch.device, world_size: int) -> None:
        self._config, self._token_map, self._device, self._world_size = config, token_map, device, world_size
        stated = config.execution.peak_tflops
        self._peak = None if stated is None else stated * 1e12
        self.history: list[dict[str, float]] = []
        self.record = GroupRecord(config.num_groups)

    def begin(self, step: int, history: list[dict[str, float]]) -> None:
        """At a start, and again after a rollback."""
        self.history, self.record = history, GroupRecord(self._config.num_groups)
        self._interval = _Interval(step, 0.0, 0.0, time.perf_counter())

    def measure(
        self, step: int, skipped_draws: int, *, engine: Engine, ema: ENAT, batches: Batches, checkpoints: CheckpointWriter
    ) -> dict[str, float] | None:
        """The row of the steps since the last one, None where there are none. All ranks must call it.

        Raises DivergedError, on all ranks alike.
        """
        interval = self._interval
        num_steps = step - interval.first_step
        if not num_steps:
            return None
        values = self.record.collect(interval.first_step, num_steps, self._device)
        seconds = time.perf_counter() - interval.started  # without what the row itself takes
        difference, weights = self._distance(engine, ema)
        if self._peak is None:  # now, when all ranks are here and none is still starting beside others; no interval counts it
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
            "memory_gb": memory_bytes(self._device) / 1e9,
            "num_workers": self._world_size,
        }
        if self._config.precision == "fp16":
            row["loss_scale"] = engine.loss_scale
        self.history.append({name: value for name, value in row.items() if math.isfinite(value)})
        return row

    def _distance(self, engine: Engine, ema: ENAT) -> tuple[float, float]:
        """Squared norms of EMA - weights and of the weights; not finite where a weight is not, or is beyond 1e19."""
        averaged = dict(ema.named_parameters())
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for names, parameters in engine.pieces():
            with torch.no_grad(), engine.whole(parameters):
                sums += squared_distance([averaged[name] for name in names], parameters)
        difference, weights = sums.tolist()
        return difference, weights

    def _check(self, step: int, skipped_draws: int, values: np.ndarray, row: Mapping[str, float], *, may_overflow: bool) -> None:
        """Raises DivergedError, so that no such model is saved."""
        first_step, last = step - len(values), len(values) - 1
        if (bad := first_not_finite(values)) is not None:
            reason = f"the loss of step {first_step + bad[0] + 1} is not finite"
        elif not math.isfinite(row.get("gradient_norm", 0.0)) and not may_overflow:
            scaled = " at any loss scale" if self._config.precision == "fp16" else ""
            bad, reason = (last, []), f"the gradient of step {step} is not finite{scaled}"
        elif not math.isfinite(row["ema_distance"]):
            bad, reason = (last, []), f"the weights after step {step} have no finite norm"
        else:
            lowest = min((past["loss"] for past in self.history), default=math.inf)
            if row["loss"] <= self._config.execution.divergence_factor * lowest:
                return
            bad = (last, [])
            reason = f"the mean loss of steps {first_step + 1} to {step} is {row['loss']:.3g}, after {lowest:.3g}"
        draws = first_step + bad[0] + skipped_draws
        groups = bad[1] or range(self._config.num_groups)
        named = "; ".join(f"group {group}: {_rows(rows_of(self._config, self._token_map, draws, group))}" for group in groups[:2])
        raise DivergedError(
            f"training diverged by step {step}: {reason} (batch {draws}, rows of the token map in {named}); nothing was saved "
            "since the last checkpoint. train.execution.on_divergence=rollback goes on from there, past such batches. A lower "
            "train.learning_rate, longer train.warm_up_steps or train.gradient_clip make another run, which begins at step 0",
            draws,
        )


def _rows(rows: np.ndarray) -> str:
    named = ", ".join(map(str, rows[:_ROWS_NAMED].tolist()))
    return named + (f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else "")
