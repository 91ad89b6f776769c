"""Training masks: how many, where, and what the earlier step saw."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from enat.training.masking import MaskingConfig, box_mask, mask_codes

MASK_ID = 99


def codes_of(num_images, num_tokens):
    """Every position holds another code, so that a moved token would show."""
    return torch.arange(num_images * num_tokens).reshape(num_images, num_tokens) % MASK_ID


@given(
    num_images=st.integers(1, 5),
    num_tokens=st.integers(2, 40),
    alpha=st.floats(0.05, 50),
    beta=st.floats(0.05, 50),
    seed=st.integers(0, 2**32),
)
def test_masks_of_any_draw_are_valid(num_images, num_tokens, alpha, beta, seed):
    codes = codes_of(num_images, num_tokens)
    masked = mask_codes(codes, MASK_ID, MaskingConfig(alpha=alpha, beta=beta), np.random.default_rng(seed))

    # Every row has the same number, at least one token masked and one visible; visible tokens are the codes.
    mask = masked.tokens == MASK_ID
    assert 1 <= masked.num_masked <= num_tokens - 1
    assert (mask.sum(dim=1) == masked.num_masked).all()
    assert torch.equal(masked.tokens[~mask], codes[~mask])

    # The earlier step masks all tokens that are masked now, and more.
    if masked.previous_tokens is not None:
        previous_mask = masked.previous_tokens == MASK_ID
        assert masked.num_masked <= masked.previous_num_masked <= num_tokens
        assert (previous_mask.sum(dim=1) == masked.previous_num_masked).all()
        assert (previous_mask | ~mask).all()
        assert torch.equal(masked.previous_tokens[~previous_mask], codes[~previous_mask])


@pytest.mark.parametrize(("alpha", "beta", "num_masked"), [(1e6, 1e-3, 15), (1e-3, 1e6, 1)])
def test_number_of_masked_tokens_is_clamped(alpha, beta, num_masked):
    rng = np.random.default_rng(0)
    config = MaskingConfig(alpha=alpha, beta=beta)
    assert {mask_codes(codes_of(1, 16), MASK_ID, config, rng).num_masked for _ in range(20)} == {num_masked}


def test_positions_are_uniform_and_rows_independent():
    num_images, num_tokens = 20000, 16
    config = MaskingConfig(alpha=5, beta=8, reuse_probability=1)
    masked = mask_codes(codes_of(num_images, num_tokens), MASK_ID, config, np.random.default_rng(0))
    assert masked.num_masked < masked.previous_num_masked < num_tokens
    for tokens, count in ((masked.tokens, masked.num_masked), (masked.previous_tokens, masked.previous_num_masked)):
        mask = (tokens == MASK_ID).double()
        share = count / num_tokens
        error = (share * (1 - share) / num_images) ** 0.5
        assert (mask.mean(dim=0) - share).abs().max() < 4.5 * error
        # Two positions are masked together as often as in a draw without replacement.
        together = (mask.t() @ mask / num_images)[~torch.eye(num_tokens, dtype=torch.bool)]
        expected = share * (count - 1) / (num_tokens - 1)
        assert (together - expected).abs().max() < 5.5 * (expected * (1 - expected) / num_images) ** 0.5
    assert len(torch.unique(masked.tokens == MASK_ID, dim=0)) > 100


def test_earlier_step_hides_a_uniform_share_of_the_visible_tokens():
    rng = np.random.default_rng(0)
    config = MaskingConfig(alpha=1, beta=1, reuse_probability=1)
    shares = []
    for _ in range(2000):
        masked = mask_codes(codes_of(1, 400), MASK_ID, config, rng)
        shares.append((masked.previous_num_masked - masked.num_masked) / (400 - masked.num_masked))
    deciles = np.histogram(shares, bins=10, range=(0, 1))[0] / 2000
    assert np.abs(deciles - 0.1).max() < 4.5 * (0.1 * 0.9 / 2000) ** 0.5


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 440, 560), (1.0, 1000, 1000)])
def test_reuse_happens_with_its_probability(probability, low, high):
    rng = np.random.default_rng(0)
    config = MaskingConfig(reuse_probability=probability)
    draws = [mask_codes(codes_of(1, 16), MASK_ID, config, rng) for _ in range(1000)]
    assert low <= sum(masked.previous_tokens is not None for masked in draws) <= high
    assert all(masked.previous_num_masked == 0 for masked in draws if masked.previous_tokens is None)


def test_same_generator_state_gives_the_same_masks():
    first, second = (mask_codes(codes_of(4, 16), MASK_ID, MaskingConfig(), np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert first.num_masked == second.num_masked
    assert first.previous_num_masked == second.previous_num_masked


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"reuse_probability": 1.5}, "reuse_probability is 1.5"),
    ],
)
def test_impossible_distribution_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**overrides)


@pytest.mark.parametrize("reuse_probability", [0.0, 1.0])
def test_rows_are_the_same_masked_codes_of_some_images(reuse_probability):
    masked = mask_codes(codes_of(5, 16), MASK_ID, MaskingConfig(reuse_probability=reuse_probability), np.random.default_rng(0))
    parts = [masked.rows(slice(0, 2)), masked.rows(slice(2, 5))]
    assert torch.equal(torch.cat([part.tokens for part in parts]), masked.tokens)
    assert {part.num_masked for part in parts} == {masked.num_masked}
    assert {part.previous_num_masked for part in parts} == {masked.previous_num_masked}
    if reuse_probability:
        assert torch.equal(torch.cat([part.previous_tokens for part in parts]), masked.previous_tokens)
    else:
        assert [part.previous_tokens for part in parts] == [None, None]


def test_box_mask_is_true_inside_the_box():
    mask = box_mask(4, top=1, left=2, height=2, width=1)
    assert mask.view(4, 4).tolist() == [[False] * 4, [False, False, True, False], [False, False, True, False], [False] * 4]
    assert box_mask(3, top=0, left=0, height=3, width=3).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"top": 0, "left": 0, "height": 0, "width": 2}, "the box is 0 x 2 tokens"),
        ({"top": 3, "left": 0, "height": 2, "width": 2}, "rows 3 to 4 and columns 0 to 1; the grid has 0 to 3"),
        ({"top": 0, "left": -1, "height": 2, "width": 2}, "columns -1 to 0"),
    ],
)
def test_empty_box_or_box_beyond_the_grid_is_refused(box, message):
    with pytest.raises(ValueError, match=message):
        box_mask(4, **box)


def test_numbers_of_masked_tokens_are_rounded_and_follow_the_beta_distribution():
    rng, num_tokens, num_draws = np.random.default_rng(0), 16, 5000
    counts = [mask_codes(codes_of(1, num_tokens), MASK_ID, MaskingConfig(), rng).num_masked for _ in range(num_draws)]
    # Each number takes the ratios that round to it, the first and the last also what is beyond.
    below = beta_distribution(12, 3).cdf((np.arange(1, num_tokens - 1) + 0.5) / num_tokens)
    probs = np.diff(below, prepend=0, append=1)
    deviation = np.bincount(counts, minlength=num_tokens)[1:] - num_draws * probs
    assert (np.abs(deviation) < 4.5 * np.sqrt(num_draws * probs) + 1).all()
