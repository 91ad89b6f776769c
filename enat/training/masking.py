"""Masks: the random ones of training (paper sec. 3 and 4.2; published settings), and boxes for editing.

One draw serves a whole group of images (published: the batch of one device). All images of a group then have the same number of
masked tokens, and gathers of fixed size split visible and masked tokens.

Shape legend: B images, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from enat.config import MaskingConfig

__all__ = ["MaskedCodes", "MaskingConfig", "box_mask", "mask_codes"]


@dataclass(frozen=True)
class MaskedCodes:
    """Codes as a model sees them in training.

    tokens: num_masked mask ids in each row.
    previous_tokens: the same with more tokens masked, as at an earlier step of sampling; None in fresh mode.
    """

    tokens: Int64[Tensor, "B L"]
    num_masked: int
    previous_tokens: Int64[Tensor, "B L"] | None
    previous_num_masked: int

    def rows(self, images: slice) -> MaskedCodes:
        """The same for some images: a group may be computed in several passes."""
        previous_tokens = self.previous_tokens[images] if self.previous_tokens is not None else None
        return MaskedCodes(self.tokens[images], self.num_masked, previous_tokens, self.previous_num_masked)


def mask_codes(codes: Int64[Tensor, "B L"], mask_id: int, config: MaskingConfig, rng: np.random.Generator) -> MaskedCodes:
    """Mask codes, L >= 2. All randomness comes from `rng`, on the CPU."""
    num_images, num_tokens = codes.shape
    num_masked = min(max(round(num_tokens * rng.beta(config.alpha, config.beta)), 1), num_tokens - 1)
    is_reuse = rng.random() < config.reuse_probability
    num_hidden_before = round((num_tokens - num_masked) * rng.random())  # tokens hidden only at the earlier step
    # A random order of positions. The first num_masked are masked; a longer prefix masks them and others.
    rank = torch.from_numpy(rng.random((num_images, num_tokens), dtype=np.float32).argsort(axis=1).argsort(axis=1)).to(codes.device)

    def hide(count: int) -> Tensor:
        return codes.masked_fill(rank < count, mask_id)

    previous_num_masked = num_masked + num_hidden_before if is_reuse else 0
    return MaskedCodes(hide(num_masked), num_masked, hide(previous_num_masked) if is_reuse else None, previous_num_masked)


def box_mask(grid_size: int, *, top: int, left: int, height: int, width: int) -> Bool[Tensor, " L"]:
    """True inside a box of the grid, in tokens. Raises ValueError for a box that is empty or extends beyond the grid.

    To sample codes (B, L) again inside the box, or around it:
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
