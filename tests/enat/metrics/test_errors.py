"""Standard errors of scores: influences are derivatives, and intervals hold the truth as often as they claim."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from enat.metrics import errors
from enat.metrics.errors import (
    extrapolated_frechet_distance,
    frechet_influence,
    inception_influence,
    kernel_influence,
    standard_error,
)
from enat.metrics.moments import FeatureMoments, FeatureStatistics, frechet_distance, inception_score, kernel_distance
from enat.metrics.neighbours import blocks_of, influences_of_counts, manifold_counts, scores_of_counts, squared_radii

F, CLASSES = 12, 5
_RNG = np.random.default_rng(0)
MEANS = _RNG.normal(size=(CLASSES, F)) * 0.5
MIXING = _RNG.normal(size=(F, F)) / np.sqrt(F) * np.linspace(1.5, 0.2, F)


def draw(count: int, seed: int, shift: float = 0.15, scale: float = 1.1) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes in turn, normal within each class, and their labels."""
    labels = np.arange(count) % CLASSES
    noise = np.random.default_rng(seed).normal(size=(count, F)) @ MIXING
    return MEANS[labels] + shift + scale * noise, labels


def truth(shift: float = 0.15, scale: float = 1.1) -> FeatureStatistics:
    """Mean and covariance of what draw() draws from."""
    between = np.cov(MEANS.T, bias=True)
    return FeatureStatistics(MEANS.mean(axis=0) + shift, scale**2 * MIXING.T @ MIXING + between)


REFERENCE = truth(0.0, 1.0)


def moments(features: np.ndarray) -> FeatureMoments:
    return FeatureMoments(features.shape[1]).add(features)


def bootstrap(score: Callable[[np.ndarray], float], labels: np.ndarray, draws: int) -> float:
    """The plain way: samples drawn again within each label. score: of indices."""
    rng, groups = np.random.default_rng(1), [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return float(np.std([score(np.concatenate([rng.choice(group, len(group)) for group in groups])) for _ in range(draws)]))


def mixed(features: np.ndarray, index: int, share: float) -> FeatureStatistics:
    """Of the samples with a little more of one of them."""
    weights = np.full(len(features), (1 - share) / len(features))
    weights[index] += share
    mean = weights @ features
    return FeatureStatistics(mean, (features - mean).T @ (weights[:, None] * (features - mean)))


def test_influences_on_the_frechet_distance_are_its_derivatives() -> None:
    features, _ = draw(60, 1)
    whole = FeatureStatistics(features.mean(axis=0), np.cov(features.T, bias=True))
    influence = frechet_influence(features, whole, REFERENCE)
    share = 1e-6
    for index in range(0, 60, 7):
        moved = [frechet_distance(mixed(features, index, sign * share), REFERENCE) for sign in (1, -1)]
        assert influence[index] == pytest.approx((moved[0] - moved[1]) / (2 * share), rel=1e-3, abs=1e-3)


def test_influences_on_inception_score_and_kernel_distance_are_their_derivatives() -> None:
    logits = np.random.default_rng(2).normal(size=(400, 7)) * 2
    influence = inception_influence(logits)
    for index in range(0, 400, 57):  # a copy of a sample moves the score by 1/N of its influence
        more = np.concatenate([logits, logits[[index]]])
        moved = inception_score(more, num_splits=1).value - inception_score(logits, num_splits=1).value
        assert influence[index] == pytest.approx(401 * moved, rel=0.02, abs=0.02)
    (x, _), (y, _) = draw(80, 3), draw(90, 4, 0.0, 1.0)
    kernel = lambda a, b: (a @ b.T / F + 1) ** 3  # noqa: E731
    own, cross = kernel(x, x), kernel(x, y)
    expected = 2 * ((own.sum(axis=1) - own.diagonal()) / 79 - cross.mean(axis=1))
    np.testing.assert_allclose(kernel_influence(x, y), expected - expected.mean(), rtol=1e-4, atol=1e-4)


def test_a_side_of_equal_images_and_classes_without_probability_have_finite_influences() -> None:
    features, _ = draw(60, 1)
    one = np.repeat(features[:1], 60, axis=0)
    for first, second in ((features, one), (one, features), (one, one)):
        found = frechet_influence(first, moments(first), moments(second))
        assert np.isfinite(found).all() and (np.abs(found).max() > 0.1) == (first is features)
    logits = np.array([[0.0, 1.0, -2000.0], [1.0, 0.0, -2000.0]])
    assert np.isfinite(inception_influence(logits)).all()


def test_labels_may_be_any_integers() -> None:
    values, labels = np.random.default_rng(3).normal(size=60), np.arange(60) % 4
    expected = standard_error(values, labels)
    assert expected != standard_error(values)
    assert standard_error(values, labels * 10**15 - 5) == standard_error(values, labels - 1) == pytest.approx(expected)
    np.testing.assert_array_equal(labels, np.arange(60) % 4)  # unchanged


def test_kernels_of_many_samples_are_estimated_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, labels), (y, _) = draw(600, 3), draw(500, 4, 0.0, 1.0)
    exact = standard_error(kernel_influence(x, y), labels)
    monkeypatch.setattr(errors, "_KERNEL_COLUMNS", 200)
    assert exact < standard_error(kernel_influence(x, y), labels) < 1.3 * exact, "rather too large than too small"


def test_errors_agree_with_a_bootstrap() -> None:
    features, labels = draw(600, 5)
    fast = standard_error(frechet_influence(features, moments(features), REFERENCE), labels)
    slow = bootstrap(lambda chosen: frechet_distance(moments(features[chosen]), REFERENCE), labels, 200)
    assert fast == pytest.approx(slow, rel=0.2)
    logits = features[:, :7] * 2
    assert standard_error(inception_influence(logits), labels) == pytest.approx(
        bootstrap(lambda chosen: inception_score(logits[chosen], num_splits=1).value, labels, 200), rel=0.2
    )


def _share_held(values: np.ndarray, found: np.ndarray, expected: float | None = None) -> float:
    """Share of 95% intervals that hold the expected value, by default the mean of all repetitions."""
    return float((np.abs(values - (values.mean() if expected is None else expected)) < 1.96 * found).mean())


REPETITIONS = 100


@pytest.mark.slow
def test_95_percent_intervals_hold_the_truth() -> None:
    """The distance at N: the mean over sets. The distance at infinity: that of the distributions. The kernel distance likewise."""
    real, _ = draw(250, 7, 0.0, 1.0)
    found = []
    for seed in range(REPETITIONS):
        features, labels = draw(250, 1000 + seed)
        own = moments(features)
        influence = frechet_influence(features, own, REFERENCE)
        infinity = extrapolated_frechet_distance(features, influence, REFERENCE, labels)
        kernel = kernel_distance(features, real, 1, 250, seed=0)
        found.append(
            [
                frechet_distance(own, REFERENCE),
                standard_error(influence, labels),
                infinity.value,
                infinity.error,
                kernel.value,
                standard_error(kernel_influence(features, real), labels),
            ]
        )
    distance, distance_se, infinite, infinite_se, kernel_value, kernel_se = np.array(found).T
    exact = frechet_distance(truth(), REFERENCE)
    assert distance.mean() > exact + 3 * distance.std() / np.sqrt(REPETITIONS), "the distance at N is biased"
    assert 0.90 <= _share_held(distance, distance_se) <= 0.99
    assert 0.90 <= _share_held(infinite, infinite_se, exact) <= 0.99
    assert 0.90 <= _share_held(kernel_value, kernel_se) <= 0.99


def test_influences_on_neighbour_scores_are_those_of_leaving_a_sample_out() -> None:
    (generated, _), (reference, _) = draw(40, 8), draw(60, 9, 0.0, 1.0)
    radii = squared_radii(reference, (3, 5, 1), range(60))
    own = squared_radii(generated, (3,), range(40))[:, 0]
    blocks = [range(15), range(15, 40)]
    counts = [manifold_counts(reference, radii, generated, own[list(block)], block) for block in blocks]
    influences, whole = influences_of_counts(counts, 5), scores_of_counts(counts, 5)
    expected: dict[str, list[float]] = {name: [] for name in influences}
    for left_out in range(40):
        kept = np.delete(np.arange(40), left_out)
        without = scores_of_counts([manifold_counts(reference, radii, generated[kept], own[kept], range(39))], 5)
        for name, losses in expected.items():
            factor = 40 if name in ("recall", "coverage") else 39  # sums, and means
            losses.append(factor * (getattr(whole, name) - getattr(without, name)))
    for name, losses in expected.items():
        np.testing.assert_allclose(influences[name], np.array(losses) - np.mean(losses), atol=1e-9, err_msg=name)
    assert blocks_of(40) == [range(40)]


def test_what_differs_between_labels_is_no_error() -> None:
    values, labels = np.array([1.0, 2.0, 11.0, 12.0]), np.array([0, 0, 1, 1])
    assert standard_error(values, labels) == pytest.approx(np.sqrt(2 * 2 * 0.5) / 4)
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert standard_error(values, np.arange(4)) == standard_error(values), "labels with one sample are one group"
    assert standard_error(values[:3], labels[:3]) > 0
    with pytest.raises(ValueError, match="at least 2 samples"):
        standard_error(values[:1])


def test_every_beginning_of_an_order_has_its_share_of_each_label() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = errors._order_by_shares(labels, np.random.default_rng(0))
    assert sorted(order) == [*range(100)]
    for size in (10, 50, 90):
        assert np.abs(np.bincount(labels[order[:size]], minlength=3) - np.array([0.6, 0.3, 0.1]) * size).max() <= 1
