"""Schedules of the sampler as pure functions of progress in [0, 1] (paper sec. 3; published settings in the README)."""

from __future__ import annotations

import math

MASK_SCHEDULES = ("cosine",)
GUIDANCE_SCHEDULES = ("linear", "constant")


def mask_ratio(progress: float, schedule: str = "cosine") -> float:
    """Share of tokens still masked once `progress` of the steps is done: 1 at 0, 0 at 1."""
    if schedule == "cosine":
        return math.cos(math.pi * progress / 2)
    raise ValueError(f"no mask schedule is called {schedule!r}; choose one of {', '.join(MASK_SCHEDULES)}")


def num_masked_after(step: int, num_steps: int, num_tokens: int, schedule: str = "cosine") -> int:
    """Tokens left masked after step 0..num_steps-1; none after the last. L=256, 8 steps: 251 236 212 181 142 97 49 0."""
    if step == num_steps - 1:
        return 0
    return math.floor(num_tokens * mask_ratio((step + 1) / num_steps, schedule))


def guidance_weight(progress: float, guidance_scale: float, schedule: str = "linear") -> float:
    """w in logits = uncond + w (cond - uncond); 1 is off.

    "linear" ramps from 1 at progress 0 (published, with progress = step / num_steps).
    """
    if schedule == "linear":
        return 1.0 + (guidance_scale - 1.0) * progress
    if schedule == "constant":
        return guidance_scale
    raise ValueError(f"no guidance schedule is called {schedule!r}; choose one of {', '.join(GUIDANCE_SCHEDULES)}")


def temperature(progress: float, start: float) -> float:
    """Falls linearly from `start` at progress 0 to 0 at progress 1."""
    return start * (1.0 - progress)
