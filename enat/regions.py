"""Regions of the token grid, for making parts of an image anew (see `start` of enat.sampler.sample).

Shape legend: B images, L = grid_size**2 tokens, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
