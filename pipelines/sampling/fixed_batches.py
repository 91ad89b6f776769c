"""Samples of a model by their index in a run, in passes of fixed composition: see enat.execution.passes.

Shape legend: B requested samples of one pass, P rows of a pass, L tokens, N steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.execution.passes import fix_numerics, fixed_numerics, in_a_pass, pass_pool, passes_at_once, split_into_passes
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import Loop, sample
from pipelines.data.samples import sample_seed

__all__ = ["PassSampler", "fix_numerics", "fixed_numerics", "in_a_pass", "pass_pool", "passes_at_once", "split_into_passes"]


@dataclass(frozen=True)
class PassSampler:
    """Samples of a model by their index in a run.

    conditions: sample indices int64 (P,) -> labels int64 (P,), or captions.   starts: indices -> initial tokens, int64 (P, L).
    guide, loop: of enat.sampling.sampler.sample.
    """

    model: ENAT
    sampler: SamplerConfig
    run_seed: int
    images_per_pass: int
    is_bf16: bool
    conditions: Callable[[np.ndarray], Tensor | TextCondition]
    starts: Callable[[np.ndarray], Tensor | None] = lambda _: None
    guide: ENAT | None = None
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
                guide=self.guide,
                loop=self.loop,
                return_trajectory=True,
            )
        return torch.stack([*trajectory, codes], dim=1).cpu()
