"""Passes of fixed composition, which give a sample the same numbers on any number of workers.

The rounding of matrix products and convolutions depends on their shape, and could change a code whose draw is nearly tied.
Therefore sample i is always row i % P of a pass of P rows. Rows of other samples repeat a
requested one, which does not affect the other rows.

Shape legend: B requested samples of one pass, P rows of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

DECODED_PER_PASS = 16  # images that are decoded together: decoding takes more memory than sampling

_FIXED_NUMERICS = (  # full float32 precision, deterministic
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cudnn, "deterministic", True),
)


def split_into_passes(start: int, stop: int, images_per_pass: int) -> list[range]:
    """Split samples start..stop-1 into passes, in order."""
    first = start - start % images_per_pass
    return [range(max(start, at), min(stop, at + images_per_pass)) for at in range(first, stop, images_per_pass)]


def in_a_pass(compute: Callable[[np.ndarray], Tensor], index: range, images_per_pass: int) -> Tensor:
    """Compute the samples of `index`, which belong to one pass: (B, ...). `compute`: sample indices int64 (P,) -> (P, ...)."""
    assert index.start // images_per_pass == (index.stop - 1) // images_per_pass, f"{index} is more than one pass"
    samples = np.full(images_per_pass, index.start)
    first = index.start % images_per_pass
    rows = slice(first, first + len(index))
    samples[rows] = index
    return compute(samples)[rows]


def passes_at_once(device: str, *, batch_size: int, images_per_pass: int, num_threads: int) -> int:
    """The number of concurrent passes: one on a GPU; on a CPU as many as batch_size holds, with one thread each."""
    return min(num_threads, max(1, batch_size // images_per_pass)) if torch.device(device).type == "cpu" else 1


def pass_pool(num_passes: int) -> ThreadPoolExecutor:
    """A pool for concurrent passes with one torch thread each: sums depend on the number of threads of a matrix product."""
    return ThreadPoolExecutor(num_passes, initializer=torch.set_num_threads, initargs=(1,))


def fix_numerics(device: str) -> None:
    """Make results deterministic for the lifetime of this process."""
    if torch.device(device).type == "cuda":
        for backend, name, value in _FIXED_NUMERICS:
            setattr(backend, name, value)


@contextmanager
def fixed_numerics(device: str) -> Iterator[None]:
    """Make results deterministic within the context. Also restores the number of torch threads, which a pass_pool changes."""
    before = [getattr(backend, name) for backend, name, _ in _FIXED_NUMERICS]
    num_threads = torch.get_num_threads()
    fix_numerics(device)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        for (backend, name, _), value in zip(_FIXED_NUMERICS, before, strict=True):
            setattr(backend, name, value)
