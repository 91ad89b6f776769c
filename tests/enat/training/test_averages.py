"""Averages that are put together afterwards equal those that were tracked, and lengths and profiles are those of the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from enat.training.averages import MAX_LENGTH, Average, combine, decay_of, exponent_of, read_combination


def tracked(values, length):
    """The average after every step, by its recursion: (T, ...)"""
    average, found, exponent = np.zeros(values.shape[1:]), [], exponent_of(length)
    for step, value in enumerate(values, start=1):
        share = decay_of(step, exponent)
        average = share * average + (1 - share) * value
        found.append(average)
    return np.stack(found)


@pytest.fixture(scope="module")
def walk():
    """Weights of 2,000 steps that drift and jitter: (2000, 50)"""
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(size=(2000, 50)) / 40, axis=0) + rng.normal(size=(2000, 50)) + 3


def test_exponents_are_those_of_the_paper():
    """Section 3.1: 0.05 and 0.10 are exponents 16.97 and 6.94."""
    assert (exponent_of(0.05), exponent_of(0.10)) == pytest.approx((16.97, 6.94), abs=0.01)
    assert exponent_of(MAX_LENGTH) == pytest.approx(0, abs=1e-6)
    for wrong in (0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match="relative length"):
            exponent_of(wrong)


@given(length=st.floats(0.01, 0.28))
def test_the_length_is_the_relative_standard_deviation_of_the_profile(length):
    exponent = exponent_of(length)
    moments = [(exponent + 1) / (exponent + 1 + power) for power in (1, 2)]  # of s/t
    assert (moments[1] - moments[0] ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_recursion_weighs_steps_by_the_power_function(length, walk):
    steps = np.arange(1, len(walk) + 1)
    powers = steps ** (exponent_of(length) + 1) - (steps - 1) ** (exponent_of(length) + 1)  # integrals of s^g over each step
    np.testing.assert_allclose(tracked(walk, length)[-1], (powers / powers.sum()) @ walk, rtol=1e-9)


@pytest.mark.parametrize("step", [1000, 2000])
@pytest.mark.parametrize("length", [0.06, *(pytest.param(length, marks=pytest.mark.slow) for length in (0.075, 0.09, 0.12))])
def test_a_combination_equals_an_average_that_was_tracked(length, step, walk):
    kept = [Average(at, of) for at in range(100, 2001, 100) for of in (0.05, 0.1)]
    snapshots = np.stack([tracked(walk, each.length)[each.step - 1] for each in kept])
    found, expected = combine(kept, Average(step, length)), tracked(walk, length)[step - 1]
    assert found.error < 0.02 and found.weights.sum() == pytest.approx(1, abs=1e-6)
    assert not found.weights[[each.step > step for each in kept]].any(), "weights of later steps are not in it"
    noise = np.abs(tracked(walk, 0.05)[step - 1] - expected).mean()
    assert np.abs(found.weights @ snapshots - expected).mean() < 0.05 * noise, "far closer than a kept average"


def test_weights_that_never_change_stay_what_they_are():
    kept = [Average(step, length) for step in (3, 6, 9) for length in (0.05, 0.1)]
    assert combine(kept, Average(9, 0.2)).weights.sum() == pytest.approx(1, abs=1e-9)


def test_an_average_that_was_kept_is_itself():
    kept = [Average(step, length) for step in (10, 20, 30) for length in (0.05, 0.1)]
    for number, average in enumerate(kept):
        found = combine(kept, average)
        np.testing.assert_allclose(found.weights, np.eye(6)[number], atol=1e-6)
        assert found.error < 1e-6


def test_few_averages_say_how_wrong_they_are(walk):
    kept = [Average(2000, 0.05), Average(2000, 0.1)]
    assert combine(kept, Average(2000, 0.075)).error < 0.1 < combine(kept, Average(2000, 0.25)).error
    with pytest.raises(ValueError, match="no average is kept up to step 10; the first is of step 2000"):
        combine(kept, Average(10, 0.1))


def test_files_are_summed_with_their_weights(tmp_path):
    tensors = [{"a": torch.randn(4, 3), "b": torch.randn(2)} for _ in range(3)]
    for number, each in enumerate(tensors):
        save_file(each, tmp_path / f"{number}.safetensors")
    weights = [0.5, -2.0, 2.5]
    found = read_combination([tmp_path / f"{number}.safetensors" for number in range(3)], weights)
    for name in ("a", "b"):
        expected = sum(weight * each[name].double() for weight, each in zip(weights, tensors, strict=True))
        assert torch.equal(found[name], expected.float())
