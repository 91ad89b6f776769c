"""Moments in pieces equal moments of all data; distances and scores equal other people's and their closed forms."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from enat.metrics.moments import (
    CHUNK,
    FeatureMoments,
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distances,
    kernel_subsets,
    load_moments,
)
from references import plain
from references.precise import precise_distance


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


@given(
    count=st.integers(2, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_moments_of_any_pieces_equal_those_of_numpy(count, cuts, seed, dtype):
    """In any order and precision; and adding or merging changes neither features nor other moments."""
    features = torch.from_numpy(drawn_features(count, 5, seed)).to(dtype)
    values, pieces = features.double().numpy(), features.tensor_split(sorted(min(cut, count) for cut in cuts))  # some are empty
    added, merged, backwards = FeatureMoments(5), FeatureMoments(5), FeatureMoments(5)
    for piece in pieces:
        added.add(piece)
        merged.merge(moments_of(piece))
    for other in map(moments_of, pieces[::-1]):
        count_before, mean = backwards.count, backwards.mean.copy()
        before, backwards = backwards, other.merge(backwards)
        assert before.count == count_before and np.array_equal(before.mean, mean)
    for moments in (added, merged, backwards):
        assert_moments_equal_numpy(moments, values)
    assert np.array_equal(features.double().numpy(), values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_and_change_nothing(value):
    moments, features = moments_of(drawn_features(20, 4)), drawn_features(3, 4)
    features[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        moments.add(features)
    assert_moments_equal_numpy(moments, drawn_features(20, 4))


def test_memory_does_not_grow_with_the_number_of_samples():
    """A copy in float64 of these features would be 24 MB; one chunk is 1 MB."""
    features = np.random.default_rng(0).normal(size=(24 * CHUNK + 5, 32)).astype(np.float32) + 3
    tracemalloc.start()
    moments = moments_of(features)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4e6
    assert_moments_equal_numpy(moments, features.astype(np.float64))


def test_large_mean_costs_no_precision():
    """A sum of squares would keep four digits of this covariance."""
    features = drawn_features(1000, 6) + 1e6
    moments = FeatureMoments(6)
    for piece in np.array_split(features, 37):
        moments.add(piece)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("num_features", "counts"), [(1, (50, 60)), (8, (100, 70)), (64, (500, 300))])
def test_distance_equals_the_matrix_square_root(num_features, counts):
    if num_features == 1:  # closed form: (mu1 - mu2)^2 + (sigma1 - sigma2)^2
        first, second = (drawn_features(count, 1, seed) for seed, count in enumerate(counts))
        expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    else:
        first, second = (drawn_features(count, num_features, seed) for seed, count in enumerate(counts))
        expected = plain.frechet_distance(first, second)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


def test_distance_equals_torch_fidelity():
    """Which takes the mean in the features' own float32, hence the tolerance."""
    first, second = (torch.from_numpy(drawn_features(400, 32, seed)).float() for seed in (0, 1))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-5)


def test_distance_to_40_digits():
    first, second = (drawn_features(130, 12, seed).astype(np.float32) for seed in (3, 4))
    expected = precise_distance(first, second)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [200, 10, 2])
def test_distance_of_a_shifted_set_is_its_shift(count):
    """Also with fewer samples than features, where covariances are singular."""
    features, shift = drawn_features(count, 32), np.linspace(-1, 1, 32)
    moments, scale = moments_of(features), np.trace(moments_of(features).covariance)
    assert frechet_distance(moments, moments_of(features + shift)) == pytest.approx((shift**2).sum(), rel=1e-9)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-10 * scale)


@pytest.mark.parametrize("is_turned", [False, True])
def test_subspaces_without_overlap(is_turned):
    """Nothing of one covariance meets the other: the trace of the root is zero. Turned, rounding hides the zeros."""
    features = drawn_features(30, 8)
    first, second = np.zeros((30, 16)), np.zeros((30, 16))
    first[:, :8], second[:, 8:] = features - features.mean(axis=0), features - features.mean(axis=0)
    if is_turned:
        basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))
        first, second = first @ basis, second @ basis
    expected = 2 * np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


@given(seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)), counts=st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_distance_is_symmetric_and_not_negative(seeds, counts):
    first, second = (moments_of(drawn_features(count, 6, seed)) for seed, count in zip(seeds, counts, strict=True))
    distance = frechet_distance(first, second)
    assert distance >= 0
    scale = np.trace(first.covariance) + np.trace(second.covariance)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-9, abs=1e-9 * scale)


def test_published_statistics_replace_moments(tmp_path):
    features, others = drawn_features(50, 6), drawn_features(40, 6, 1)
    expected = frechet_distance(moments_of(features), moments_of(others))
    statistics = FeatureStatistics(others.mean(axis=0), np.cov(others, rowvar=False))
    assert frechet_distance(moments_of(features), statistics) == pytest.approx(expected, rel=1e-12)
    path = tmp_path / "moments.safetensors"
    for kept in (statistics, FeatureStatistics(statistics.mean, statistics.covariance, 40), moments_of(others)):
        kept.save(path)
        loaded = load_moments(path)
        assert (type(loaded), loaded.count) == (type(kept), kept.count)
        assert np.array_equal(loaded.mean, kept.mean)
        assert np.array_equal(loaded.covariance, kept.covariance)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="moments of features, but weight"):
        load_moments(path)


@pytest.mark.parametrize(("count", "num_splits"), [(100, 10), (103, 7), (10, 10), (2 * CHUNK + 5, 1)])
def test_inception_score_equals_torch_fidelity(count, num_splits):
    logits = 3 * torch.from_numpy(drawn_features(count, 20)).float()
    theirs = isc_features_to_metric(logits, splits=num_splits, shuffle=True, rng_seed=2020)
    score = inception_score(logits, num_splits)
    assert score.value == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert score.std == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-12)
    ordered = isc_features_to_metric(logits, splits=num_splits, shuffle=False)
    assert inception_score(logits.numpy(), num_splits, seed=None).value == pytest.approx(ordered[KEY_METRIC_ISC_MEAN], rel=1e-9)


def test_adm_splits_have_one_size_except_the_last():
    logits = drawn_features(23, 6)
    parts = [inception_score(logits[start : start + 10], 1, seed=None).value for start in (0, 10, 20)]
    assert inception_score(logits, split_size=10, seed=None).value == pytest.approx(np.mean(parts), rel=1e-12)
    assert inception_score(logits, split_size=23, seed=None) == inception_score(logits, 1, seed=None)
    assert inception_score(np.ones((50, 7)), 5).value == pytest.approx(1, rel=1e-12), "all images are alike"
    assert inception_score(np.tile(2000 * np.eye(7), (5, 1)), 5, seed=None).value == pytest.approx(7, rel=1e-12)


@pytest.mark.parametrize("counts", [(80, 80), (120, 75)])
def test_kernel_distance_equals_torch_fidelity(counts):
    generated, reference = (torch.from_numpy(drawn_features(count, 16, seed)) for seed, count in enumerate(counts))
    options = {"kid_subsets": 7, "kid_subset_size": 50, "rng_seed": 11, "verbose": False}
    theirs = kid_features_to_metric(generated, reference, **options)
    distance = kernel_distance(generated, reference, 7, 50, seed=11)
    assert distance.value == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert distance.std == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-9)


def test_threads_change_no_bit_of_the_kernel_distance():
    generated, reference = (torch.randn(400, 600, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    subsets, before = kernel_subsets((400, 400), 6, 300, 0), torch.get_num_threads()
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        found.append(kernel_distances(generated, reference, subsets).tolist())
        assert torch.get_num_threads() == num_threads, "as before"
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert kernel_distances(generated, reference, subsets[2:3]).tolist() == found[0][2:3], "nor does their distribution"


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it scatters around zero; the biased estimate is positive."""
    sets = np.random.default_rng(0).normal(size=(2, 2000, 8))
    distance = kernel_distance(*sets, num_subsets=200, subset_size=50)
    assert abs(distance.value) < 4 * distance.std / 200**0.5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: FeatureMoments(5).add(x), r"\(B, 5\) is needed"),
        (lambda x: FeatureMoments(4).add(x[0]), r"\(B, 4\) is needed"),
        (lambda x: moments_of(x[:1]).covariance, "at least 2 samples; there are 1"),
        (lambda x: moments_of(x).merge(FeatureMoments(3)), "3 features cannot be merged"),
        (lambda x: frechet_distance(moments_of(x), moments_of(x[:, :3])), "width 4 and 3"),
        (lambda x: FeatureStatistics(np.zeros(3), np.eye(4)), r"\(F,\) and \(F, F\) are needed"),
        (lambda x: FeatureStatistics(np.zeros((3, 1)), np.eye(3)), r"\(F,\) and \(F, F\) are needed"),
        (lambda x: FeatureStatistics(np.zeros(0), np.zeros((0, 0))), r"\(F,\) and \(F, F\) are needed"),
        (lambda x: FeatureStatistics(np.zeros(3), np.full((3, 3), np.nan)), "not finite"),
        (lambda x: FeatureStatistics(np.zeros(3), np.tri(3)), "not symmetric"),
        (lambda x: FeatureStatistics(np.zeros(3), -np.eye(3)), "negative variances"),
        (lambda x: inception_score(x, 11), "10 samples cannot be cut into 11 splits"),
        (lambda x: inception_score(x[:, 0]), r"shape \(N, F\) are needed"),
        (lambda x: inception_score(np.full((10, 4), np.nan)), "logits hold values that are not finite"),
        (lambda x: kernel_distance(x, x[:, :2], 5, 5), "width 4 and 2"),
        (lambda x: kernel_distance(x, x[:6], 5, 7), "subsets of 7 cannot be drawn from 10 generated and 6"),
        (lambda x: kernel_distance(x, torch.full((10, 4), torch.inf), 5, 5), "reference features hold values"),
        (lambda x: kernel_distance(x.astype(int), x, 5, 5), "floats of shape"),
    ],
)
def test_unsuitable_features_and_statistics_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(drawn_features(10, 4))
