"""Scores from nearest neighbours: improved precision and recall, density and coverage, from tiles of float64 distances.

Each sample spans a ball that reaches to its k-th nearest neighbour within its own set. The scores count which samples of the
other set are in which balls. Distances that differ by less than the rounding error of a matrix product are equal: ties are ties,
and results do not depend on blocks, devices or threads.

Shape legend: N samples, M reference samples, F features, R samples of a block, C columns of a tile, K numbers of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.metrics.moments import Features, check_features, check_same_width, take_rows

BLOCK_SIZE, TILE_COLUMNS = 4096, 1024  # 32 MiB of float64 distances


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


def manifold_scores(reference: Features, generated: Features, num_neighbours: tuple[int, int] = (3, 5)) -> ManifoldScores:
    """Precision and recall with the first number of neighbours, density and coverage with the second.

    `reference`: float (M, F), `generated`: float (N, F). Raises ValueError as squared_radii and manifold_counts do.
    """
    radii = np.concatenate([squared_radii(reference, num_neighbours, block) for block in blocks_of(len(reference))])
    own_radii = {block: squared_radii(generated, num_neighbours[:1], block)[:, 0] for block in blocks_of(len(generated))}
    counts = [manifold_counts(reference, radii, generated, own, block) for block, own in own_radii.items()]
    return scores_of_counts(counts, num_neighbours[1])


def blocks_of(num_samples: int) -> list[range]:
    """Samples that are computed at once."""
    return [range(start, min(start + BLOCK_SIZE, num_samples)) for start in range(0, num_samples, BLOCK_SIZE)]


def scores_of_counts(blocks: Sequence[ManifoldCounts], num_neighbours: int) -> ManifoldScores:
    """Scores from the counts of all generated samples, in blocks. `num_neighbours`: that of the open balls.

    Kynkaanniemi et al. 2019, eq. 2 and 3, with closed balls; Naeem et al. 2020, eq. 4 and 5, with open ones, as in their code.
    """
    return ManifoldScores(
        precision=float((np.concatenate([block.num_closed_balls for block in blocks]) > 0).mean()),
        recall=float((np.sum([block.num_recalling for block in blocks], axis=0) > 0).mean()),
        density=float(np.concatenate([block.num_open_balls for block in blocks]).mean()) / num_neighbours,
        coverage=float((np.sum([block.num_covering for block in blocks], axis=0) > 0).mean()),
    )


def influences_of_counts(blocks: Sequence[ManifoldCounts], num_neighbours: int) -> dict[str, np.ndarray]:
    """Influence of each generated sample on the fields of ManifoldScores, for errors.standard_error: float64 (N,) each.

    Precision and density are means over the generated samples. Recall and coverage lose, without a sample, the reference samples
    that only this one reaches (the jackknife), which makes their error rather too large than too small (Efron and Stein 1981).
    """
    found = {
        "precision": np.concatenate([block.num_closed_balls for block in blocks]) > 0,
        "density": np.concatenate([block.num_open_balls for block in blocks]) / num_neighbours,
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
    nearest = x.new_empty(len(block), 0)
    for start in range(0, num_samples, TILE_COLUMNS):
        squared, _ = _distances(x, _tile(features, range(start, min(start + TILE_COLUMNS, num_samples)), centre, device))
        nearest = torch.cat([nearest, squared], dim=1)
        nearest = nearest.topk(min(num_kept, nearest.shape[1]), dim=1, largest=False).values
    return nearest[:, list(num_neighbours)].cpu().numpy()


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

    `reference`: float (M, F).   `reference_radii`: float64 (M, 2), from squared_radii: of the closed and of the open balls.
    `generated`: float (N, F).   `generated_radii`: float64 (R,), from squared_radii for the same block.
    Raises ValueError for features of different widths and values that are not finite.
    """
    check_features(generated, "generated features")
    num_reference = check_features(reference, "reference features")
    check_same_width(reference, generated)
    centre = _centre(reference)
    x, own = _tile(generated, block, centre, device), torch.from_numpy(generated_radii[:, None]).to(device)
    counts, reached = np.zeros((2, len(block)), dtype=np.int64), np.zeros((4, num_reference), dtype=np.int64)
    for start in range(0, num_reference, TILE_COLUMNS):
        columns = range(start, min(start + TILE_COLUMNS, num_reference))
        squared, error = _distances(x, _tile(reference, columns, centre, device))
        closed, opened = torch.from_numpy(reference_radii[columns].T.copy()).to(device)
        is_in_open = squared < opened - error
        counts += torch.stack([(squared <= closed + error).sum(dim=1), is_in_open.sum(dim=1)]).cpu().numpy()
        both = torch.stack([squared <= own + error, is_in_open])
        reached[:, columns] = torch.cat([both.sum(dim=1), both.to(torch.uint8).argmax(dim=1) + block.start]).cpu().numpy()
    return ManifoldCounts(*counts, *reached)


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
    return take_rows(features, np.arange(len(features))[:BLOCK_SIZE]).mean(axis=0)


def _tile(features: Features, rows: range, centre: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(take_rows(features, np.array(rows)) - centre).to(device)
