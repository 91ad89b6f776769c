"""Scores from nearest neighbours: improved precision and recall, density and coverage, in blocks of rows.

Each sample spans a ball that reaches to its k-th nearest neighbour within its own set. The scores count which samples of the
other set are in which balls.

Results are those of distances summed one by one in float64: a matrix product decides only the pairs whose order is beyond its
rounding error, and the few others are computed exactly. Therefore results do not depend on blocks, devices or threads, ties are
ties, and copies of a sample are at distance 0.

Shape legend: N samples, M reference samples, F features, R rows of a block, D distinct samples, C columns of a tile, K numbers of
neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.feature_arrays import CHUNK, Features, check_features, check_same_width, take_rows

TILE_ROWS, TILE_COLUMNS = 1024, 4096  # 32 MiB of float64 distances


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of generated samples in the reference manifold. recall: the other way round. Both in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """density: reference balls per generated sample over k, at least 0 and 1 in expectation for equal distributions.

    coverage: share of reference samples with a generated one in their ball, in [0, 1].
    """

    density: float
    coverage: float


@dataclass(frozen=True, eq=False)
class ManifoldCounts:
    """Counts of the generated samples start..start + R. merge_counts combines blocks.

    num_closed_balls, num_open_balls: int64 (R,), reference balls that contain each generated sample, with their boundary (for
    precision) and without it (for density).
    is_recalled: bool (M,), reference samples in a ball of one of these generated samples.
    is_covered: bool (M,), reference samples whose own open ball contains one of these generated samples.
    """

    start: int
    num_closed_balls: np.ndarray
    num_open_balls: np.ndarray
    is_recalled: np.ndarray
    is_covered: np.ndarray

    def precision_recall(self) -> PrecisionRecall:
        """Kynkaanniemi et al. 2019, eq. 2 and 3, if these are the counts of all generated samples."""
        return PrecisionRecall(float((self.num_closed_balls > 0).mean()), float(self.is_recalled.mean()))

    def density_coverage(self, num_neighbours: int = 5) -> DensityCoverage:
        """Naeem et al. 2020, eq. 4 and 5, if these are the counts of all generated samples.

        `num_neighbours`: that of the open balls.
        """
        return DensityCoverage(float(self.num_open_balls.mean()) / num_neighbours, float(self.is_covered.mean()))


def precision_recall(reference: Features, generated: Features, num_neighbours: int = 3, *, device: str = "cpu") -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019); balls include their boundary.

    `reference`: float (M, F), `generated`: float (N, F). Raises ValueError for sets of num_neighbours samples or fewer, different
    widths and values that are not finite.
    """
    return _all_counts(reference, generated, num_neighbours, device).precision_recall()


def density_coverage(reference: Features, generated: Features, num_neighbours: int = 5, *, device: str = "cpu") -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020); as in the authors' code, balls exclude their boundary.

    Arguments and errors as in precision_recall.
    """
    return _all_counts(reference, generated, num_neighbours, device).density_coverage(num_neighbours)


def _all_counts(reference: Features, generated: Features, num_neighbours: int, device: str) -> ManifoldCounts:
    reference_radii = squared_radii(reference, (num_neighbours, num_neighbours), device=device)
    generated_radii = squared_radii(generated, (num_neighbours,), device=device)[:, 0]
    return manifold_counts(reference, reference_radii, generated, generated_radii, device=device)


def squared_radii(
    features: Features, num_neighbours: Sequence[int], *, start: int = 0, stop: int | None = None, device: str = "cpu"
) -> np.ndarray:
    """Squared distances of samples start..stop to their k-th nearest other sample, for each k: float64 (stop - start, K).

    `features`: float (N, F), the whole set. Radii of blocks are concatenated in order. A sample with k copies has radius 0.
    Raises ValueError for k below 1, for N <= k and for values that are not finite.
    """
    num_samples = check_features(features)
    if min(num_neighbours) < 1 or max(num_neighbours) >= num_samples:
        asked = ", ".join(map(str, num_neighbours))
        raise ValueError(f"{asked} neighbours are requested; each of {num_samples} samples has 1 to {num_samples - 1}")
    distinct = _Distinct(features, device)
    wanted, inverse = np.unique(distinct.inverse[start:stop], return_inverse=True)
    radii = np.concatenate([_radii(distinct, rows, num_neighbours) for rows in _split(wanted, TILE_ROWS)])
    return radii[inverse]


def _radii(distinct: _Distinct, rows: np.ndarray, num_neighbours: Sequence[int]) -> np.ndarray:
    """float64 (R, K) of distinct samples rows (R,)."""
    x = distinct.tile(rows)
    num_kept = max(num_neighbours) + 1  # the sample itself is among its nearest, as often as it has copies
    nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=x.device)
    indices = torch.empty(len(rows), 0, dtype=torch.int64, device=x.device)
    for columns in _split(np.arange(distinct.count), TILE_COLUMNS):
        squared, error = _approximate(x, distinct.tile(columns))
        # At least num_kept are surely within the limit; what is surely beyond it is not among the nearest.
        upper = torch.cat([nearest, squared + error], dim=1)
        limit = upper.kthvalue(min(num_kept, upper.shape[1]), dim=1, keepdim=True).values
        i, j = (squared.sub_(error) <= limit).nonzero(as_tuple=True)
        squared.fill_(torch.inf)
        squared[i, j] = _exact(distinct, rows[i.cpu().numpy()], distinct, columns[j.cpu().numpy()])
        found, place = squared.topk(min(num_kept, squared.shape[1]), dim=1, largest=False)
        nearest = torch.cat([nearest, found], dim=1)
        indices = torch.cat([indices, torch.from_numpy(columns).to(x.device)[place]], dim=1)
        nearest, place = nearest.topk(min(num_kept, nearest.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, place)
    kept = indices.cpu().numpy()
    num_reached = (distinct.weights[kept] - (kept == rows[:, None])).cumsum(axis=1)
    places = np.stack([(num_reached < k).sum(axis=1) for k in num_neighbours], axis=1)
    return np.take_along_axis(nearest.cpu().numpy(), places, axis=1)


def manifold_counts(
    reference: Features,
    reference_radii: np.ndarray,
    generated: Features,
    generated_radii: np.ndarray,
    *,
    start: int = 0,
    stop: int | None = None,
    device: str = "cpu",
) -> ManifoldCounts:
    """Which of the generated samples start..stop and of all reference samples are in whose balls.

    `reference`: float (M, F).   `reference_radii`: float64 (M, 2), from squared_radii: for precision and for density.
    `generated`: float (N, F).   `generated_radii`: float64 (stop - start,), from squared_radii for the same rows.
    Raises ValueError for shapes that do not fit and values that are not finite.
    """
    num_generated = check_features(generated, "generated features")
    check_features(reference, "reference features")
    check_same_width(reference, generated)
    block = range(num_generated)[start:stop]
    if reference_radii.shape != (len(reference), 2) or generated_radii.shape != (len(block),):
        raise ValueError(
            f"radii have shapes {reference_radii.shape} and {generated_radii.shape}; "
            f"({len(reference)}, 2) and ({len(block)},) are needed for these samples"
        )
    right = _Distinct(reference, device)
    left = _Distinct(generated[start:stop], device, right.centre)
    own_radii, radii = generated_radii[left.first], reference_radii[right.first]
    closed_counts, open_counts = np.zeros((2, left.count), dtype=np.int64)
    is_recalled, is_covered = np.zeros((2, right.count), dtype=bool)
    for rows in _split(np.arange(left.count), TILE_ROWS):
        x, holding = left.tile(rows), torch.from_numpy(own_radii[rows, None]).to(device)
        for columns in _split(np.arange(right.count), TILE_COLUMNS):
            squared, error = _approximate(x, right.tile(columns))
            closed, opened = torch.from_numpy(radii[columns].T.copy()).to(device)
            unsure = torch.zeros_like(squared, dtype=torch.bool)
            for limit in (holding, closed, opened):
                unsure |= (squared - limit).abs_() <= error
            i, j = unsure.nonzero(as_tuple=True)
            squared[i, j] = _exact(left, rows[i.cpu().numpy()], right, columns[j.cpu().numpy()])
            weights = torch.from_numpy(right.weights[columns]).to(device, torch.float64)  # integers: exact in any order
            in_open = squared < opened
            closed_counts[rows] += ((squared <= closed).double() @ weights).cpu().numpy().astype(np.int64)
            open_counts[rows] += (in_open.double() @ weights).cpu().numpy().astype(np.int64)
            is_recalled[columns] |= (squared <= holding).any(dim=0).cpu().numpy()
            is_covered[columns] |= in_open.any(dim=0).cpu().numpy()
    return ManifoldCounts(
        block.start, closed_counts[left.inverse], open_counts[left.inverse], is_recalled[right.inverse], is_covered[right.inverse]
    )


def merge_counts(pieces: Sequence[ManifoldCounts]) -> ManifoldCounts:
    """Counts of all generated samples from those of blocks, in any order. Raises ValueError if blocks overlap or leave gaps."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    expected = 0
    for piece in ordered:
        if piece.start != expected:
            raise ValueError(f"counts of samples from {expected} are needed, but the next block starts at {piece.start}")
        expected += len(piece.num_closed_balls)
    return ManifoldCounts(
        0,
        np.concatenate([piece.num_closed_balls for piece in ordered]),
        np.concatenate([piece.num_open_balls for piece in ordered]),
        np.logical_or.reduce([piece.is_recalled for piece in ordered]),
        np.logical_or.reduce([piece.is_covered for piece in ordered]),
    )


class _Distinct:
    """The distinct rows among features: copies would all be pairs too close to call.

    first: int64 (D,), where each is first found.   inverse: int64 (N,), which one each row is.   weights: int64 (D,), copies.
    centre: float64 (F,), near all rows: distances to it are smaller than to 0, and so are rounding errors.
    """

    def __init__(self, features: Features, device: str, centre: np.ndarray | None = None) -> None:
        self.features, self.device = features, device
        total, digests = np.zeros(features.shape[1]), b""
        for indices in _split(np.arange(len(features)), CHUNK):
            rows = take_rows(features, indices) + 0.0  # one zero, not two
            total += rows.sum(axis=0)
            digests += b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
        numbers = np.frombuffer(digests, dtype="S16")
        _, self.first, self.inverse, self.weights = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        self.count = len(self.first)
        self.centre = total / len(features) if centre is None else centre

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float64 (len(indices), F)"""
        return take_rows(self.features, self.first[indices])

    def tile(self, indices: np.ndarray) -> Tensor:
        """The same around the centre, on the device."""
        return torch.from_numpy(self.rows(indices) - self.centre).to(self.device)


def _approximate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of rows of x (R, F) and y (C, F), and their largest difference from those of _exact: float64 (R, C) both.

    A product of F terms is within F u |x||y| of the truth in any order of the sum (Higham 2002, sec. 3.1; u = eps / 2). The errors
    of both norms, of the centring and of the exact sum itself are of the same size. Together: less than
    (2 F + 16) eps (|x|^2 + |y|^2).
    """
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    return squared, norms.mul_((2 * x.shape[1] + 16) * torch.finfo(torch.float64).eps)


def _exact(left: _Distinct, i: np.ndarray, right: _Distinct, j: np.ndarray) -> Tensor:
    """Squared distances of pairs (i, j): float64 (P,), differences squared and summed in one order for every pair."""
    squared = [np.square(left.rows(a) - right.rows(b)).sum(axis=1) for a, b in zip(_split(i, CHUNK), _split(j, CHUNK), strict=True)]
    return torch.from_numpy(np.concatenate([np.empty(0), *squared])).to(left.device)


def _split(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
