"""Scores from nearest neighbours: improved precision and recall, density and coverage, authenticity, from tiles of distances.

Each sample spans a ball that reaches to its k-th nearest neighbour within its own set. The scores count which samples of the
other set are in which balls. Distances that differ by less than the rounding error of a float64 product are equal: ties are ties,
and results do not depend on blocks, devices or threads.

On a CPU, products are float32, which is twice as fast. What their rounding error leaves open is computed again in float64.

Shape legend: N samples, M reference samples, F features, R samples of a block, C columns of a tile, K numbers of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.moments import Features, check_features, check_same_width, take_rows

BLOCK_SIZE, TILE_COLUMNS = 4096, 1024  # 32 MiB of float64 distances
_MORE_CANDIDATES = 4  # neighbours beyond the requested ones; the nearest of them are also the nearest in float64
_PAIRS_AT_ONCE = 4096  # of samples, in float64
_MOST_OPEN = 0.02  # share of a tile above which all of it is computed in float64


@dataclass(frozen=True)
class ManifoldScores:
    """precision: share of generated samples in the reference manifold.   recall: the other way round. Both in [0, 1].

    density: reference balls per generated sample over k, at least 0 and 1 in expectation for equal distributions.
    coverage: share of reference samples with a generated one in their ball, in [0, 1].
    authenticity: share of generated samples that are farther from the nearest reference sample than that one is from all others, in
    [0, 1]. Copies of the reference are not.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    authenticity: float


@dataclass(frozen=True, eq=False)
class ManifoldCounts:
    """num_closed_balls, num_open_balls: int64 (R,), reference balls that contain each generated sample, with and without boundary.
    is_authentic: bool (R,), whether each is outside of the closed ball around its nearest reference sample that reaches to that
    one's nearest neighbour.

    num_recalling: int64 (M,), how many of these generated samples have each reference sample in their ball.
    num_covering: int64 (M,), how many of them are in the open ball of each reference sample.
    recalled_by, covered_by: int64 (M,), the first of these, as a row of the generated set.
    """

    num_closed_balls: np.ndarray
    num_open_balls: np.ndarray
    num_recalling: np.ndarray
    num_covering: np.ndarray
    recalled_by: np.ndarray
    covered_by: np.ndarray
    is_authentic: np.ndarray


def manifold_scores(reference: Features, generated: Features, num_neighbours: tuple[int, int] = (3, 5)) -> ManifoldScores:
    """Precision and recall with the first number of neighbours, density and coverage with the second.

    `reference`: float (M, F), `generated`: float (N, F). Raises ValueError as squared_radii and manifold_counts do.
    """
    radii = np.concatenate([squared_radii(reference, (*num_neighbours, 1), block) for block in blocks_of(len(reference))])
    own_radii = {block: squared_radii(generated, num_neighbours[:1], block)[:, 0] for block in blocks_of(len(generated))}
    counts = [manifold_counts(reference, radii, generated, own, block) for block, own in own_radii.items()]
    return scores_of_counts(counts, num_neighbours[1])


def blocks_of(num_samples: int) -> list[range]:
    """Samples that are computed at once."""
    return [range(start, min(start + BLOCK_SIZE, num_samples)) for start in range(0, num_samples, BLOCK_SIZE)]


def scores_of_counts(blocks: Sequence[ManifoldCounts], num_neighbours: int) -> ManifoldScores:
    """Scores from the counts of all generated samples, in blocks. `num_neighbours`: that of the open balls.

    Kynkaanniemi et al. 2019, eq. 2 and 3, with closed balls; Naeem et al. 2020, eq. 4 and 5, with open ones, as in their code;
    Alaa et al. 2022, as in the code of Stein et al. 2023 (their AuthPct, over 100).
    """
    return ManifoldScores(
        precision=float((np.concatenate([block.num_closed_balls for block in blocks]) > 0).mean()),
        recall=float((np.sum([block.num_recalling for block in blocks], axis=0) > 0).mean()),
        density=float(np.concatenate([block.num_open_balls for block in blocks]).mean()) / num_neighbours,
        coverage=float((np.sum([block.num_covering for block in blocks], axis=0) > 0).mean()),
        authenticity=float(np.concatenate([block.is_authentic for block in blocks]).mean()),
    )


def influences_of_counts(blocks: Sequence[ManifoldCounts], num_neighbours: int) -> dict[str, np.ndarray]:
    """Influence of each generated sample on the fields of ManifoldScores, for errors.standard_error: float64 (N,) each.

    Precision, density and authenticity are means over the generated samples. Recall and coverage lose, without a sample, the
    reference samples that only this one reaches (the jackknife), which makes their error rather too large than too small (Efron and
    Stein 1981).
    """
    found = {
        "precision": np.concatenate([block.num_closed_balls for block in blocks]) > 0,
        "density": np.concatenate([block.num_open_balls for block in blocks]) / num_neighbours,
        "authenticity": np.concatenate([block.is_authentic for block in blocks]),
    }
    num_samples = len(found["precision"])
    for score, counted, by in (("recall", "num_recalling", "recalled_by"), ("coverage", "num_covering", "covered_by")):
        counts = np.stack([getattr(block, counted) for block in blocks])
        firsts = np.stack([getattr(block, by) for block in blocks])[counts.argmax(axis=0), np.arange(counts.shape[1])]
        alone = np.bincount(firsts[counts.sum(axis=0) == 1], minlength=num_samples)
        found[score] = alone * (num_samples / counts.shape[1])
    return {score: values - values.mean() for score, values in found.items()}


def squared_radii(features: Features, num_neighbours: Sequence[int], block: range, *, device: str = "cpu") -> np.ndarray:
    """Squared distances of the samples of a block to their k-th nearest other sample, for each k: float64 (R, K).

    `features`: float (N, F), the whole set. A sample with k copies has radius 0 up to rounding. Raises ValueError for k below 1,
    for N <= k and for values that are not finite.
    """
    num_samples, num_kept = check_features(features), max(num_neighbours) + 1  # a sample is the nearest to itself
    if min(num_neighbours) < 1 or num_kept > num_samples:
        asked = ", ".join(map(str, num_neighbours))
        raise ValueError(f"{asked} neighbours are requested; each of {num_samples} samples has 1 to {num_samples - 1}")
    centre = _centre(features)
    x = _tile(features, block, centre, device)
    places = list(num_neighbours)
    if device == "cpu":
        return _nearest_by_screening(features, x, places, centre).numpy()
    return _nearest(features, x, num_kept, centre)[:, places].cpu().numpy()


def _nearest(features: Features, x: Tensor, num_kept: int, centre: np.ndarray) -> Tensor:
    """The smallest squared distances of each row, ascending, float64 (R, num_kept)."""
    rows, nearest = _Rows.of(x), x.new_empty(len(x), 0)
    for columns in _tiles_of(len(features)):
        squared, _ = _distances(rows, _Rows.of(_tile(features, columns, centre, str(x.device))))
        nearest = torch.cat([nearest, squared], dim=1)
        nearest = nearest.topk(min(num_kept, nearest.shape[1]), dim=1, largest=False).values
    return nearest


def _nearest_by_screening(features: Features, x: Tensor, places: list[int], centre: np.ndarray) -> Tensor:
    """The distances at some places of this order, float64 (R, K), by float32. Some more candidates are kept, and those that might
    be at a place by the error of float32 are computed in float64. Rows with too many such are computed as above."""
    rows, num_candidates = _Rows.of(x), min(max(places) + 1 + _MORE_CANDIDATES, len(features))
    screened, samples = rows.singles.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64)
    error = 0.0
    for columns in _tiles_of(len(features)):
        squared, bound = _single_distances(rows, _Rows.of(_tile(features, columns, centre, "cpu")))
        error = max(error, bound)
        values, order = squared.topk(min(num_candidates, len(columns)), dim=1, largest=False)
        screened, samples = torch.cat([screened, values], dim=1), torch.cat([samples, order + columns.start], dim=1)
        screened, order = screened.topk(min(num_candidates, screened.shape[1]), dim=1, largest=False)
        samples = samples.gather(1, order)
    found = []
    for place in places:
        gaps = screened - screened[:, place : place + 1]
        ordered = torch.where(gaps < 0, -torch.inf, torch.inf).double()  # but where float32 cannot tell
        i, j = (gaps.abs() <= 2 * error).nonzero(as_tuple=True)
        ordered[i, j] = _pair_distances(x, features, centre, i, samples[i, j])
        found.append(ordered.sort(dim=1).values[:, place])
    nearest = torch.stack(found, dim=1)
    is_open = screened[:, -1] - error < nearest.amax(dim=1)
    if num_candidates < len(features) and is_open.any():
        nearest[is_open] = _nearest(features, x[is_open], max(places) + 1, centre)[:, places]
    return nearest


def manifold_counts(
    reference: Features,
    reference_radii: np.ndarray,
    generated: Features,
    generated_radii: np.ndarray,
    block: range,
    *,
    device: str = "cpu",
) -> ManifoldCounts:
    """Which generated samples of a block and which reference samples are in whose balls.

    `reference`: float (M, F).   `reference_radii`: float64 (M, 3), from squared_radii: of the closed and of the open balls, and of
    those that reach to the nearest other sample.
    `generated`: float (N, F).   `generated_radii`: float64 (R,), from squared_radii for the same block.
    Raises ValueError for features of different widths and values that are not finite.
    """
    check_features(generated, "generated features")
    num_reference = check_features(reference, "reference features")
    check_same_width(reference, generated)
    centre = _centre(reference)
    x, own = _tile(generated, block, centre, device), torch.from_numpy(generated_radii[:, None]).to(device)
    counts, reached = np.zeros((2, len(block)), dtype=np.int64), np.zeros((4, num_reference), dtype=np.int64)
    rows, nearest = _Rows.of(x), _Nearest(x)
    compare: Callable[..., list[Tensor]] = _compare_by_screening if device == "cpu" else _compare
    for columns in _tiles_of(num_reference):
        radii = (*torch.from_numpy(reference_radii[columns, :2].T.copy()).to(device), own)
        tile = _Rows.of(_tile(reference, columns, centre, device))
        squared, error = _single_distances(rows, tile) if device == "cpu" else _distances(rows, tile)
        nearest.add(squared, float(torch.as_tensor(error).max()), columns.start)
        is_in_closed, is_in_open, is_in_own = compare(rows, tile, radii, squared, error)
        counts += torch.stack([_count(is_in_closed, 1), _count(is_in_open, 1)]).cpu().numpy()
        both = torch.stack([is_in_own, is_in_open])
        reached[:, columns] = torch.cat([_count(both, 1), both.view(torch.uint8).argmax(dim=1) + block.start]).cpu().numpy()
    is_authentic = _is_authentic(rows, nearest, reference, reference_radii[:, 2], centre)
    return ManifoldCounts(*(*counts, *reached, is_authentic.cpu().numpy()))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Samples of a block or a tile. values: float64 (R, F).   singles: the same in float32.   norms: squared, float64 (R,)."""

    values: Tensor
    singles: Tensor
    norms: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Rows:
        return cls(values, values.float(), values.square().sum(dim=1))


_Radii = tuple[Tensor, Tensor, Tensor]  # squared, of the closed and open balls of columns (C,), and of the balls of rows (R, 1)


class _Nearest:
    """The nearest column of each row so far, int64 (R,), and whether another one may be as near or nearer, bool (R,)."""

    def __init__(self, rows: Tensor) -> None:
        self.samples = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self._first, self._second = (torch.full((len(rows),), torch.inf, device=rows.device) for _ in range(2))
        self._error = 0.0

    def add(self, squared: Tensor, error: float, start: int) -> None:
        """The distances to columns from `start` on, (R, C), and what they may be off by."""
        first, column = squared.min(dim=1)
        second = squared.scatter(1, column[:, None], torch.inf).amin(dim=1)
        self._second = torch.minimum(torch.minimum(second, self._second), torch.maximum(first, self._first))
        self.samples = torch.where(first < self._first, column + start, self.samples)
        self._first, self._error = torch.minimum(first, self._first), max(self._error, error)

    @property
    def is_open(self) -> Tensor:
        return self._second - self._first <= 2 * self._error


def _is_authentic(x: _Rows, nearest: _Nearest, reference: Features, squared_radii: np.ndarray, centre: np.ndarray) -> Tensor:
    """bool (R,). Of reference samples that are equally near, the first counts.   squared_radii: float64 (M,)."""
    samples, is_open = nearest.samples, nearest.is_open
    if is_open.any():
        rows, least = _Rows.of(x.values[is_open]), x.values.new_full((int(is_open.sum()),), torch.inf)
        chosen, device = samples[is_open], str(x.values.device)
        for columns in _tiles_of(len(reference)):
            squared, slack = _distances(rows, _Rows.of(_tile(reference, columns, centre, device)))
            column = (squared <= squared.amin(dim=1, keepdim=True) + slack).view(torch.uint8).argmax(dim=1)
            found, slack = (each.gather(1, column[:, None])[:, 0] for each in (squared, slack))
            is_nearer = found < least - slack
            chosen, least = torch.where(is_nearer, column + columns.start, chosen), torch.where(is_nearer, found, least)
        samples = samples.masked_scatter(is_open, chosen)
    others = _Rows.of(_tile(reference, samples.tolist(), centre, str(x.values.device)))
    radii = torch.from_numpy(squared_radii).to(samples.device)[samples]
    slack = (x.norms + others.norms) * _slack(x.values.shape[1])
    return (x.values - others.values).square().sum(dim=1) > radii + slack


def _compare(x: _Rows, y: _Rows, radii: _Radii, squared: Tensor, error: Tensor) -> list[Tensor]:
    """Whether rows and columns are in each other's balls: bool (R, C) by kind of ball. squared, error: from _distances."""
    closed, opened, own = radii
    return [squared <= closed + error, squared < opened - error, squared <= own + error]


def _compare_by_screening(x: _Rows, y: _Rows, radii: _Radii, squared: Tensor, error: float) -> list[Tensor]:
    """The same by float32, with _single_distances. Pairs that are close to the surface of a ball are compared in float64."""
    singles = [each.float() for each in radii]
    error += torch.finfo(torch.float32).eps * max(float(each.max()) for each in singles)  # of the radii themselves
    found = [squared < each - error for each in singles]
    might_be = [squared <= each + error for each in singles]
    is_open = (found[0] ^ might_be[0]) | (found[1] ^ might_be[1]) | (found[2] ^ might_be[2])
    i, j = is_open.nonzero(as_tuple=True)
    if len(i) > _MOST_OPEN * is_open.numel():
        return _compare(x, y, radii, *_distances(x, y))
    exact = torch.cat(
        [
            (x.values[some] - y.values[others]).square().sum(dim=1)
            for some, others in zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True)
        ]
    )
    slack = (x.norms[i] + y.norms[j]) * _slack(x.values.shape[1])
    found[0][i, j] = exact <= radii[0][j] + slack
    found[1][i, j] = exact < radii[1][j] - slack
    found[2][i, j] = exact <= radii[2][i, 0] + slack
    return found


def _count(values: Tensor, dim: int) -> Tensor:
    """How many are true. torch 2.13 sums booleans five times as slowly."""
    return values.view(torch.uint8).sum(dim=dim, dtype=torch.int32)


def _single_distances(x: _Rows, y: _Rows) -> tuple[Tensor, float]:
    """As _distances, in float32, and the largest error of any of them: of the inputs, of the product and of the sums."""
    squared = torch.addmm(x.norms.float()[:, None] + y.norms.float(), x.singles, y.singles.T, alpha=-2)
    largest = float(x.norms.max() + y.norms.max())
    return squared, (x.values.shape[1] / 2 + 16) * torch.finfo(torch.float32).eps * largest


def _pair_distances(x: Tensor, features: Features, centre: np.ndarray, rows: Tensor, samples: Tensor) -> Tensor:
    """Squared distances of pairs, float64 (P,). rows: of x, samples: of the features; int64 (P,) both."""
    found = [
        (x[i] - torch.from_numpy(take_rows(features, j.numpy()) - centre)).square().sum(dim=1)
        for i, j in zip(rows.split(_PAIRS_AT_ONCE), samples.split(_PAIRS_AT_ONCE), strict=True)
    ]
    return torch.cat(found)


def _distances(x: _Rows, y: _Rows) -> tuple[Tensor, Tensor]:
    """Squared distances of rows of x (R, F) and y (C, F), and what two such distances may differ by if they are equal.

    A product of F terms is within F eps / 2 |x||y| of the truth in any order of the sum (Higham 2002, sec. 3.1), and so are the
    norms. Float64 (R, C) both.
    """
    norms = x.norms[:, None] + y.norms
    squared = torch.addmm(norms, x.values, y.values.T, alpha=-2)
    return squared, norms.mul_(_slack(x.values.shape[1]))


def _slack(width: int) -> float:
    """Relative to the sum of both squared norms."""
    return (4 * width + 32) * torch.finfo(torch.float64).eps


def _tiles_of(num_samples: int) -> list[range]:
    return [range(start, min(start + TILE_COLUMNS, num_samples)) for start in range(0, num_samples, TILE_COLUMNS)]


def _centre(features: Features) -> np.ndarray:
    """float64 (F,), amid the samples: rounding errors grow with the distance to it."""
    return take_rows(features, np.arange(len(features))[:BLOCK_SIZE]).mean(axis=0)


def _tile(features: Features, rows: Sequence[int], centre: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(take_rows(features, np.array(rows)) - centre).to(device)
