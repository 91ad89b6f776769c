"""The sliced Wasserstein distance, against scipy along single directions and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from enat.metrics.moments import FeatureMoments, frechet_distance
from enat.metrics.sliced import sliced_distance


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_one_direction_is_optimal_transport_on_a_line() -> None:
    """Of repeated points, so that both sets have the same number for the assignment."""
    for sizes in ((12, 12), (6, 12), (4, 6)):
        x, y = _normal(0, sizes[0], 1), _normal(1, sizes[1], 1)
        common = np.lcm(*sizes)
        costs = np.square(np.repeat(x, common // sizes[0])[:, None] - np.repeat(y, common // sizes[1])[None])
        rows, columns = linear_sum_assignment(costs)
        assert sliced_distance(x, y, 3) == pytest.approx(costs[rows, columns].mean())


@pytest.mark.slow
def test_a_shift_is_as_large_as_in_the_frechet_distance() -> None:
    x = _normal(0, 500, 16)
    shifted = x + 0.5
    moments = [FeatureMoments(16).add(each) for each in (x, shifted)]
    assert sliced_distance(x, shifted, 4000) == pytest.approx(frechet_distance(*moments), rel=0.05)
    assert sliced_distance(x, x) == 0
    assert sliced_distance(torch.from_numpy(x), shifted) == sliced_distance(x, shifted)


def test_it_depends_on_the_seed_and_not_on_the_order_of_samples() -> None:
    x, y = _normal(0, 40, 8), 1.5 * _normal(1, 70, 8)
    assert sliced_distance(x, y) == pytest.approx(sliced_distance(x[::-1].copy(), y))
    assert sliced_distance(x, y) == sliced_distance(x, y) != sliced_distance(x, y, seed=1)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        sliced_distance(_normal(0, 4, 3), _normal(0, 4, 2))
    with pytest.raises(ValueError, match="not finite"):
        sliced_distance(np.full((4, 3), np.nan), _normal(0, 4, 3))
