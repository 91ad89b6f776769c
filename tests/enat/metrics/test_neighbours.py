"""Neighbour scores equal brute force, bit by bit, however they are cut; and what others say they should be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from enat.metrics import neighbours
from enat.metrics.neighbours import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    manifold_counts,
    merge_counts,
    precision_recall,
    squared_radii,
)


def cloud(count, num_features=8, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(count, num_features))


def cluttered(count, seed):
    """Features on a coarse grid, with copies: most distances are equal to others, and many are 0."""
    return np.random.default_rng(seed).integers(0, 3, size=(count, 3)).astype(np.float64)


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that little data has many tiles."""
    monkeypatch.setattr(neighbours, "TILE_ROWS", 7)
    monkeypatch.setattr(neighbours, "TILE_COLUMNS", 11)


def plain_distances(first, second):
    """Squared, float64 (N, M), one by one."""
    return np.array([[np.square(a - b).sum() for b in second] for a in first])


def plain_radii(features, num_neighbours):
    distances = plain_distances(features, features)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, num_neighbours - 1]


def plain_precision_recall(reference, generated, num_neighbours):
    """Kynkaanniemi et al. 2019, eq. 2 and 3."""
    distances = plain_distances(generated, reference)
    precision = (distances <= plain_radii(reference, num_neighbours)).any(axis=1).mean()
    recall = (distances <= plain_radii(generated, num_neighbours)[:, None]).any(axis=0).mean()
    return PrecisionRecall(precision, recall)


def plain_density_coverage(reference, generated, num_neighbours):
    """Naeem et al. 2020, eq. 4 and 5, with the open balls of the authors' code."""
    in_ball = plain_distances(generated, reference) < plain_radii(reference, num_neighbours)
    return DensityCoverage(in_ball.sum(axis=1).mean() / num_neighbours, in_ball.any(axis=0).mean())


@pytest.mark.parametrize("make", [cloud, cluttered])
@pytest.mark.parametrize("num_neighbours", [1, 3, 5])
@pytest.mark.usefixtures("small_tiles")
def test_scores_equal_brute_force(make, num_neighbours):
    reference, generated = make(60, seed=0), make(50, seed=1)
    assert np.array_equal(squared_radii(reference, (num_neighbours,))[:, 0], plain_radii(reference, num_neighbours))
    expected = plain_precision_recall(reference, generated, num_neighbours)
    assert precision_recall(reference, generated, num_neighbours) == expected
    ours, expected = (score(reference, generated, num_neighbours) for score in (density_coverage, plain_density_coverage))
    assert (ours.density, ours.coverage) == pytest.approx((expected.density, expected.coverage), rel=1e-12)


@settings(max_examples=40)
@given(
    counts=st.tuples(st.integers(4, 25), st.integers(4, 25)),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    seed=st.integers(0, 1000),
    num_neighbours=st.integers(1, 3),
)
def test_ties_are_ties_also_far_from_zero(counts, offset, seed, num_neighbours):
    """Thirds are not exact in binary, and far from zero a matrix product has no digits left for their distances."""
    reference, generated = (cluttered(count, seed + i) / 3 + offset for i, count in enumerate(counts))
    assert precision_recall(reference, generated, num_neighbours) == plain_precision_recall(reference, generated, num_neighbours)
    density = density_coverage(reference, generated, num_neighbours)
    expected = plain_density_coverage(reference, generated, num_neighbours)
    assert (density.density, density.coverage) == pytest.approx((expected.density, expected.coverage), rel=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_tight_clusters_far_apart():
    """Distances within a cluster are far below the rounding errors of a matrix product, and there are more than candidates."""
    reference, generated = (np.repeat([[1e6], [-1e6]], 20, axis=0) + cloud(40, 3, seed, scale=1e-4) for seed in (0, 1))
    assert np.array_equal(squared_radii(reference, (3,))[:, 0], plain_radii(reference, 3))
    scores = precision_recall(reference, generated)
    assert 0 < scores.precision < 1
    assert scores == plain_precision_recall(reference, generated, 3)


def all_counts(reference, generated, cuts):
    """Radii and counts in blocks between cuts, computed backwards."""
    blocks = [(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(generated)], strict=True) if start < stop]
    limits = [(start, min(stop, len(reference))) for start, stop in blocks if start < len(reference)]
    if limits[-1][1] < len(reference):
        limits.append((limits[-1][1], len(reference)))
    reference_radii = np.concatenate([squared_radii(reference, (3, 5), start=start, stop=stop) for start, stop in limits])
    pieces = []
    for start, stop in reversed(blocks):
        radii = squared_radii(generated, (3,), start=start, stop=stop)[:, 0]
        pieces.append(manifold_counts(reference, reference_radii, generated, radii, start=start, stop=stop))
    return reference_radii, merge_counts(pieces)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cuts", [[1], [17, 18, 64], [50], list(range(5, 130, 5))])
def test_blocks_give_the_bits_of_all_at_once(cuts, dtype):
    reference, generated = cloud(140, 37, seed=0).astype(dtype), cloud(130, 37, seed=1, scale=0.9).astype(dtype)
    generated[100:110] = generated[3]
    reference[:4] = generated[3]
    expected_radii, expected = all_counts(reference, generated, [])
    radii, counts = all_counts(reference, generated, cuts)
    assert np.array_equal(radii, expected_radii)
    for name in ("start", "num_closed_balls", "num_open_balls", "is_recalled", "is_covered"):
        assert np.array_equal(getattr(counts, name), getattr(expected, name)), name
    assert counts.precision_recall() == precision_recall(reference, generated)
    assert counts.density_coverage() == density_coverage(reference, generated)


@pytest.mark.usefixtures("small_tiles")
def test_sizes_of_tiles_and_threads_change_no_bit(monkeypatch):
    features = cloud(90, 37)
    small = squared_radii(features, (1, 4))
    monkeypatch.undo()
    assert np.array_equal(squared_radii(features, (1, 4)), small)
    torch.set_num_threads(2)
    try:
        assert np.array_equal(squared_radii(features, (1, 4)), small)
    finally:
        torch.set_num_threads(1)


def test_radii_equal_scikit_learn():
    features = cloud(300, 20)
    distances, _ = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(features).kneighbors(features)
    np.testing.assert_allclose(squared_radii(features, (3, 5)), distances[:, [3, 5]] ** 2, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_precision_and_recall_equal_torch_fidelity(scale):
    reference, generated = cloud(400, 6), cloud(300, 6, seed=1, scale=scale)
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(reference), **options)
    ours = precision_recall(torch.from_numpy(reference), generated)
    assert ours.precision == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-6)
    assert ours.recall == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-6)


@pytest.mark.parametrize(("num_reference", "num_generated", "num_neighbours"), [(60, 40, 5), (50, 100, 3), (40, 40, 1)])
def test_density_and_coverage_of_one_distribution_are_as_expected(num_reference, num_generated, num_neighbours):
    """Naeem et al. 2020, lemmas 1 and 2: density 1; coverage 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k))."""
    rounds = [
        density_coverage(cloud(num_reference, 4, seed), cloud(num_generated, 4, seed + 10_000), num_neighbours)
        for seed in range(60)
    ]
    missed = 1.0
    for place in range(1, num_neighbours + 1):
        missed *= (num_reference - place) / (num_generated + num_reference - place)
    for values, expected in (([r.density for r in rounds], 1), ([r.coverage for r in rounds], 1 - missed)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / len(values) ** 0.5


def test_an_outlier_spoils_precision_but_not_density():
    """Naeem et al. 2020, fig. 2: one reference sample far away spans a ball that holds all generated samples around it."""
    reference = np.concatenate([cloud(100, 2), [[40.0, 0.0]]])
    generated = np.array([20.0, 0.0]) + cloud(50, 2, seed=1, scale=0.1)
    assert precision_recall(reference, generated, 5).precision == 1
    assert density_coverage(reference, generated, 5).density == pytest.approx(1 / 5)


def test_sets_far_apart_and_equal_sets():
    reference = cloud(50)
    assert precision_recall(reference, reference + 1e3) == PrecisionRecall(0, 0)
    assert density_coverage(reference, reference + 1e3) == DensityCoverage(0, 0)
    assert precision_recall(reference, reference) == PrecisionRecall(1, 1)
    assert density_coverage(reference, reference) == DensityCoverage(1, 1)


def test_a_set_of_copies_has_radius_zero(monkeypatch):
    """A generator that makes one image only. No pair of copies is computed, or 50,000 of them would take days."""
    copies = np.repeat(cloud(1), 3000, axis=0)

    def few_pairs(left, i, right, j):
        assert len(i) < 50
        return torch.zeros(len(i), dtype=torch.float64)

    monkeypatch.setattr(neighbours, "_exact", few_pairs)
    assert not squared_radii(copies, (1, 3, 2999)).any()
    reference = np.concatenate([copies[:1], copies[:20] + 100])
    counts = manifold_counts(reference, np.ones((21, 2)), copies, np.zeros(3000))
    assert (counts.num_closed_balls == 1).all() and (counts.num_open_balls == 1).all()
    assert counts.is_recalled.tolist() == counts.is_covered.tolist() == [True] + 20 * [False]


def test_copies_count_as_neighbours():
    features = np.array([[0.0], [0.0], [0.0], [1.0], [3.0], [-0.0]])
    expected = [[0, 0, 1, 9]] * 3 + [[1, 1, 1, 4]] + [[4, 9, 9, 9]] + [[0, 0, 1, 9]]
    assert squared_radii(features, (1, 3, 4, 5)).tolist() == [[row[0], row[1], row[2], row[3]] for row in expected]


def test_features_may_be_of_any_kind(tmp_path):
    features = cloud(40).astype(np.float16)
    expected = squared_radii(features.astype(np.float64), (3,))
    np.save(tmp_path / "features.npy", features)
    for same in (features, torch.from_numpy(features), np.load(tmp_path / "features.npy", mmap_mode="r")):
        assert np.array_equal(squared_radii(same, (3,)), expected)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda x: squared_radii(x, (3, 10)), "3, 10 neighbours .* 10 samples has 1 to 9"),
        (lambda x: squared_radii(x, (0,)), "^0 neighbours"),
        (lambda x: precision_recall(x, x[:, :4]), "width 8 and 4"),
        (lambda x: precision_recall(x, np.full((10, 8), np.nan)), "not finite"),
        (lambda x: density_coverage(x[:5], x), "5, 5 neighbours .* 5 samples"),
        (lambda x: manifold_counts(x, np.zeros((10, 1)), x, np.zeros(10)), r"\(10, 2\) and \(10,\) are needed"),
        (lambda x: manifold_counts(x, np.zeros((10, 2)), x, np.zeros(10), stop=4), r"\(10, 2\) and \(4,\) are needed"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, message):
    with pytest.raises(ValueError, match=message):
        score(cloud(10))


def test_blocks_that_leave_holes_or_overlap_are_refused():
    features = cloud(30)
    radii = squared_radii(features, (3, 5))
    pieces = [
        manifold_counts(features, radii, features, radii[start:stop, 0], start=start, stop=stop)
        for start, stop in ((0, 10), (10, 20), (15, 30))
    ]
    with pytest.raises(ValueError, match=r"from 20 .* starts at 15"):
        merge_counts(pieces)
    with pytest.raises(ValueError, match=r"from 0 .* starts at 10"):
        merge_counts(pieces[1:2])
