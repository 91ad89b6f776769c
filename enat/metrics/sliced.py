"""Sliced Wasserstein distance between two sets of features, for few samples: it estimates no covariance.

Shape legend: N generated samples, M reference samples, F features, D directions, Q quantiles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from enat.metrics.moments import CHUNK, Features, check_features, check_same_width

_DIRECTIONS_AT_ONCE = 64


def sliced_distance(generated: Features, reference: Features, num_directions: int = 1000, seed: int = 2020) -> float:
    """F times the mean squared 1-D Wasserstein distance of projections (Bonneel et al. 2015; on Inception's features in arXiv
    2605.06797). At least 0; lower is better.

    The factor F makes a shift of the features as large as in the Fréchet distance. Directions are uniform on the sphere and depend
    on the seed and F only, so that all sets are compared along the same ones.
    generated: float (N, F), reference: float (M, F). Raises ValueError for different widths and for values that are not finite.
    """
    sizes = check_features(generated, "generated features"), check_features(reference, "reference features")
    check_same_width(generated, reference)
    width = generated.shape[1]
    directions = torch.from_numpy(np.random.default_rng(seed).normal(size=(width, num_directions)))
    directions /= directions.norm(dim=0)
    weights, *rows = _quantiles(*sizes)
    total = 0.0
    for some in directions.split(_DIRECTIONS_AT_ONCE, dim=1):
        ordered = [_project(side, some).sort(dim=0).values[of] for side, of in zip((generated, reference), rows, strict=True)]
        total += float((weights @ (ordered[0] - ordered[1]).square()).sum())
    return width * total / num_directions


def _project(features: Features, directions: Tensor) -> Tensor:
    """(N, F) @ (F, D) -> float64 (N, D), a chunk of rows at a time."""
    chunks = (torch.as_tensor(features[start : start + CHUNK]) for start in range(0, len(features), CHUNK))
    return torch.cat([chunk.double().cpu() @ directions for chunk in chunks])


def _quantiles(num_generated: int, num_reference: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of both quantile functions: their widths, float64 (Q,), and the sorted samples of each side, int64 (Q,)."""
    edges = np.unique(np.concatenate([np.arange(size + 1) / size for size in (num_generated, num_reference)]))
    middles = (edges[1:] + edges[:-1]) / 2
    generated, reference = (torch.from_numpy((middles * size).astype(np.int64)) for size in (num_generated, num_reference))
    return torch.from_numpy(np.diff(edges)), generated, reference
