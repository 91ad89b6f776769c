"""Passes of fixed composition, which give a sample the same numbers on any number of workers.

The rounding of matrix products and convolutions depends on their shape, and could change a code whose draw is nearly tied.
Therefore sample i is always row i % P of a pass of P rows. Rows of other samples repeat a
requested one, which does not affect the other rows.

Shape legend: B requested samples of one pass, P rows of a pass, L tokens, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.model import ENAT, TextCondition
from enat.sampler import Loop, sample
from enat.sampler_config import SamplerConfig
from pipelines.data.samples import sample_seed

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


@dataclass(frozen=True)
class PassSampler:
    """Samples of a model by their index in a run.

    conditions: sample indices int64 (P,) -> labels int64 (P,), or captions.   starts: indices -> initial tokens, int64 (P, L).
    loop: of enat.sampler.sample.
    """

    model: ENAT
    sampler: SamplerConfig
    run_seed: int
    images_per_pass: int
    is_bf16: bool
    conditions: Callable[[np.ndarray], Tensor | TextCondition]
    starts: Callable[[np.ndarray], Tensor | None] = lambda _: None
    loop: Loop | None = None

    def states(self, index: range) -> Tensor:
        """The tokens fed at each step, and the codes: int64 (B, N + 1, L) on the CPU. `index`: samples of one pass."""
        return in_a_pass(self._states, index, self.images_per_pass)

    @torch.no_grad()
    def _states(self, samples: np.ndarray) -> Tensor:
        seeds = [sample_seed(self.run_seed, each) for each in samples.tolist()]
        device = self.model.token_embedding.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.is_bf16):
            codes, trajectory = sample(
                self.model,
                self.conditions(samples),
                self.sampler,
                seeds=seeds,
                start=self.starts(samples),
                loop=self.loop,
                return_trajectory=True,
            )
        return torch.stack([*trajectory, codes], dim=1).cpu()


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
