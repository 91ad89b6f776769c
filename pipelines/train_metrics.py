"""What is seen of training: one row of numbers per logging interval, from what every group of every step left.

Shape legend: N steps of an interval, G groups of a step.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

MASK_RATIO_BOUNDS = (0.0, 0.6, 0.7, 0.8, 0.9, 1.0)  # Beta(12, 3) has its quartiles at 0.74, 0.81 and 0.88
_PEAK_SECONDS = 0.5
_LOSS, _ACCURACY, _MASK_RATIO, _IS_REUSE, _MACS = range(5)


@dataclass
class GroupRecord:
    """What this rank's groups left since the last look, without waiting for the device: values stay there until then."""

    num_groups: int
    places: list[tuple[int, int]] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)
    known: list[tuple[float, bool, float]] = field(default_factory=list)

    def add(self, step: int, group: int, measured: Tensor, *, mask_ratio: float, is_reuse: bool, macs: float) -> None:
        """measured: float32 (2,), loss and token accuracy.   macs: of the group's forward and backward passes."""
        self.places.append((step, group))
        self.measured.append(measured)
        self.known.append((mask_ratio, is_reuse, macs))

    def collect(self, first_step: int, num_steps: int, device: torch.device) -> np.ndarray:
        """float64 (N, G, 5) of all ranks: loss, accuracy, mask ratio, whether reused, MACs. Empties the record."""
        values = torch.zeros(num_steps, self.num_groups, 5, dtype=torch.float64, device=device)
        if self.places:
            steps, groups = (torch.tensor(column, device=device) for column in zip(*self.places, strict=True))
            values[steps - first_step, groups, :2] = torch.stack(self.measured).double()
            values[steps - first_step, groups, 2:] = torch.tensor(self.known, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        self.places, self.measured, self.known = [], [], []
        return values.cpu().numpy()


def summarize(values: np.ndarray) -> dict[str, float]:
    """Means over groups (N, G, 5) of an interval; what no group had is left out."""
    flat = values.reshape(-1, values.shape[-1])
    loss, ratio, is_reuse = flat[:, _LOSS], flat[:, _MASK_RATIO], flat[:, _IS_REUSE] > 0
    row = {"loss": float(loss.mean()), "token_accuracy": float(flat[:, _ACCURACY].mean())}
    chosen = {"fresh_loss": ~is_reuse, "reuse_loss": is_reuse}
    for low, high in pairwise(MASK_RATIO_BOUNDS):
        chosen[f"loss_by_mask_ratio/{low:.1f}-{high:.1f}"] = (ratio >= low) & ((ratio < high) | (high == MASK_RATIO_BOUNDS[-1]))
    return row | {name: float(loss[some].mean()) for name, some in chosen.items() if some.any()}


def first_not_finite(values: np.ndarray) -> tuple[int, list[int]] | None:
    """Step (counted from the interval's first) and groups of the first loss that is not a number, or infinite."""
    bad = ~np.isfinite(values[:, :, _LOSS])
    steps = np.flatnonzero(bad.any(axis=1))
    return (int(steps[0]), np.flatnonzero(bad[steps[0]]).tolist()) if len(steps) else None


def total_macs(values: np.ndarray) -> float:
    return float(values[:, :, _MACS].sum())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that this process gets out of its device in matrix products of a dtype: what model FLOP/s can be held against.

    The fastest of the products of half a second: a device's clock has to rise first.
    """
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _PEAK_SECONDS:
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """Most that was held so far: by the device's allocator, or on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # getrusage also counts what the process held that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def squared_distance(averaged: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """float64 (2,): squared norms of the difference and of the weights, for summing over pieces of a model."""
    pairs = list(zip(averaged, weights, strict=True))  # one after the other: the difference of a whole model takes its memory again
    norms = [torch.stack([torch.dist(ours, theirs) for ours, theirs in pairs]), torch.stack([theirs.norm() for _, theirs in pairs])]
    return torch.stack(norms).double().square().sum(dim=1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
