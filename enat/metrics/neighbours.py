"""Scores from nearest neighbours: improved precision and recall, density and coverage, in blocks of rows.

Each sample spans a ball that reaches to its k-th nearest neighbour within its own set; the scores count which samples of the
other set lie in which balls.

Results are those of distances summed one by one in float64: a matrix product only sorts out the pairs whose order is beyond its
rounding error, and the few others are computed exactly. So they do not depend on blocks, devices or threads, ties are ties, and
copies of a sample are at distance 0.

Shape legend: N samples, M reference samples, F features, R rows of a block, D distinct samples, K numbers of neighbours.
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
SPARE = 8  # candidates for a neighbour beyond those needed; where rounding leaves more, all distances of the row are computed


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
    """What the generated samples start..start + R count for. Blocks are put together by merge_counts.

    num_closed_balls, num_open_balls: int64 (R,), reference balls that hold each generated sample, with their boundary (those of
    precision) and without (those of density).
    is_recalled: bool (M,), reference samples in a ball of one of these generated samples.
    is_covered: bool (M,), reference samples whose own open ball holds one of these generated samples.
    """

    start: int
    num_closed_balls: np.ndarray
    num_open_balls: np.ndarray
    is_recalled: np.ndarray
    is_covered: np.ndarray

    def precision_recall(self) -> PrecisionRecall:
        """Kynkaanniemi et al. 2019, eq. 2 and 3. Of counts of all generated samples."""
        return PrecisionRecall(float((self.num_closed_balls > 0).mean()), float(self.is_recalled.mean()))

    def density_coverage(self, num_neighbours: int = 5) -> DensityCoverage:
        """Naeem et al. 2020, eq. 4 and 5. Of counts of all generated samples; num_neighbours: that of the open balls."""
        return DensityCoverage(float(self.num_open_balls.mean()) / num_neighbours, float(self.is_covered.mean()))


def precision_recall(reference: Features, generated: Features, num_neighbours: int = 3, *, device: str = "cpu") -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019); balls hold their boundary.

    reference: float (M, F), generated: float (N, F). Raises ValueError for sets of num_neighbours samples or fewer, two widths
    and values that are not finite.
    """
    return _all_counts(reference, generated, num_neighbours, device).precision_recall()


def density_coverage(reference: Features, generated: Features, num_neighbours: int = 5, *, device: str = "cpu") -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020); as in the authors' code, balls do not hold their boundary.

    Arguments and errors as of precision_recall.
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

    features: float (N, F), all of the set. Radii of blocks are concatenated in order. A sample with k copies has radius 0.
    Raises ValueError for k below 1, for N <= k and for values that are not finite.
    """
    num_samples = check_features(features)
    if min(num_neighbours) < 1 or max(num_neighbours) >= num_samples:
        asked = ", ".join(map(str, num_neighbours))
        raise ValueError(f"{asked} neighbours are asked for; of {num_samples} samples each has 1 to {num_samples - 1}")
    distinct = _Distinct.of(features)
    wanted, inverse = np.unique(distinct.inverse[start:stop], return_inverse=True)
    centre = _mean(features)
    radii = np.zeros((len(wanted), len(num_neighbours)))
    for first in range(0, len(wanted), TILE_ROWS):
        rows = wanted[first : first + TILE_ROWS]
        radii[first : first + len(rows)] = _radii_of_tile(distinct, rows, centre, num_neighbours, device)
    return radii[inverse]


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
    """Which of the generated samples start..stop and of all reference samples lie in whose balls.

    reference: float (M, F).   reference_radii: float64 (M, 2), from squared_radii: for precision and for density.
    generated: float (N, F).   generated_radii: float64 (stop - start,), from squared_radii for the same rows.
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
    columns = _Distinct.of(reference)
    rows = _Distinct.of(generated[start:stop])
    pairs = _BallPairs(rows, columns, generated_radii[rows.first], reference_radii[columns.first], _mean(reference), device)
    closed, opened = np.zeros((2, len(rows.first)), dtype=np.int64)
    recalled, covered = np.zeros((2, len(columns.first)), dtype=bool)
    for row, column, in_closed, in_open, holds in pairs:
        weights = torch.from_numpy(columns.weights[column]).to(device, torch.float64)  # whole numbers: exact in any order
        closed[row] += (in_closed.double() @ weights).cpu().numpy().astype(np.int64)
        opened[row] += (in_open.double() @ weights).cpu().numpy().astype(np.int64)
        recalled[column] |= holds.any(dim=0).cpu().numpy()
        covered[column] |= in_open.any(dim=0).cpu().numpy()
    return ManifoldCounts(
        block.start, closed[rows.inverse], opened[rows.inverse], recalled[columns.inverse], covered[columns.inverse]
    )


def merge_counts(pieces: Sequence[ManifoldCounts]) -> ManifoldCounts:
    """Counts of all generated samples from those of blocks, in any order. Raises ValueError where blocks overlap or leave holes."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    expected = 0
    for piece in ordered:
        if piece.start != expected:
            raise ValueError(f"counts of samples {expected} and on are needed, but the next block starts at {piece.start}")
        expected += len(piece.num_closed_balls)
    return ManifoldCounts(
        0,
        np.concatenate([piece.num_closed_balls for piece in ordered]),
        np.concatenate([piece.num_open_balls for piece in ordered]),
        np.logical_or.reduce([piece.is_recalled for piece in ordered]),
        np.logical_or.reduce([piece.is_covered for piece in ordered]),
    )


@dataclass(frozen=True, eq=False)
class _Distinct:
    """The distinct rows among features: copies would all be pairs too close to call.

    first: int64 (D,), where each is found first.   inverse: int64 (N,), which one each row is.   weights: int64 (D,), copies.
    """

    features: Features
    first: np.ndarray
    inverse: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, features: Features) -> _Distinct:
        digests = []
        for start in range(0, len(features), CHUNK):
            rows = take_rows(features, np.arange(start, min(start + CHUNK, len(features)))) + 0.0  # one zero, not two
            digests += [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        numbers = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
        _, first, inverse, weights = np.unique(numbers, axis=0, return_index=True, return_inverse=True, return_counts=True)
        return cls(features, first, inverse.ravel(), weights)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float64 (len(indices), F)"""
        return take_rows(self.features, self.first[indices])


def _radii_of_tile(
    distinct: _Distinct, rows: np.ndarray, centre: np.ndarray, num_neighbours: Sequence[int], device: str
) -> np.ndarray:
    """float64 (R, K) of distinct samples rows (R,)."""
    num_others = len(distinct.first) - 1
    num_kept = min(max(num_neighbours) + SPARE, num_others)
    low, indices, slack = _nearest(distinct, rows, centre, num_kept, device)
    # The k-th smallest upper bound of any of them is one of the k-th smallest distance; what is surely further away is out.
    limit = np.full((len(rows), 1), np.inf)
    if num_kept >= max(num_neighbours):
        limit[:, 0] = np.sort(low + 2 * slack, axis=1)[:, max(num_neighbours) - 1]
    row, place = (low <= limit).nonzero()
    distances = np.full(low.shape, np.inf)
    distances[row, place] = _exact(distinct, rows[row], distinct, indices[row, place])
    radii = _weighted_smallest(distances, distinct.weights[indices], distinct.weights[rows] - 1, num_neighbours)
    if num_kept < num_others:
        everyone = np.arange(num_others + 1)
        for undecided in (low[:, -1] <= limit[:, 0]).nonzero()[0]:
            others = everyone[everyone != rows[undecided]]
            distances = _exact(distinct, np.full(num_others, rows[undecided]), distinct, others)[None]
            copies = distinct.weights[rows[undecided : undecided + 1]] - 1
            radii[undecided] = _weighted_smallest(distances, distinct.weights[others][None], copies, num_neighbours)[0]
    return radii


def _nearest(
    distinct: _Distinct, rows: np.ndarray, centre: np.ndarray, num_kept: int, device: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The num_kept others whose squared distance has the smallest lower bounds, for each of rows (R,).

    Lower bounds float64, indices int64 and the error of distances, half of upper less lower bound, float64; all (R, num_kept).
    """
    low = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
    indices = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    slack = torch.empty_like(low)
    own = torch.from_numpy(rows).to(device)[:, None]
    x = _on_device(distinct.rows(rows), centre, device)
    for start in range(0, len(distinct.first), TILE_COLUMNS):
        columns = np.arange(start, min(start + TILE_COLUMNS, len(distinct.first)))
        squared, error = _approximate(x, _on_device(distinct.rows(columns), centre, device))
        bound = squared.sub_(error)
        everyone = torch.from_numpy(columns).to(device)
        bound.masked_fill_(own == everyone, torch.inf)
        found, place = bound.topk(min(num_kept, bound.shape[1]), dim=1, largest=False)
        low, indices = torch.cat([low, found], dim=1), torch.cat([indices, everyone[place]], dim=1)
        slack = torch.cat([slack, error.gather(1, place)], dim=1)
        low, place = low.topk(min(num_kept, low.shape[1]), dim=1, largest=False)
        indices, slack = indices.gather(1, place), slack.gather(1, place)
    return low.cpu().numpy(), indices.cpu().numpy(), slack.cpu().numpy()


def _weighted_smallest(distances: np.ndarray, weights: np.ndarray, copies: np.ndarray, num_neighbours: Sequence[int]) -> np.ndarray:
    """The k-th smallest of distances (R, C), each there as often as weights (R, C) says, besides copies (R,) zeros: (R, K)."""
    order = distances.argsort(axis=1, kind="stable")
    distances = np.take_along_axis(distances, order, axis=1)
    counts = np.take_along_axis(weights, order, axis=1)
    distances = np.concatenate([np.zeros((len(distances), 1)), distances], axis=1)
    reached = np.concatenate([copies[:, None], counts], axis=1).cumsum(axis=1)
    places = np.stack([(reached >= k).argmax(axis=1) for k in num_neighbours], axis=1)
    return np.take_along_axis(distances, places, axis=1)


@dataclass(frozen=True, eq=False)
class _BallPairs:
    """Tiles of distinct generated samples by distinct reference samples, and who lies in whose ball."""

    rows: _Distinct
    columns: _Distinct
    row_radii: np.ndarray  # float64 (D,)
    column_radii: np.ndarray  # float64 (D, 2), closed and open
    centre: np.ndarray
    device: str

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """row and column slices; bool (R, C): in the closed, in the open reference ball, reference sample in generated ball."""
        for row_start in range(0, len(self.rows.first), TILE_ROWS):
            row = slice(row_start, min(row_start + TILE_ROWS, len(self.rows.first)))
            x = _on_device(self.rows.rows(np.arange(row.start, row.stop)), self.centre, self.device)
            for column_start in range(0, len(self.columns.first), TILE_COLUMNS):
                column = slice(column_start, min(column_start + TILE_COLUMNS, len(self.columns.first)))
                y = _on_device(self.columns.rows(np.arange(column.start, column.stop)), self.centre, self.device)
                yield row, column, *self._tile(row, column, x, y)

    def _tile(self, row: slice, column: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squared, error = _approximate(x, y)
        holding = torch.from_numpy(self.row_radii[row, None]).to(self.device)
        closed, opened = torch.from_numpy(self.column_radii[column].T.copy()).to(self.device)
        unsure = torch.zeros_like(squared, dtype=torch.bool)
        for radii in (holding, closed, opened):
            unsure |= (squared - radii).abs_() <= error
        pairs = unsure.nonzero()
        i, j = pairs.cpu().numpy().T
        exact = torch.from_numpy(_exact(self.rows, i + row.start, self.columns, j + column.start)).to(self.device)
        squared[pairs[:, 0], pairs[:, 1]] = exact
        return squared <= closed, squared < opened, squared <= holding


def _approximate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of rows of x (R, F) and y (C, F), and how far they can be off those of _exact: float64 (R, C) both.

    A product of F terms is within F u |x||y| of the truth whatever its order (Higham 2002, sec. 3.1; u = eps / 2); errors of both
    norms, of the centring and of the exact sum itself are of the same size. Together less than (2 F + 16) eps (|x|^2 + |y|^2).
    """
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    return squared, norms.mul_((2 * x.shape[1] + 16) * torch.finfo(torch.float64).eps)


def _exact(left: _Distinct, i: np.ndarray, right: _Distinct, j: np.ndarray) -> np.ndarray:
    """Squared distances of pairs (i, j): float64 (P,), differences squared and summed in one order for every pair."""
    squared = np.empty(len(i))
    for start in range(0, len(i), CHUNK):
        part = slice(start, start + CHUNK)
        squared[part] = np.square(left.rows(i[part]) - right.rows(j[part])).sum(axis=1)
    return squared


def _mean(features: Features) -> np.ndarray:
    """float64 (F,). Distances to it are smaller than to 0, and so are rounding errors."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), CHUNK):
        total += take_rows(features, np.arange(start, min(start + CHUNK, len(features)))).sum(axis=0)
    return total / len(features)


def _on_device(rows: np.ndarray, centre: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(rows - centre).to(device)
