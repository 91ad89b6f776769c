"""What is masked in training (paper sec. 3 and 4.2; published settings).

One draw serves a whole group of images (published: the batch of one device), so that every image of a group has the same
number of masked tokens and visible and masked tokens can be split by gathers of fixed size.
Shape legend: B images, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enat.config import MaskingConfig

__all__ = ["MaskedCodes", "MaskingConfig", "box_mask", "mask_codes"]


@dataclass(frozen=True)
class MaskedCodes:
    """Codes as a model sees them in training.

    tokens: int64 (B, L) with num_masked mask ids a row.
    previous_tokens: the same with more masked, as at an earlier step of sampling; None in fresh mode.
    """

    tokens: Tensor
    num_masked: int
    previous_tokens: Tensor | None
    previous_num_masked: int

    def rows(self, images: slice) -> MaskedCodes:
        """The same of some images: a group may be computed in several passes."""
        previous_tokens = self.previous_tokens[images] if self.previous_tokens is not None else None
        return MaskedCodes(self.tokens[images], self.num_masked, previous_tokens, self.previous_num_masked)


def mask_codes(codes: Tensor, mask_id: int, config: MaskingConfig, rng: np.random.Generator) -> MaskedCodes:
    """Mask codes int64 (B, L) with L >= 2; all randomness comes from rng, on the CPU."""
    num_images, num_tokens = codes.shape
    num_masked = min(max(round(num_tokens * rng.beta(config.alpha, config.beta)), 1), num_tokens - 1)
    is_reuse = rng.random() < config.reuse_probability
    num_hidden_before = round((num_tokens - num_masked) * rng.random())  # further tokens hidden at the earlier step
    # A random order of positions: the first num_masked are masked, so a longer prefix masks those and further ones.
    rank = torch.from_numpy(rng.random((num_images, num_tokens), dtype=np.float32).argsort(axis=1).argsort(axis=1)).to(codes.device)

    def hide(count: int) -> Tensor:
        return codes.masked_fill(rank < count, mask_id)

    previous_num_masked = num_masked + num_hidden_before if is_reuse else 0
    return MaskedCodes(hide(num_masked), num_masked, hide(previous_num_masked) if is_reuse else None, previous_num_masked)


def box_mask(grid_size: int, *, top: int, left: int, height: int, width: int) -> Tensor:
    """bool (L,), True inside of a box of the grid, in tokens. Raises ValueError for a box that is empty or leaves the grid.

    Codes (B, L) are painted anew inside of it, or around it:
        start = codes.masked_fill(box_mask(...), mask_id)     start = codes.masked_fill(~box_mask(...), mask_id)
    """
    if height < 1 or width < 1:
        raise ValueError(f"the box is {height} x {width} tokens; it must hold at least one")
    if top < 0 or left < 0 or top + height > grid_size or left + width > grid_size:
        raise ValueError(
            f"the box spans rows {top} to {top + height - 1} and columns {left} to {left + width - 1}; "
            f"the grid has 0 to {grid_size - 1}"
        )
    mask = torch.zeros((grid_size, grid_size), dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask.flatten()
