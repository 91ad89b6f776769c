"""Neighbour scores equal brute force, in any blocks and tiles, and what others say they should be."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from enat.metrics import neighbours
from enat.metrics.neighbours import ManifoldScores, manifold_counts, manifold_scores, scores_of_counts, squared_radii


def cloud(count, num_features=8, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(count, num_features))


def cluttered(count, seed):
    """Features on a coarse grid, with copies: most distances are equal to others, and many are 0."""
    return np.random.default_rng(seed).integers(0, 3, size=(count, 3)).astype(np.float64)


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that little data has many tiles."""
    monkeypatch.setattr(neighbours, "BLOCK_SIZE", 7)
    monkeypatch.setattr(neighbours, "TILE_COLUMNS", 11)


def plain_distances(first, second):
    """Squared, float64 (N, M), one by one."""
    return np.array([[np.square(a - b).sum() for b in second] for a in first])


def plain_radii(features, num_neighbours):
    distances = plain_distances(features, features)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, num_neighbours - 1]


def plain_scores(reference, generated, num_neighbours):
    """Kynkaanniemi et al. 2019, eq. 2 and 3; Naeem et al. 2020, eq. 4 and 5, with the open balls of the authors' code; Alaa et al.
    2022, with the closed balls of Stein et al. 2023."""
    distances = plain_distances(generated, reference)
    nearest = distances.argmin(axis=1)
    in_ball = distances < plain_radii(reference, num_neighbours[1])
    return ManifoldScores(
        precision=(distances <= plain_radii(reference, num_neighbours[0])).any(axis=1).mean(),
        recall=(distances <= plain_radii(generated, num_neighbours[0])[:, None]).any(axis=0).mean(),
        density=pytest.approx(in_ball.sum(axis=1).mean() / num_neighbours[1], rel=1e-12),
        coverage=in_ball.any(axis=0).mean(),
        authenticity=(distances.min(axis=1) > plain_radii(reference, 1)[nearest]).mean(),
    )


@pytest.mark.parametrize("make", [cloud, cluttered])
@pytest.mark.parametrize("num_neighbours", [(1, 1), (3, 5)])
@pytest.mark.usefixtures("small_tiles")
def test_scores_equal_brute_force(make, num_neighbours):
    reference, generated = make(60, seed=0), make(50, seed=1)
    radii = squared_radii(reference, num_neighbours, range(60))
    for column, count in enumerate(num_neighbours):
        np.testing.assert_allclose(radii[:, column], plain_radii(reference, count), rtol=1e-12, atol=1e-12)
    assert manifold_scores(reference, generated, num_neighbours) == plain_scores(reference, generated, num_neighbours)


@settings(max_examples=40)
@given(
    counts=st.tuples(st.integers(4, 25), st.integers(4, 25)),
    change=st.sampled_from([lambda x: x / 3, lambda x: x + 1e3, lambda x: x + 1e6]),
    seed=st.integers(0, 1000),
    num_neighbours=st.integers(1, 3),
)
def test_ties_are_ties_whatever_is_rounded(counts, change, seed, num_neighbours):
    """Thirds are not exact in binary, and far from zero a matrix product has no digits left for distances."""
    sets, both = [cluttered(count, seed + i) for i, count in enumerate(counts)], (num_neighbours, num_neighbours)
    assert manifold_scores(*map(change, sets), both) == plain_scores(*sets, both)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cuts", [[17, 18, 64], list(range(5, 130, 5))])
def test_blocks_give_the_same_counts_as_all_samples_at_once(cuts, dtype):
    reference, generated = cloud(140, 37, seed=0).astype(dtype), cloud(130, 37, seed=1, scale=0.9).astype(dtype)
    generated[100:110] = generated[3]
    reference[:4] = generated[3]
    blocks = [range(start, stop) for start, stop in pairwise([0, *cuts, 130])]
    reference_radii = np.concatenate([squared_radii(reference, (3, 5, 1), block) for block in (*blocks, range(130, 140))])
    everything = range(130)
    own_radii = squared_radii(generated, (3,), everything)[:, 0]
    whole = manifold_counts(reference, squared_radii(reference, (3, 5, 1), range(140)), generated, own_radii, everything)
    radii = [squared_radii(generated, (3,), block)[:, 0] for block in blocks]
    pieces = [manifold_counts(reference, reference_radii, generated, *of_block) for of_block in zip(radii, blocks, strict=True)]
    for name in ("num_closed_balls", "num_open_balls", "is_authentic"):
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name), name)
    assert scores_of_counts(pieces, 5) == manifold_scores(reference, generated) == scores_of_counts([whole], 5)


def test_radii_equal_scikit_learn():
    features = cloud(300, 20)
    distances, _ = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(features).kneighbors(features)
    np.testing.assert_allclose(squared_radii(features, (3, 5), range(300)), distances[:, [3, 5]] ** 2, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_precision_and_recall_equal_torch_fidelity(scale):
    reference, generated = cloud(400, 6), cloud(300, 6, seed=1, scale=scale)
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(reference), **options)
    ours = manifold_scores(torch.from_numpy(reference), generated)
    assert (ours.precision, ours.recall) == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]), abs=1e-6)


@pytest.mark.parametrize(("num_reference", "num_generated", "num_neighbours"), [(60, 40, 5), (50, 100, 3), (40, 40, 1)])
def test_density_and_coverage_of_one_distribution_have_their_expectations(num_reference, num_generated, num_neighbours):
    """Naeem et al. 2020, lemmas 1 and 2: density 1; coverage 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k))."""
    rounds = [
        manifold_scores(cloud(num_reference, 4, seed), cloud(num_generated, 4, seed + 10_000), (1, num_neighbours))
        for seed in range(60)
    ]
    places = np.arange(1, num_neighbours + 1)
    missed = np.prod((num_reference - places) / (num_generated + num_reference - places))
    for values, expected in (([r.density for r in rounds], 1), ([r.coverage for r in rounds], 1 - missed)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / len(values) ** 0.5


def test_outlier_spoils_precision_but_not_density():
    """Naeem et al. 2020, fig. 2: one reference sample far away spans a ball that holds all generated samples around it."""
    reference = np.concatenate([cloud(100, 2), [[40.0, 0.0]]])
    scores = manifold_scores(reference, np.array([20.0, 0.0]) + cloud(50, 2, seed=1, scale=0.1), (5, 5))
    assert (scores.precision, scores.density) == pytest.approx((1, 1 / 5))


def test_sets_far_apart_score_0_and_equal_sets_score_1():
    reference = cloud(50)
    assert manifold_scores(reference, reference + 1e3) == ManifoldScores(0, 0, 0, 0, authenticity=1)
    assert manifold_scores(reference, reference) == ManifoldScores(1, 1, 1, 1, authenticity=0)


def test_copies_are_neighbours_at_distance_0():
    features = np.array([[0.0], [0.0], [0.0], [1.0], [3.0], [-0.0]])
    expected = [[0, 0, 1, 9]] * 3 + [[1, 1, 1, 4]] + [[4, 9, 9, 9]] + [[0, 0, 1, 9]]
    np.testing.assert_allclose(squared_radii(features, (1, 3, 4, 5), range(6)), expected, atol=1e-14)
    copies = np.repeat(cloud(1), 1200, axis=0)  # a generator that makes one image only
    reference = np.concatenate([copies[:1], copies[:20] + 100])
    counts = manifold_counts(reference, np.ones((21, 3)), copies, squared_radii(copies, (1199,), range(1200))[:, 0], range(1200))
    assert (counts.num_closed_balls == 1).all() and (counts.num_open_balls == 1).all()
    assert counts.num_recalling.tolist() == counts.num_covering.tolist()
    assert (counts.num_recalling > 0).tolist() == [True] + 20 * [False]


def test_features_may_be_tensors_or_memory_mapped_and_of_half_precision(tmp_path):
    features = cloud(40).astype(np.float16)
    expected = squared_radii(features.astype(np.float64), (3,), range(40))
    np.save(tmp_path / "features.npy", features)
    for same in (features, torch.from_numpy(features), np.load(tmp_path / "features.npy", mmap_mode="r")):
        assert np.array_equal(squared_radii(same, (3,), range(40)), expected)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda x: squared_radii(x, (3, 10), range(10)), "3, 10 neighbours .* 10 samples has 1 to 9"),
        (lambda x: squared_radii(x, (0,), range(10)), "^0 neighbours"),
        (lambda x: manifold_scores(x, x[:, :4]), "width 8 and 4"),
        (lambda x: manifold_scores(x, np.full((10, 8), np.nan)), "not finite"),
        (lambda x: manifold_scores(x[:5], x), "3, 5, 1 neighbours .* 5 samples"),
    ],
)
def test_features_without_scores_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        score(cloud(10))


# Float32 and float64 -------------------------------------------------------------------------------------------------------


def _sets(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    first, second = (rng.normal(size=(size, 24)) for size in (300, 280))
    if kind == "copies":  # ties everywhere
        first, second = np.repeat(first[:40], 8, axis=0), np.concatenate([np.repeat(first[:20], 8, axis=0), second])
    if kind == "near copies":  # float32 cannot tell their distances
        first, second = (1 + 1e-7 * each for each in (first, second))
    if "clusters" in kind:  # far from their common centre, so that float32 orders some or all neighbours within one wrongly
        distance = 500 if kind == "far clusters" else 60
        first, second = (each + distance * rng.choice([-1.0, 1.0], (3, 24))[np.arange(len(each)) % 3] for each in (first, second))
    if kind == "far away":
        first, second = first + 1e4, second + 1e4
    if kind == "on a grid":  # many equal distances, on the surface of balls
        first, second = np.round(first[:, :3]), np.round(second[:, :3])
    return first.astype(np.float32), second.astype(np.float32)


@pytest.mark.parametrize("kind", ["usual", "copies", "near copies", "clusters", "far clusters", "far away", "on a grid"])
def test_float32_decides_as_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TILE_COLUMNS", 64)
    reference, generated = _sets(kind)
    places, rows = (3, 5, 1), range(len(reference))
    radii = neighbours.squared_radii(reference, places, rows)
    centre = neighbours._centre(reference)
    exact = neighbours._nearest(reference, neighbours._tile(reference, rows, centre, "cpu"), 6, centre)[:, list(places)].numpy()
    scale = np.square(reference - centre).sum(axis=1).max()
    np.testing.assert_allclose(radii, exact, rtol=1e-12, atol=1e-12 * scale)
    own = neighbours.squared_radii(generated, (3,), range(len(generated)))[:, 0]
    counts = neighbours.manifold_counts(reference, radii, generated, own, range(len(generated)))
    monkeypatch.setattr(
        neighbours, "_compare_by_screening", lambda x, y, radii, *_: neighbours._compare(x, y, radii, *neighbours._distances(x, y))
    )
    monkeypatch.setattr(neighbours._Nearest, "is_open", property(lambda self: torch.ones_like(self.samples, dtype=torch.bool)))
    plain = neighbours.manifold_counts(reference, radii, generated, own, range(len(generated)))
    for name, values in vars(plain).items():
        np.testing.assert_array_equal(getattr(counts, name), values, err_msg=name)


def test_few_pairs_are_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise float32 would save nothing."""
    num_pairs, compute = [], neighbours._pair_distances
    monkeypatch.setattr(neighbours, "_pair_distances", lambda *given: num_pairs.append(len(given[-1])) or compute(*given))
    monkeypatch.setattr(neighbours, "_nearest", None)
    reference, _ = _sets("usual")
    neighbours.squared_radii(reference, (3, 5), range(300))
    assert 600 <= sum(num_pairs) < 700, "one or two for each radius"
