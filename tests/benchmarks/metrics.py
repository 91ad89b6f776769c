"""Speed of what is quadratic in the number of images, over torch-fidelity or a plain loop: ratios within one run.

    make bench                                        with the other benchmarks
    .venv/bin/python tests/benchmarks/metrics.py      alone (about 3 minutes on two cores)
    .venv/bin/python tests/benchmarks/metrics.py --scale 0.25 --num-rounds 1      fewer images, less accurate

Both sides have all threads of the machine. Rounds of ours and theirs alternate; the fastest of each counts.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import in_process, run_script, show, where

_WIDTH = 2048  # of Inception's features
_CODES, _CODEBOOK = 256, 1024  # of an image of 256 px


@click.command()
@click.option("--scale", default=1.0, help="Factor on the numbers of images.")
@click.option("--num-rounds", default=2, help="Runs of each side. The fastest counts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(scale: float, num_rounds: int, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        figures = in_process(__file__, "measure", Path(folder), scale, num_rounds)
    show("metrics", {**where(), "rounds": num_rounds, **figures}, as_json)


def measure(_: Path, scale: float, num_rounds: int) -> dict[str, float]:
    torch.set_num_threads(os.cpu_count() or 1)
    return {**kernel_distances(scale, num_rounds), **manifolds(scale, num_rounds), **nearest_codes(scale, num_rounds)}


def kernel_distances(scale: float, num_rounds: int) -> dict[str, float]:
    """KID with 100 subsets of 1,000."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    from enat.metrics.moments import kernel_distance

    made, real, size = *_features(max(2000, int(8000 * scale))), max(50, int(1000 * scale))
    settings = {"kid_subsets": 100, "kid_subset_size": size, "rng_seed": 2020, "verbose": False, "kid_kernel": "poly"}
    settings |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    ours, theirs = _fastest(
        lambda: kernel_distance(made, real, subset_size=size),
        lambda: kid_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), **settings),
        num_rounds,
    )
    return {"kid_seconds": ours, "torch_fidelity_kid_seconds": theirs, "kid_over_torch_fidelity": theirs / ours}


def manifolds(scale: float, num_rounds: int) -> dict[str, float]:
    """Precision and recall, of which ours also have density, coverage and authenticity."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    from enat.metrics.neighbours import manifold_scores

    made, real = _features(max(500, int(8000 * scale)))
    settings = {"prc_neighborhood": 3, "prc_batch_size": 4096, "save_cpu_ram": False, "verbose": False}
    ours, theirs = _fastest(
        lambda: manifold_scores(real, made),
        lambda: prc_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), **settings),
        num_rounds,
    )
    return {"precision_seconds": ours, "torch_fidelity_precision_seconds": theirs, "precision_over_torch_fidelity": theirs / ours}


def nearest_codes(scale: float, num_rounds: int) -> dict[str, float]:
    """Pairs a second of the nearest row by Hamming distance, over comparing every code of every pair with numpy.

    A process for each core, as the workers of stage memorization.
    """
    cores = os.cpu_count() or 1
    sizes = max(64, int(10_000 * scale)), max(1024, int(65_536 * scale))
    rates = []
    for is_plain, count in ((False, sizes[0]), (True, 32)):
        with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
            seconds = max(pool.map(partial(_seconds, count, sizes[1], num_rounds, is_plain), range(cores)))
        rates.append(cores * 2 * sizes[1] * count / seconds)
    return {
        "nearest_codes_million_pairs_per_second": rates[0] / 1e6,
        "plain_million_pairs_per_second": rates[1] / 1e6,
        "nearest_codes_over_plain": rates[0] / rates[1],
        "minutes_for_10000_samples_and_imagenet": 10_000 * 2 * 1_281_167 / rates[0] / 60,
    }


def _seconds(num_queries: int, num_rows: int, num_rounds: int, is_plain: bool, seed: int) -> float:
    """Of the fastest round. Codes are drawn with unequal frequencies: the 9th is used a third as often as the first."""
    from enat.metrics.hamming import nearest_rows

    rng, frequencies = np.random.default_rng(seed), np.arange(1, _CODEBOOK + 1) ** -0.5
    queries, codes = (
        rng.choice(_CODEBOOK, size=shape, p=frequencies / frequencies.sum()).astype(np.uint16)
        for shape in ((num_queries, _CODES), (num_rows, 2, _CODES))
    )

    def plain() -> None:
        for query in queries:
            (codes == query).sum(axis=2, dtype=np.int16).argmax()

    return _fastest(plain if is_plain else lambda: nearest_rows(queries, codes), lambda: None, num_rounds)[0]


def _features(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of different scale, of positive numbers as Inception's are: float32 (N, F) both."""
    rng = np.random.default_rng(0)
    made, real = (np.abs(rng.normal(scale=scale, size=(count, _WIDTH))).astype(np.float32) for scale in (0.5, 0.52))
    return made, real


def _fastest(ours: Callable[[], Any], theirs: Callable[[], Any], num_rounds: int) -> tuple[float, float]:
    """Seconds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_rounds):
        for kept, run in zip(seconds, (ours, theirs), strict=True):
            started = time.perf_counter()
            run()
            kept.append(time.perf_counter() - started)
    return min(seconds[0]), min(seconds[1])


if __name__ == "__main__":
    run_script(globals(), main)
