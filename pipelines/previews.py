"""What a model in training makes: a grid of samples from fixed seeds, so that grids of different steps can be compared."""

from __future__ import annotations

import numpy as np
import torch

from enat.images import make_grid, png_bytes, to_uint8
from enat.model import ENAT, TextCondition
from enat.sampler import SamplerConfig, sample
from enat.tokenizer import VQGAN
from pipelines.caption_features import CaptionFeatures

_IMAGES = 20


def preview(model: ENAT, vqgan: VQGAN, sampler: SamplerConfig, captions: CaptionFeatures | None) -> bytes:
    """A PNG: two images of each of the first ten classes, or some captions. The model must be in eval mode."""
    condition = _condition(model, captions)
    count = len(condition)
    codes = sample(model, condition, sampler, seeds=range(count))
    side = model.config.grid_size
    images = to_uint8(vqgan.decode(codes.view(-1, side, side)))
    return png_bytes(make_grid(images, columns=count // 2, scale=max(1, 64 // images.shape[-1])))


def _condition(model: ENAT, captions: CaptionFeatures | None) -> torch.Tensor | TextCondition:
    if captions is None:
        return torch.arange(min(_IMAGES // 2, max(1, model.config.num_classes))).repeat(2)
    numbers = np.arange(_IMAGES) * len(captions) // _IMAGES
    device = model.token_embedding.weight.device
    return TextCondition(*(torch.from_numpy(array).to(device) for array in captions.take(numbers)))
