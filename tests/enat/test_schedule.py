"""Schedules as functions of progress."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from enat.schedule import GUIDANCE_SCHEDULES, MASK_SCHEDULES, guidance_weight, halton_order, mask_ratio, temperature


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_every_mask_ratio_falls_from_all_to_none(schedule):
    ratios = [mask_ratio(step / 100, schedule) for step in range(101)]
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(0, abs=1e-12)
    assert all(after < before for before, after in pairwise(ratios))


def test_mask_ratios_half_way():
    half = {schedule: mask_ratio(0.5, schedule) for schedule in MASK_SCHEDULES}
    expected = {"cosine": 0.5**0.5, "arccos": 2 / 3, "linear": 0.5, "square": 0.75, "cubic": 0.875, "square_root": 1 - 0.5**0.5}
    assert half == pytest.approx(expected)


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
@given(progress=st.floats(0, 1), scale=st.floats(0, 20))
def test_guidance_is_between_1_and_its_scale(schedule, progress, scale):
    low, high = sorted((1.0, scale))
    assert low - 1e-12 <= guidance_weight(progress, scale, schedule, 2.0) <= high + 1e-12
    assert guidance_weight(progress, 1.0, schedule, 2.0) == 1.0
    assert guidance_weight(1.0, scale, schedule, 2.0) == pytest.approx(scale)


def test_higher_power_delays_power_cosine_guidance():
    """MDT's form at its time t = 1 - progress."""
    for power in (0.5, 1.0, 4.0):
        for progress in (0.0, 0.2, 0.5, 0.9):
            share = (1 - math.cos((1 - (1 - progress)) ** power * math.pi)) / 2
            assert guidance_weight(progress, 4.0, "power_cosine", power) == pytest.approx(3.0 * share + 1.0)
    half_way = [guidance_weight(0.5, 4.0, "power_cosine", power) for power in (0.5, 1.0, 2.0, 4.0)]
    assert half_way == sorted(half_way, reverse=True)
    assert half_way[1] == pytest.approx(2.5)


@pytest.mark.parametrize("scale", [1.0, 3.5, 0.0])
def test_linear_guidance_starts_unguided_and_ramps_as_published(scale):
    assert guidance_weight(0, scale) == 1
    for step in range(8):
        assert guidance_weight(step / 8, scale) == pytest.approx(1 + (scale - 1) * step / 8)
    assert guidance_weight(0.3, scale, "constant") == scale


def test_temperatures_fall_linearly_to_exactly_zero():
    assert [temperature(progress, 6.0) for progress in (0, 0.25, 1)] == [6.0, 4.5, 0.0]
    assert [temperature(progress, 6.0, "constant") for progress in (0, 0.25, 1)] == [6.0, 6.0, 6.0]


@given(grid_size=st.integers(1, 24))
def test_halton_order_covers_each_position_once(grid_size):
    assert sorted(halton_order(grid_size)) == list(range(grid_size**2))


@pytest.mark.parametrize("grid_size", [4, 7, 16, 32])
def test_halton_order_is_that_of_the_sequence(grid_size):
    points = qmc.Halton(2, scramble=False).random(60 * grid_size**2)[1:]  # point 0 is the corner
    cells = (points * grid_size + 1e-9).astype(int)
    assert halton_order(grid_size) == list(dict.fromkeys((cells[:, 0] * grid_size + cells[:, 1]).tolist()))


def test_halton_order_spreads_evenly_at_any_length():
    """By the star discrepancy, against orders at random."""
    rng = np.random.default_rng(0)

    def discrepancy(order):
        return qmc.discrepancy((np.stack(np.divmod(np.array(order), 16), axis=1) + 0.5) / 16, method="L2-star")

    for length in (8, 20, 64, 128):
        shuffled = [discrepancy(rng.permutation(256)[:length]) for _ in range(20)]
        assert discrepancy(halton_order(16)[:length]) < min(shuffled)


def test_unknown_schedules_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'sine'; choose one of cosine"):
        mask_ratio(0.5, "sine")
    with pytest.raises(ValueError, match="'square'; choose one of linear, constant"):
        guidance_weight(0.5, 2.0, "square")
    with pytest.raises(ValueError, match="'cosine'; choose one of linear, constant"):
        temperature(0.5, 2.0, "cosine")
    with pytest.raises(ValueError, match="grid_size is 0"):
        halton_order(0)
