"""Standard errors of scores from a single set of samples, and the Fréchet distance at infinitely many samples.

A score is a function of the distribution of the samples. To first order it moves by the mean of an influence over the samples
(the infinitesimal jackknife: Jaeckel 1972; Efron 1982, chapter 6), so its error is that of a mean. Two scores of samples with the
same labels in the same order can be compared in pairs: the error of their difference is that of the difference of influences. The
reference set is taken as given. A bootstrap over the samples costs some hundred times as much and is wider, because the distance
of a resampled set is biased.

Shape legend: N generated samples, M reference samples, F features, S subset sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.moments import (
    CHUNK,
    FeatureMoments,
    Features,
    Moments,
    check_features,
    check_same_width,
    cubic_kernel,
    factor,
    take_rows,
)

_MIN_SHARE = 1e-10  # of the largest eigenvalue; the directions below it hold no samples
MIN_EXTRAPOLATED = 4  # samples for each feature; with fewer, distances are far from linear in 1/N
_NUM_SIZES = 5
_FEW_FEATURES = 512
_KERNEL_COLUMNS = 2000  # samples of each side that estimate the mean kernel of a sample


def standard_error(influence: np.ndarray, labels: np.ndarray | None = None) -> float:
    """The standard error of a score from the influences of its samples, or of a difference from the differences of influences.

    influence: float (N,).   labels: int (N,), if samples were drawn for given labels: differences between labels are then not
    errors. A label with one sample has no variance of its own; such samples are one group.
    Raises ValueError for fewer than two samples.
    """
    if len(influence) < 2:
        raise ValueError(f"a standard error needs at least 2 samples; there are {len(influence)}")
    weights = np.full(len(influence), 1 / len(influence))
    return _weighted_error(influence, weights, np.zeros(len(influence), np.int64) if labels is None else labels)


def _weighted_error(influence: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> float:
    """Of the weighted sum of influences."""
    is_compact = labels.min() >= 0 and labels.max() < len(labels)  # as classes are; sorting would take most of the time
    groups = labels.copy() if is_compact else np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(groups)
    rest = len(counts)  # the group of labels with one sample
    groups[counts[groups] == 1] = rest
    if (groups == rest).sum() == 1:  # a single sample has no variance, also as a group
        groups[groups == rest] = groups.min()
    sums, counts = np.bincount(groups, influence), np.bincount(groups)
    deviations = influence - (sums / np.maximum(counts, 1))[groups]
    variances = np.bincount(groups, deviations**2) / np.maximum(counts - 1, 1)
    return float(np.sqrt((np.bincount(groups, weights**2) * variances).sum()))


# Fréchet distance ----------------------------------------------------------------------------------------------------------


def frechet_influence(features: Features, generated: Moments, reference: Moments) -> np.ndarray:
    """Influence of each sample on the Fréchet distance: float64 (N,), with mean 0.

    With factors S2 = B B^T the gradient by the covariance S1 is I - B (B^T S1 B)^(-1/2) B^T.
    features: float (N, F), of the samples whose moments are `generated`. Raises ValueError for different widths.
    """
    check_features(features)
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"features of width {features.shape[1]} and {len(reference.mean)} cannot be compared")
    shift, b = generated.mean - reference.mean, factor(reference.covariance)
    values, vectors = np.linalg.eigh(b.T @ generated.covariance @ b)
    kept = values > values.max(initial=0.0) * _MIN_SHARE  # none if one side has a single image
    root = torch.from_numpy(b @ (vectors[:, kept] * values[kept] ** -0.25)).float()
    influence = np.empty(len(features))
    for start in range(0, len(features), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(features)))
        x = take_rows(features, rows) - generated.mean
        kept_parts = (torch.from_numpy(x).float() @ root).square().sum(dim=1, dtype=torch.float64).numpy()
        influence[rows] = 2 * x @ shift + np.square(x).sum(axis=1) - kept_parts
    return influence - influence.mean()


@dataclass(frozen=True)
class Extrapolation:
    """A distance at infinitely many samples, and its standard error."""

    value: float
    error: float


def extrapolated_frechet_distance(
    features: Features, influence: np.ndarray, reference: Moments, labels: np.ndarray | None = None, *, seed: int = 2020
) -> Extrapolation:
    """The Fréchet distance at infinitely many samples: distances of subsets, extrapolated linearly in 1/N (Chong and Forsyth 2019).

    Subsets are the first rows of random orders, from half of the samples to all of them. Each has its share of every label. The
    result is linear in the distances, so its error follows from the influences, too. With fewer than about 8 samples for each
    feature the distance is no longer linear in 1/N, and the result is too low (measured on Gaussians: by 7% at 4).
    features: float (N, F).   influence: of frechet_influence.   labels: int (N,).   Raises ValueError for fewer than 4 samples.
    """
    num_samples, width = check_features(features), features.shape[1]
    if num_samples < 4:
        raise ValueError(f"an extrapolation needs at least 4 samples; there are {num_samples}")
    labels = np.zeros(num_samples, np.int64) if labels is None else labels
    sizes = np.unique(np.linspace(num_samples / 2, num_samples, _NUM_SIZES).astype(int))
    design = np.stack([np.ones(len(sizes)), num_samples / sizes], axis=1)
    shares = np.linalg.pinv(design)[0]  # of the distances in the intercept
    b = factor(reference.covariance)
    num_orders = 8 if width <= _FEW_FEATURES else 2
    value, weights = 0.0, np.zeros(num_samples)
    rng = np.random.default_rng(seed)
    for _ in range(num_orders):
        order = _order_by_shares(labels, rng)
        moments, start = FeatureMoments(width), 0
        for size, share in zip(sizes, shares, strict=True):
            moments.add(take_rows(features, order[start:size]))
            value += share * _distance(moments, reference, b) / num_orders
            weights[order[:size]] += share / size / num_orders
            start = size
    return Extrapolation(float(value), _weighted_error(influence, weights, labels))


def _order_by_shares(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the samples whose every beginning has its share of each label: int64 (N,)."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    places = np.arange(len(order)) - np.repeat(starts, sizes) + rng.random(len(order))
    return order[np.argsort(places / np.repeat(sizes, sizes))]


def _distance(moments: FeatureMoments, reference: Moments, b: np.ndarray) -> float:
    """As frechet_distance, faster, with half the digits of small eigenvalues. b: factor of the reference's covariance."""
    shift, covariance = moments.mean - reference.mean, moments.covariance
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(b.T @ covariance @ b), 0))
    return float(shift @ shift + np.trace(covariance) + np.square(b).sum() - 2 * roots.sum())


# Other scores --------------------------------------------------------------------------------------------------------------


def kernel_influence(generated: Features, reference: Features, *, seed: int = 2020) -> np.ndarray:
    """Influence of each sample on the kernel distance: float64 (N,), with mean 0.

    Twice the sample's mean kernel with the generated samples less that with the reference; beyond 2,000 samples of a side, with a
    random 2,000 of them.   generated: float (N, F), reference: float (M, F). Raises ValueError for different widths.
    """
    sizes = check_features(generated, "generated features"), check_features(reference, "reference features")
    check_same_width(generated, reference)
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(size)[:_KERNEL_COLUMNS] for size in sizes]
    own, real = (_single(side, np.sort(rows)) for side, rows in zip((generated, reference), chosen, strict=True))
    influence = np.empty(sizes[0])
    for start in range(0, sizes[0], CHUNK):
        rows = np.arange(start, min(start + CHUNK, sizes[0]))
        x = _single(generated, rows)
        is_own = torch.from_numpy(np.isin(rows, chosen[0]))
        itself = (x.double().square().sum(dim=1) / x.shape[1] + 1) ** 3
        kernels = cubic_kernel(x, own).sum(dim=1, dtype=torch.float64) - is_own * itself
        cross = cubic_kernel(x, real).mean(dim=1, dtype=torch.float64)
        influence[rows] = 2 * (kernels / (len(own) - is_own.long()).clamp(min=1) - cross).numpy()
    return influence - influence.mean()


def _single(features: Features, rows: np.ndarray) -> Tensor:
    """Float32, which is enough for an error and twice as fast."""
    return torch.from_numpy(take_rows(features, rows)).float()


def inception_influence(logits: Features) -> np.ndarray:
    """Influence of each sample on the Inception score of all samples: float64 (N,), with mean 0.

    logits: float (N, K). The score's logarithm is a mean of KL(p(y|x) || p(y)); the derivative by p(y) cancels.
    """
    num_samples = check_features(logits, "logits")
    chunks = [np.arange(start, min(start + CHUNK, num_samples)) for start in range(0, num_samples, CHUNK)]
    marginal = torch.zeros(logits.shape[1], dtype=torch.float64)
    for rows in chunks:
        marginal += torch.from_numpy(take_rows(logits, rows)).softmax(dim=1).sum(dim=0) / num_samples
    divergence = torch.empty(num_samples, dtype=torch.float64)
    for rows in chunks:
        log_probs = torch.from_numpy(take_rows(logits, rows)).log_softmax(dim=1)
        probs = log_probs.exp()
        divergence[rows] = (probs * log_probs - torch.xlogy(probs, marginal)).sum(dim=1)
    return ((divergence - divergence.mean()) * divergence.mean().exp()).numpy()
