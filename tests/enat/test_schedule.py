"""Schedules as functions of progress."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enat.schedule import guidance_weight, mask_ratio, num_masked_after, temperature


def test_the_published_numbers_of_masked_tokens():
    assert [num_masked_after(step, 8, 256) for step in range(8)] == [251, 236, 212, 181, 142, 97, 49, 0]


@given(num_steps=st.integers(1, 64), num_tokens=st.integers(1, 1024))
def test_fewer_and_fewer_tokens_are_masked_and_none_at_the_end(num_steps, num_tokens):
    counts = [num_tokens] + [num_masked_after(step, num_steps, num_tokens) for step in range(num_steps)]
    assert counts == sorted(counts, reverse=True)
    assert counts[1] < num_tokens
    assert counts[-1] == 0


def test_the_mask_ratio_goes_from_all_to_none_along_a_cosine():
    assert mask_ratio(0) == 1
    assert mask_ratio(1 / 3) == pytest.approx(3**0.5 / 2)
    assert mask_ratio(1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.5, 0.0])
def test_linear_guidance_starts_unguided_and_ramps_as_published(scale):
    assert guidance_weight(0, scale) == 1
    for step in range(8):
        assert guidance_weight(step / 8, scale) == pytest.approx(1 + (scale - 1) * step / 8)
    assert guidance_weight(0.3, scale, "constant") == scale


def test_temperatures_fall_linearly_to_exactly_zero():
    assert [temperature(progress, 6.0) for progress in (0, 0.25, 1)] == [6.0, 4.5, 0.0]


def test_unknown_schedules_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'sine'; choose one of cosine"):
        mask_ratio(0.5, "sine")
    with pytest.raises(ValueError, match="'square'; choose one of linear, constant"):
        guidance_weight(0.5, 2.0, "square")
