"""Pictures of samples: grids, the steps of decoding side by side, and animations.

Shape legend: B images, L tokens, N steps, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from enat.execution.passes import DECODED_PER_PASS
from enat.images import make_grid, to_uint8
from enat.tokenizer import VQGAN

MASKED_GRAY = 160
IMAGES_PER_PASS = DECODED_PER_PASS  # images that are decoded together
_MIN_PIXELS = 96  # smaller images are enlarged
_FRAME_MILLISECONDS = 250
_LAST_FRAME_MILLISECONDS = 2000


@torch.no_grad()
def decode_codes(vqgan: VQGAN, codes: Tensor) -> Tensor:
    """int64 (B, L) -> uint8 (B, 3, H, W) on the CPU."""
    side, device = vqgan.config.grid_size, vqgan.codebook.weight.device
    parts = codes.view(-1, side, side).split(IMAGES_PER_PASS)
    return torch.cat([to_uint8(vqgan.decode(part.to(device))).cpu() for part in parts])


def step_images(vqgan: VQGAN, trajectory: Sequence[Tensor], codes: Tensor, mask_id: int) -> Tensor:
    """The image before the first step and after each step: uint8 (N + 1, B, 3, H, W). Masked tokens are gray.

    trajectory: the tokens fed at each step, N times int64 (B, L).   codes: int64 (B, L), the result.
    """
    side, factor = vqgan.config.grid_size, vqgan.config.downsampling
    frames = []
    for tokens in (*trajectory, codes):
        is_masked = tokens.cpu() == mask_id
        pixels = is_masked.view(-1, 1, side, side).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        images = decode_codes(vqgan, tokens.cpu().masked_fill(is_masked, 0))
        frames.append(images.masked_fill(pixels, MASKED_GRAY))
    return torch.stack(frames)


def grid_of(images: Tensor, num_asked: int = 0) -> Image.Image:
    """A grid of images uint8 (B, 3, H, W). `num_asked`: number of requested labels or captions; up to 16 share a row."""
    columns = num_asked if 1 < num_asked <= 16 and len(images) > num_asked else columns_of(len(images))
    return make_grid(images, columns, scale=scale_for(images.shape[-1]))


def columns_of(num_images: int) -> int:
    """The number of columns of a nearly square grid."""
    return min(num_images, max(4, round(num_images**0.5)))


def scale_for(resolution: int) -> int:
    """The factor by which images of a resolution are enlarged."""
    return max(1, _MIN_PIXELS // resolution)


def strip(frames: Tensor, scale: int = 1, *, with_start: bool = False) -> Image.Image:
    """uint8 (N + 1, B, 3, H, W) -> a row per image, a column per step. `with_start`: include the image before the first step."""
    shown = frames if with_start else frames[1:]
    return make_grid(shown.transpose(0, 1).flatten(0, 1), columns=len(shown), scale=scale)


def animation(frames: Tensor, columns: int, scale: int = 1) -> bytes:
    """uint8 (N + 1, B, 3, H, W) -> a looping GIF of a grid of the images, which pauses at the result."""
    grids = [make_grid(images, columns, scale=scale) for images in frames]
    # One palette for all frames, or the colours flicker: those of the result, and the gray of masked tokens.
    colours = grids[-1].quantize(255).getpalette()
    assert colours is not None
    palette = Image.new("P", (1, 1))
    palette.putpalette([MASKED_GRAY] * 3 + colours)
    indexed = [grid.quantize(palette=palette, dither=Image.Dither.NONE) for grid in grids]
    durations = [_FRAME_MILLISECONDS] * (len(grids) - 1) + [_LAST_FRAME_MILLISECONDS]
    buffer = io.BytesIO()
    indexed[0].save(buffer, format="GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    return buffer.getvalue()
