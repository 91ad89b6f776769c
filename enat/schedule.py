"""Schedules of the sampler as pure functions of progress in [0, 1], and fixed orders of tokens (paper sec. 3).

Published settings of the paper: cosine, linear guidance, linear temperatures; see SamplerConfig.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from enat.config import check_choice

# Share of tokens still masked, by progress. Concave ones reveal few tokens first. All but arccos: MaskGIT (Chang et al. 2022,
# arXiv 2202.04200, sec. 3.3); arccos: Halton-MaskGIT (Besnier et al. 2025, arXiv 2503.17076).
_MASK_RATIOS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: math.cos(math.pi * progress / 2),
    "arccos": lambda progress: math.acos(progress) / (math.pi / 2),
    "linear": lambda progress: 1.0 - progress,
    "square": lambda progress: 1.0 - progress**2,
    "cubic": lambda progress: 1.0 - progress**3,
    "square_root": lambda progress: 1.0 - math.sqrt(progress),
}
MASK_SCHEDULES = tuple(_MASK_RATIOS)
GUIDANCE_SCHEDULES = ("linear", "constant", "power_cosine")
TEMPERATURE_SCHEDULES = ("linear", "constant")
REVEAL_ORDERS = ("confidence", "moment", "random", "halton")


def mask_ratio(progress: float, schedule: str = "cosine") -> float:
    """Share of tokens still masked once `progress` of the steps is done: 1 at 0, 0 at 1."""
    return _MASK_RATIOS[_known(schedule, MASK_SCHEDULES, "mask_schedule")](progress)


def guidance_weight(progress: float, guidance_scale: float, schedule: str = "linear", power: float = 1.0) -> float:
    """w in logits = uncond + w (cond - uncond); 1 is off.

    "linear" ramps from 1 at progress 0 (published, with progress = step / num_steps).
    "power_cosine" follows (1 - cos(pi progress**power)) / 2 (MDT, Gao et al. 2023, arXiv 2303.14389, whose time runs from 1 to 0):
    the higher the power, the later guidance starts. Other schedules do not use the power.
    """
    if schedule == "power_cosine":
        return 1.0 + (guidance_scale - 1.0) * (1.0 - math.cos(math.pi * progress**power)) / 2
    if _known(schedule, GUIDANCE_SCHEDULES, "guidance_schedule") == "linear":
        return 1.0 + (guidance_scale - 1.0) * progress
    return guidance_scale


def temperature(progress: float, start: float, schedule: str = "linear") -> float:
    """ "linear" falls from `start` at progress 0 to 0 at progress 1 (published); "constant" stays."""
    if _known(schedule, TEMPERATURE_SCHEDULES, "temperature_schedule") == "linear":
        return start * (1.0 - progress)
    return start


def halton_order(grid_size: int) -> list[int]:
    """All grid_size**2 positions, numbered row by row, in an order whose every prefix covers the grid evenly (Besnier et al. 2025,
    sec. 4).

    Points of the Halton sequence with base 2 for rows and 3 for columns; each cell counts when it is first reached. Computed in
    integers, because rounding must not decide between cells.
    """
    if grid_size < 1:
        raise ValueError(f"grid_size is {grid_size}; it must be at least 1")
    order: dict[int, None] = {}  # a set that keeps its order
    index = 1
    while len(order) < grid_size**2:
        row, column = (_radical_inverse_cell(index, base, grid_size) for base in (2, 3))
        order.setdefault(row * grid_size + column)
        index += 1
    return list(order)


def _radical_inverse_cell(index: int, base: int, num_cells: int) -> int:
    """floor(num_cells x), where x in [0, 1) has the digits of `index` mirrored at the radix point."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return num_cells * numerator // denominator


def _known(name: str, choices: tuple[str, ...], field: str) -> str:
    check_choice(field, name, choices)
    return name
