"""Moments in pieces equal moments of all data; the Frechet distance equals other people's and its closed forms."""

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from enat.metrics import FeatureMoments, frechet_distance


def drawn_features(count, num_features, seed=0):
    """float64 (B, F), correlated, with another mean and spread for every seed."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features)) / num_features**0.5
    return rng.normal(size=(count, num_features)) @ mixing + rng.normal(size=num_features)


def moments_of(features):
    return FeatureMoments(features.shape[1]).add(features)


def assert_moments_equal_numpy(moments, features, tolerance=1e-12):
    assert moments.count == len(features)
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False, ddof=1)
    np.testing.assert_allclose(moments.mean, mean, rtol=tolerance, atol=tolerance * np.abs(mean).max())
    np.testing.assert_allclose(moments.covariance, covariance, rtol=tolerance, atol=tolerance * np.abs(covariance).max())


@given(count=st.integers(2, 60), cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 1000))
def test_moments_of_any_pieces_equal_numpy_on_all(count, cuts, seed):
    features = drawn_features(count, 5, seed)
    pieces = np.split(features, sorted(min(cut, count) for cut in cuts))  # some of them empty

    added = FeatureMoments(5)
    for piece in pieces:
        added.add(piece)
    assert_moments_equal_numpy(added, features)

    merged = FeatureMoments(5)
    for piece in pieces:
        merged.merge(moments_of(piece))
    assert_moments_equal_numpy(merged, features)

    backwards = FeatureMoments(5)
    for piece in pieces[::-1]:
        backwards = moments_of(piece).merge(backwards)
    assert_moments_equal_numpy(backwards, features)


def test_merging_leaves_the_other_one_as_it_was():
    first, second = (moments_of(drawn_features(20, 4, seed)) for seed in (0, 1))
    count, mean, covariance = second.count, second.mean.copy(), second.covariance.copy()
    first.merge(second)
    assert second.count == count
    assert np.array_equal(second.mean, mean)
    assert np.array_equal(second.covariance, covariance)


def test_a_large_mean_costs_no_precision():
    """A sum of squares would keep four digits of this covariance."""
    features = drawn_features(1000, 6) + 1e6
    moments = FeatureMoments(6)
    for piece in np.array_split(features, 37):
        moments.add(piece)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-8)


def test_float32_features_are_summed_in_float64():
    features = torch.from_numpy(drawn_features(500, 4)).float()
    moments = FeatureMoments(4)
    for piece in features.split(7):
        moments.add(piece)
    assert_moments_equal_numpy(moments, features.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_are_taken(dtype):
    features = torch.from_numpy(drawn_features(50, 4)).to(dtype)
    assert_moments_equal_numpy(FeatureMoments(4).add(features), features.double().numpy())


def test_moments_round_trip_exactly(tmp_path):
    moments = moments_of(drawn_features(20, 4))
    moments.save(tmp_path / "moments.safetensors")
    loaded = FeatureMoments.load(tmp_path / "moments.safetensors")
    assert loaded.count == moments.count
    assert np.array_equal(loaded.mean, moments.mean)
    assert np.array_equal(loaded.covariance, moments.covariance)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 5, 1)])
def test_features_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 5\) is needed"):
        FeatureMoments(5).add(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_and_leave_no_trace(value):
    moments = moments_of(drawn_features(20, 4))
    features = drawn_features(3, 4)
    features[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        moments.add(features)
    assert_moments_equal_numpy(moments, drawn_features(20, 4))


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples; there are 1"):
        _ = moments_of(np.zeros((1, 3))).covariance


@pytest.mark.parametrize(("num_features", "counts"), [(1, (50, 60)), (8, (100, 70)), (64, (500, 300))])
def test_the_distance_equals_the_matrix_square_root(num_features, counts):
    if num_features == 1:  # closed form: (mu1 - mu2)^2 + (sigma1 - sigma2)^2
        first, second = (drawn_features(count, 1, seed) for seed, count in enumerate(counts))
        expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    else:
        first, second = (drawn_features(count, num_features, seed) for seed, count in enumerate(counts))
        expected = plain.frechet_distance(first, second)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


def test_the_distance_equals_torch_fidelity():
    """Which takes the mean in the features' own float32, hence the tolerance."""
    first, second = (torch.from_numpy(drawn_features(400, 32, seed)).float() for seed in (0, 1))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-5)


@pytest.mark.parametrize("count", [200, 10, 2])
def test_a_set_has_no_distance_to_itself(count):
    """Also with fewer samples than features, where covariances are singular."""
    moments = moments_of(drawn_features(count, 32))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-10 * np.trace(moments.covariance))


@pytest.mark.parametrize("count", [200, 10])
def test_a_shifted_set_is_as_far_as_its_shift(count):
    features, shift = drawn_features(count, 32), np.linspace(-1, 1, 32)
    assert frechet_distance(moments_of(features), moments_of(features + shift)) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_singular_covariances_change_nothing():
    """Features of 6 dimensions laid into 40 span a subspace; distances within it are those of the 6 dimensions."""
    first, second = (drawn_features(count, 6, seed) for seed, count in enumerate((80, 90)))
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 6)))
    expected = frechet_distance(moments_of(first), moments_of(second))
    assert frechet_distance(moments_of(first @ basis.T), moments_of(second @ basis.T)) == pytest.approx(expected, rel=1e-6)


def test_subspaces_without_overlap():
    """Nothing of one covariance meets the other: the trace of the root is zero."""
    features = drawn_features(30, 8)
    first, second = np.zeros((30, 16)), np.zeros((30, 16))
    first[:, :8], second[:, 8:] = features - features.mean(axis=0), features - features.mean(axis=0)
    expected = 2 * np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


@given(seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)), counts=st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_the_distance_is_symmetric_and_not_negative(seeds, counts):
    first, second = (moments_of(drawn_features(count, 6, seed)) for seed, count in zip(seeds, counts, strict=True))
    distance = frechet_distance(first, second)
    assert distance >= 0
    scale = np.trace(first.covariance) + np.trace(second.covariance)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-9, abs=1e-9 * scale)


def test_features_of_two_widths_cannot_be_compared():
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(moments_of(np.eye(3)), moments_of(np.eye(4)))
