"""Scores from nearest neighbours: improved precision and recall, density and coverage, from tiles of float64 distances.

Each sample spans a ball that reaches to its k-th nearest neighbour within its own set. The scores count which samples of the
other set are in which balls. Distances that differ by less than the rounding error of a matrix product are equal: ties are ties,
and results do not depend on blocks, devices or threads.

Shape legend: N samples, M reference samples, F features, R samples of a block, C columns of a tile, K numbers of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.feature_arrays import Features, check_features, check_same_width, take_rows

TILE_ROWS, TILE_COLUMNS = 1024, 4096  # 32 MiB of float64 distances


@dataclass(frozen=True)
class ManifoldScores:
    """precision: share of generated samples in the reference manifold.   recall: the other way round. Both in [0, 1].

    density: reference balls per generated sample over k, at least 0 and 1 in expectation for equal distributions.
    coverage: share of reference samples with a generated one in their ball, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False)
class ManifoldCounts:
    """num_closed_balls, num_open_balls: int64 (R,), reference balls that contain each generated sample, with and without boundary.

    is_recalled: bool (M,), reference samples in a ball of one of these generated samples.
    is_covered: bool (M,), reference samples whose own open ball contains one of these generated samples.
    """

    num_closed_balls: np.ndarray
    num_open_balls: np.ndarray
    is_recalled: np.ndarray
    is_covered: np.ndarray


def manifold_scores(reference: Features, generated: Features, num_neighbours: tuple[int, int] = (3, 5)) -> ManifoldScores:
    """Precision and recall with the first number of neighbours, density and coverage with the second.

    `reference`: float (M, F), `generated`: float (N, F). Raises ValueError as squared_radii and manifold_counts do.
    """
    radii, own_radii = squared_radii(reference, num_neighbours), squared_radii(generated, num_neighbours[:1])[:, 0]
    return scores_of_counts([manifold_counts(reference, radii, generated, own_radii)], num_neighbours[1])


def scores_of_counts(blocks: Sequence[ManifoldCounts], num_neighbours: int) -> ManifoldScores:
    """Scores from the counts of all generated samples, in blocks. `num_neighbours`: that of the open balls.

    Kynkaanniemi et al. 2019, eq. 2 and 3, with closed balls; Naeem et al. 2020, eq. 4 and 5, with open ones, as in their code.
    """
    return ManifoldScores(
        precision=float((np.concatenate([block.num_closed_balls for block in blocks]) > 0).mean()),
        recall=float(np.logical_or.reduce([block.is_recalled for block in blocks]).mean()),
        density=float(np.concatenate([block.num_open_balls for block in blocks]).mean()) / num_neighbours,
        coverage=float(np.logical_or.reduce([block.is_covered for block in blocks]).mean()),
    )


def squared_radii(
    features: Features, num_neighbours: Sequence[int], block: slice = slice(None), *, device: str = "cpu"
) -> np.ndarray:
    """Squared distances of the samples of a block to their k-th nearest other sample, for each k: float64 (R, K).

    `features`: float (N, F), the whole set. A sample with k copies has radius 0 up to rounding. Raises ValueError for k below 1,
    for N <= k and for values that are not finite.
    """
    num_samples, num_kept = check_features(features), max(num_neighbours) + 1  # a sample is the nearest to itself
    if min(num_neighbours) < 1 or num_kept > num_samples:
        asked = ", ".join(map(str, num_neighbours))
        raise ValueError(f"{asked} neighbours are requested; each of {num_samples} samples has 1 to {num_samples - 1}")
    centre, radii = _centre(features), []
    for rows in _split(np.arange(num_samples)[block], TILE_ROWS):
        x = _tile(features, rows, centre, device)
        nearest = x.new_empty(len(rows), 0)
        for columns in _split(np.arange(num_samples), TILE_COLUMNS):
            squared, _ = _distances(x, _tile(features, columns, centre, device))
            nearest = torch.cat([nearest, squared], dim=1)
            nearest = nearest.topk(min(num_kept, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, list(num_neighbours)].cpu().numpy())
    return np.concatenate(radii)


def manifold_counts(
    reference: Features,
    reference_radii: np.ndarray,
    generated: Features,
    generated_radii: np.ndarray,
    block: slice = slice(None),
    *,
    device: str = "cpu",
) -> ManifoldCounts:
    """Which generated samples of a block and which reference samples are in whose balls.

    `reference`: float (M, F).   `reference_radii`: float64 (M, 2), from squared_radii: of the closed and of the open balls.
    `generated`: float (N, F).   `generated_radii`: float64 (R,), from squared_radii for the same block.
    Raises ValueError for features of different widths and values that are not finite.
    """
    rows = np.arange(check_features(generated, "generated features"))[block]
    num_reference = check_features(reference, "reference features")
    check_same_width(reference, generated)
    assert reference_radii.shape == (num_reference, 2) and generated_radii.shape == (len(rows),)
    centre = _centre(reference)
    closed_counts, open_counts = np.zeros((2, len(rows)), dtype=np.int64)
    is_recalled, is_covered = np.zeros((2, num_reference), dtype=bool)
    for places in _split(np.arange(len(rows)), TILE_ROWS):
        own = torch.from_numpy(generated_radii[places, None]).to(device)
        for columns in _split(np.arange(num_reference), TILE_COLUMNS):
            x, y = _tile(generated, rows[places], centre, device), _tile(reference, columns, centre, device)
            squared, error = _distances(x, y)
            closed, opened = torch.from_numpy(reference_radii[columns].T.copy()).to(device)
            is_in_open = squared < opened - error
            closed_counts[places] += (squared <= closed + error).sum(dim=1).cpu().numpy()
            open_counts[places] += is_in_open.sum(dim=1).cpu().numpy()
            is_recalled[columns] |= (squared <= own + error).any(dim=0).cpu().numpy()
            is_covered[columns] |= is_in_open.any(dim=0).cpu().numpy()
    return ManifoldCounts(closed_counts, open_counts, is_recalled, is_covered)


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of rows of x (R, F) and y (C, F), and what two such distances may differ by if they are equal.

    A product of F terms is within F eps / 2 |x||y| of the truth in any order of the sum (Higham 2002, sec. 3.1), and so are the
    norms. Float64 (R, C) both.
    """
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    return squared, norms.mul_((4 * x.shape[1] + 32) * torch.finfo(torch.float64).eps)


def _centre(features: Features) -> np.ndarray:
    """float64 (F,), amid the samples: rounding errors grow with the distance to it."""
    return take_rows(features, np.arange(len(features))[:TILE_COLUMNS]).mean(axis=0)


def _tile(features: Features, indices: np.ndarray, centre: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(take_rows(features, indices) - centre).to(device)


def _split(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
