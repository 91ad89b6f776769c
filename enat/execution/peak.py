"""What a device can do at most: the reference for the utilization of models."""

from __future__ import annotations

import time

import torch

_SECONDS = 0.5


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this process's device in matrix products of a dtype, the reference for model FLOPs utilization.

    Takes the fastest product of half a second, since the device's clock has to rise first.
    """
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
