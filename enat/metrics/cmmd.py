"""CMMD: maximum mean discrepancy of CLIP embeddings with a Gaussian kernel (Jayasumana et al. 2024).

Shape legend: N generated samples, M reference samples, F features, R samples of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.moments import Features, check_features, check_same_width, take_rows

SCALE = 1000.0  # by which it is published
_BANDWIDTH = 10.0  # of embeddings of length 1
_BLOCK_SIZE, _TILE_COLUMNS = 4096, 4096


@dataclass(frozen=True, eq=False)
class Discrepancy:
    """value: at least 0; lower is better.   influence: of each generated sample on it, float64 (N,), with mean 0."""

    value: float
    influence: np.ndarray


def cmmd_blocks(num_samples: int) -> list[range]:
    return [range(start, min(start + _BLOCK_SIZE, num_samples)) for start in range(0, num_samples, _BLOCK_SIZE)]


def mean_kernels(of: Features, rows: range, to: Features, *, device: str = "cpu") -> np.ndarray:
    """The mean kernel of each sample of a block with all samples of the other set: float64 (R,).

    of: float (N, F), to: float (M, F). Samples are scaled to length 1. Raises ValueError for different widths and for values that
    are not finite.
    """
    check_features(of)
    num_columns = check_features(to)
    check_same_width(of, to)
    x, sums = _units(of, rows, device), torch.zeros(len(rows), dtype=torch.float64, device=device)
    for start in range(0, num_columns, _TILE_COLUMNS):
        y = _units(to, range(start, min(start + _TILE_COLUMNS, num_columns)), device)
        # Half of the squared distance of two unit vectors is one minus their product.
        sums += ((x @ y.T - 1) / _BANDWIDTH**2).exp().sum(dim=1, dtype=torch.float64)
    return (sums / num_columns).cpu().numpy()


def discrepancy(own: Sequence[np.ndarray], cross: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> Discrepancy:
    """From the mean kernels, in blocks: of generated samples with each other and with the reference, and of reference samples with
    each other. It is the published estimator, with the kernels of a sample with itself."""
    own_means, cross_means, real_means = (np.concatenate(each) for each in (own, cross, real))
    value = own_means.mean() + real_means.mean() - 2 * cross_means.mean()
    influence = 2 * SCALE * (own_means - cross_means)
    return Discrepancy(max(0.0, float(SCALE * value)), influence - influence.mean())


def cmmd(generated: Features, reference: Features) -> Discrepancy:
    """All of it at once. generated: float (N, F), reference: float (M, F). Raises ValueError as mean_kernels does."""
    of_generated, of_reference = cmmd_blocks(len(generated)), cmmd_blocks(len(reference))
    own = [mean_kernels(generated, rows, generated) for rows in of_generated]
    cross = [mean_kernels(generated, rows, reference) for rows in of_generated]
    return discrepancy(own, cross, [mean_kernels(reference, rows, reference) for rows in of_reference])


def _units(features: Features, rows: range, device: str) -> Tensor:
    """Float64: the kernels of two unit vectors differ by less than 0.02."""
    return torch.nn.functional.normalize(torch.from_numpy(take_rows(features, np.array(rows))).to(device), dim=1)
