"""Scores of sets of images from their features: Fréchet distance, Inception score, kernel distance.

All sums are float64 and in chunks: memory does not grow with the number of samples. A feature array may be a tensor of any device
and precision or a numpy array, including a memory-mapped one.

Shape legend: B, N, M samples, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

Features = Tensor | np.ndarray
CHUNK = 4096  # rows that are converted to float64 at once
_KERNEL_BLOCKS = 4


def check_features(features: Features, name: str = "features") -> int:
    """The number of samples N. Raises ValueError for anything but finite floats (N, F) with N and F above 0."""
    is_float = features.is_floating_point() if isinstance(features, Tensor) else features.dtype.kind == "f"
    if features.ndim != 2 or 0 in features.shape or not is_float:
        raise ValueError(f"{name} are {features.dtype} {tuple(features.shape)}; floats of shape (N, F) are needed")
    for start in range(0, len(features), CHUNK):
        chunk = features[start : start + CHUNK]
        is_finite = chunk.isfinite().all() if isinstance(chunk, Tensor) else np.isfinite(chunk).all()
        if not is_finite:
            raise ValueError(f"{name} hold values that are not finite; the extractor or its input is broken")
    return len(features)


def check_same_width(first: Features, second: Features) -> None:
    """Raises ValueError for features of different widths."""
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of width {first.shape[1]} and {second.shape[1]} cannot be compared")


def take_rows(features: Features, indices: np.ndarray) -> np.ndarray:
    """The rows of these indices, float64 (B, F) on the CPU, contiguous."""
    if isinstance(features, Tensor):
        return features[torch.from_numpy(indices).to(features.device)].detach().double().cpu().contiguous().numpy()
    return np.ascontiguousarray(features[indices], dtype=np.float64)


@dataclass(frozen=True)
class Estimate:
    """A score and its spread over splits or subsets (population standard deviation), both without a unit."""

    value: float
    std: float


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and unbiased covariance computed elsewhere, such as published statistics; no features can be added.

    mean: float64 (F,).   covariance: float64 (F, F).   count: number of samples, None if unknown.
    Raises ValueError for shapes that do not fit, values that are not finite, and a matrix that cannot be a covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        width = self.mean.size
        if self.mean.ndim != 1 or self.covariance.shape != (width, width) or not width:
            raise ValueError(f"mean {self.mean.shape} and covariance {self.covariance.shape}; (F,) and (F, F) are needed")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("statistics hold values that are not finite")
        variances = self.covariance.diagonal()
        scale = variances.max()
        if variances.min() < 0 or np.abs(self.covariance - self.covariance.T).max() > 1e-4 * scale:
            raise ValueError("the matrix given as covariance is not symmetric or has negative variances")

    def save(self, path: Path) -> None:
        """To safetensors, for load_moments."""
        count = -1 if self.count is None else self.count
        save_file({"count": np.array([count]), "mean": self.mean, "covariance": np.ascontiguousarray(self.covariance)}, path)


class FeatureMoments:
    """Count, mean and scatter of features, accumulated in any number of pieces.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979): a plain sum of squares would lose digits to a large mean.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))  # sum of (x - mean)(x - mean)^T

    def add(self, features: Features) -> FeatureMoments:
        """features: float (B, F), any device and precision. Raises ValueError for another width or values that are not finite.

        Works on a chunk of rows at a time, so additional memory does not grow with the number of features.
        """
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"features have shape {tuple(features.shape)}; (B, {len(self._mean)}) is needed")
        chunks = [features[start : start + CHUNK] for start in range(0, len(features), CHUNK)]
        if not all(np.isfinite(_doubles(chunk)).all() for chunk in chunks):
            raise ValueError("features hold values that are not finite; the extractor or its input is broken")
        for chunk in chunks:
            values = _doubles(chunk)
            piece = FeatureMoments(len(self._mean))
            piece.count, piece._mean = len(values), values.mean(axis=0)
            values -= piece._mean
            piece._scatter = values.T @ values
            self.merge(piece)
        return self

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Add the samples of another one. Merge in a fixed order if the last bits matter. Raises ValueError for another width."""
        if len(other._mean) != len(self._mean):
            raise ValueError(f"moments of {len(other._mean)} features cannot be merged into those of {len(self._mean)}")
        count = self.count + other.count
        if other.count:
            shift = other._mean - self._mean
            self._scatter = self._scatter + other._scatter + np.outer(shift, shift) * (self.count * other.count / count)
            self._mean = self._mean + shift * (other.count / count)
            self.count = count
        return self

    @property
    def mean(self) -> np.ndarray:
        """float64 (F,)"""
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """float64 (F, F), unbiased (divided by count - 1). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; there are {self.count}")
        return self._scatter / (self.count - 1)

    def save(self, path: Path) -> None:
        """To safetensors."""
        save_file({"count": np.array([self.count]), "mean": self._mean, "scatter": self._scatter}, path)

    @classmethod
    def load(cls, path: Path) -> FeatureMoments:
        with safe_open(str(path), framework="np") as file:
            moments = cls(len(file.get_tensor("mean")))
            moments.count = int(file.get_tensor("count")[0])
            moments._mean, moments._scatter = file.get_tensor("mean"), file.get_tensor("scatter")
        return moments


Moments = FeatureMoments | FeatureStatistics


def _doubles(features: Features) -> np.ndarray:
    """A copy, float64 on the CPU."""
    if isinstance(features, Tensor):
        features = features.detach().cpu().double().numpy()
    return np.array(features, dtype=np.float64)


def load_moments(path: Path) -> Moments:
    """From a file that either class saved. Raises ValueError for any other safetensors file."""
    with safe_open(str(path), framework="np") as file:
        names = set(file.keys())
        if names == {"count", "mean", "covariance"}:
            count = int(file.get_tensor("count")[0])
            return FeatureStatistics(file.get_tensor("mean"), file.get_tensor("covariance"), None if count < 0 else count)
    if names != {"count", "mean", "scatter"}:
        raise ValueError(f"{path} does not contain moments of features, but {', '.join(sorted(names))}")
    return FeatureMoments.load(path)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0 (Heusel et al. 2017, eq. 6).

    With factors S1 = A A^T and S2 = B B^T the trace of the root is the sum of the singular values of A^T B: real, and exact
    even for a singular covariance, as with fewer samples than features. Eigenvalues of S1 S2 or of A^T S2 A would be cheaper, but
    lose half the digits of the small ones. Raises ValueError for different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of width {len(first.mean)} and {len(second.mean)} cannot be compared")
    covariances = first.covariance, second.covariance
    shift = first.mean - second.mean
    factors = [factor(covariance) for covariance in covariances]
    trace_of_root = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    distance = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace_of_root
    return max(0.0, float(distance))


def factor(covariance: np.ndarray) -> np.ndarray:
    """A (F, rank) with A A^T = covariance. Eigenvalues that are zero up to rounding are cut, because their roots are not small."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Features, num_splits: int = 10, seed: int | None = 2020, *, split_size: int | None = None) -> Estimate:
    """exp(E_x KL(p(y|x) || p(y))), mean and spread over splits (Salimans et al. 2016). In [1, K]; higher is better.

    logits: float (N, K), in index order; by custom those of Inception without its bias. The defaults are torch-fidelity's:
    samples shuffled by the seed, num_splits parts of about equal size. ADM's evaluation is seed=None (no shuffle) and
    split_size=5000: parts of this size in order, the last one smaller.
    Raises ValueError for fewer samples than splits and for values that are not finite.
    """
    num_samples = check_features(logits, "logits")
    if split_size is not None:
        bounds = [*range(0, num_samples, split_size), num_samples]
    else:
        bounds = [split * num_samples // num_splits for split in range(num_splits + 1)]
    if any(stop <= start for start, stop in pairwise(bounds)):
        raise ValueError(f"{num_samples} samples cannot be cut into {num_splits} splits; set num_splits lower")
    order = np.arange(num_samples) if seed is None else np.random.RandomState(seed).permutation(num_samples)
    return estimate_of(np.array([_score_of_split(logits, order[start:stop]) for start, stop in pairwise(bounds)]))


def _score_of_split(logits: Features, indices: np.ndarray) -> float:
    """E_x KL = E_x sum_y p log p - sum_y q log q with q = E_x p, which needs one pass."""
    probs_sum, neg_entropy_sum = torch.zeros(logits.shape[1], dtype=torch.float64), 0.0
    for start in range(0, len(indices), CHUNK):
        rows = torch.from_numpy(take_rows(logits, indices[start : start + CHUNK]))
        log_probs = rows.log_softmax(dim=1)
        probs = log_probs.exp()
        probs_sum += probs.sum(dim=0)
        neg_entropy_sum += float((probs * log_probs).sum())
    marginal = probs_sum / len(indices)
    return float(np.exp(neg_entropy_sum / len(indices) - float(torch.xlogy(marginal, marginal).sum())))


def kernel_distance(
    generated: Features, reference: Features, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, unbiased, over random subsets (Binkowski et al. 2018).

    generated: float (N, F), reference: float (M, F), in index order. Subsets are those of torch-fidelity for the same
    seed. About 0, possibly negative, for equal distributions; lower is better.
    Raises ValueError for sets smaller than a subset, for different widths and for values that are not finite.
    """
    sizes = check_features(generated, "generated features"), check_features(reference, "reference features")
    check_same_width(generated, reference)
    subsets = kernel_subsets(sizes, num_subsets, subset_size, seed)
    return estimate_of(kernel_distances(generated, reference, subsets))


def kernel_subsets(sizes: tuple[int, int], num_subsets: int, subset_size: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of the generated and of the reference samples for each subset. Raises ValueError for sets smaller than a subset."""
    if num_subsets < 1 or not 2 <= subset_size <= min(sizes):
        raise ValueError(
            f"{num_subsets} subsets of {subset_size} cannot be drawn from {sizes[0]} generated and {sizes[1]} reference"
        )
    rng = np.random.RandomState(seed)
    return [
        (rng.choice(sizes[0], subset_size, replace=False), rng.choice(sizes[1], subset_size, replace=False))
        for _ in range(num_subsets)
    ]


def kernel_distances(
    generated: Features, reference: Features, subsets: Sequence[tuple[np.ndarray, np.ndarray]], *, device: str = "cpu"
) -> np.ndarray:
    """Kernel distance of each subset, float64. On a CPU each takes one thread, so the number of threads changes no bit.

    Products are float32 for features that are stored so (as torch-fidelity's), else float64; sums are float64.
    """

    def compute(rows: tuple[np.ndarray, np.ndarray]) -> float:
        return _squared_discrepancy(*(_take(side, chosen).to(device) for side, chosen in zip(sides, rows, strict=True)))

    sides, num_threads = (generated, reference), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads if device == "cpu" else 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return np.array([*pool.map(compute, subsets)])
    finally:
        torch.set_num_threads(num_threads)


def estimate_of(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()))


def _take(features: Features, indices: np.ndarray) -> Tensor:
    """These rows, float64 (B, F) if they are stored so, else float32."""
    rows = torch.as_tensor(features[indices] if isinstance(features, np.ndarray) else features[torch.from_numpy(indices)])
    return rows.detach() if rows.dtype == torch.float64 else rows.detach().float()


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Binkowski et al. 2018, eq. 4: without the kernels of a sample with itself."""
    size = len(x)
    within = (_kernel_sum(x) + _kernel_sum(y)) / (size * (size - 1))
    return within - 2 * float(cubic_kernel(x, y).sum(dtype=torch.float64)) / size**2


def _kernel_sum(x: Tensor) -> float:
    """Over all pairs of different samples. A kernel is symmetric, so 6 of 16 blocks, below the diagonal, are left out."""
    total, step = 0.0, -(-len(x) // _KERNEL_BLOCKS)
    for start in range(0, len(x), step):
        kernel = cubic_kernel(x[start : start + step], x[start:])
        own = kernel[:, : len(kernel)]
        total += 2 * float(kernel.sum(dtype=torch.float64)) - float(own.sum(dtype=torch.float64) + own.trace().double())
    return total


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(B, F), (C, F) -> (B, C)"""
    kernel = (x @ y.T).div_(x.shape[1]).add_(1)
    return kernel.square().mul_(kernel)
