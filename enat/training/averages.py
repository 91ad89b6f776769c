"""Averages of weights by power functions, and averages of any length from a few that were kept (Karras et al. 2024, section 3).

The average of exponent g after step t weighs the weights of step s by s^g. It is as long as a fixed share of the training, which
its relative length states: the standard deviation of the profile s^g over t. Averages of two exponents that were kept at several
steps span the profiles of others: least squares finds the combination that is nearest to a wanted profile.

Shape legend: K kept averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_LENGTH = 1 / math.sqrt(12)  # of the plain mean of all steps


def exponent_of(length: float) -> float:
    """The exponent g of a relative length in (0, MAX_LENGTH]: length^2 = (g + 1) / ((g + 2)^2 (g + 3)), section 3.1."""
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"the relative length of an average is {length:g}; it must be above 0 and at most {MAX_LENGTH:.4f}")
    ratio = length**-2
    roots = np.roots([1, 7, 16 - ratio, 12 - ratio])
    return max(0.0, float(roots[np.isreal(roots)].real.max()))


def decay_of(step: int, exponent: float) -> float:
    """The share of the average before a step that stays in it. step: from 1 on; the first has 0."""
    return (1 - 1 / step) ** (exponent + 1)


@dataclass(frozen=True)
class Average:
    """An average by step and relative length."""

    step: int
    length: float


@dataclass(frozen=True, eq=False)
class Combination:
    """weights: float64 (K,), of the kept averages.   error: distance of its profile to the wanted one, over the norm of that."""

    weights: np.ndarray
    error: float


def combine(kept: Sequence[Average], wanted: Average) -> Combination:
    """The combination of kept averages up to the wanted step that is nearest to a wanted one.

    Its weights sum to 1, so that what training does not change stays what it is; the paper's least squares leave that open.
    Raises ValueError if nothing is kept up to that step.
    """
    usable = np.array([average.step <= wanted.step for average in kept])
    if not usable.any():
        raise ValueError(f"no average is kept up to step {wanted.step}; the first is of step {min(each.step for each in kept)}")
    among = [average for average, is_usable in zip(kept, usable, strict=True) if is_usable]
    products = np.array([[_overlap(first, second) for second in among] for first in among])
    with_wanted = np.array([_overlap(average, wanted) for average in among])
    own = _overlap(wanted, wanted)
    scale = np.sqrt(products.diagonal())  # averages of early steps have tall profiles
    bordered = np.block([[products / np.outer(scale, scale), 1 / scale[:, None]], [1 / scale, np.zeros(1)]])
    found = np.linalg.lstsq(bordered, np.append(with_wanted / scale, 1), rcond=1e-14)[0][:-1] / scale
    weights = np.zeros(len(kept))
    weights[usable] = found
    missing = own - 2 * found @ with_wanted + found @ products @ found
    return Combination(weights, math.sqrt(max(0.0, missing) / own))


def _overlap(first: Average, second: Average) -> float:
    """The integral of the product of two profiles (g + 1) s^g / t^(g + 1), each over 0..t."""
    early, late = sorted((first, second), key=lambda average: average.step)
    a, b = exponent_of(early.length), exponent_of(late.length)
    return (a + 1) * (b + 1) * (early.step / late.step) ** b / ((a + b + 1) * late.step)


def read_combination(files: Sequence[Path], weights: Sequence[float]) -> Mapping[str, Tensor]:
    """The sum of tensors in safetensors files, each times its weight: float32, one tensor after the other in float64."""
    import torch
    from safetensors import safe_open

    opened = [safe_open(str(path), framework="pt") for path in files]
    found = {}
    for name in opened[0].keys():  # noqa: SIM118 (safe_open is not a mapping)
        total = torch.zeros_like(opened[0].get_tensor(name), dtype=torch.float64)
        for file, weight in zip(opened, weights, strict=True):
            total += weight * file.get_tensor(name).double()
        found[name] = total.float()
    return found
