"""CLIP score: how well images fit their captions, by the cosine of CLIP's embeddings of both (Hessel et al. 2021).

Images are resized by Pillow's bicubic filter on 8 bits, as for CLIP's own training, not as for Fréchet distances.

Shape legend: N images, H x W pixels, F width of the common embedding, W width of the text model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from enat.metrics.image_encoders import ImageEncoder, read_image_encoder
from enat.text import load_text_encoder, load_text_projection


class ClipImages(ImageEncoder):
    """CLIP's image part, with CLIP's own resizing."""

    takes_float = False

    @classmethod
    def read(cls, folder: Path) -> ClipImages:
        """From the folder of a CLIPModel in the hub's format. Raises ValueError as read_image_encoder does."""
        return cls("clip", read_image_encoder("clip", folder).model)

    def resize(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 3, side, side), whole numbers"""
        pictures = [Image.fromarray(each) for each in images.permute(0, 2, 3, 1).cpu().numpy()]
        resized = [np.asarray(each.resize((self.side, self.side), Image.Resampling.BICUBIC)) for each in pictures]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(images.device)


def caption_embeddings(folder: Path, captions: Sequence[str], *, device: str = "cpu") -> np.ndarray:
    """float32 (N, F), by the text part of a CLIPModel. Longer captions than the model has positions are cut.

    Raises ValueError if the folder does not hold one, with its tokenizer.
    """
    encoder, projection = load_text_encoder(folder).to(device), load_text_projection(folder).to(device)
    embeddings: np.ndarray = (encoder.pooled(captions) @ projection.T).cpu().numpy()
    return embeddings


def clip_scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """100 times the cosine of each image and its caption, 0 where it is negative: float64 (N,), in [0, 100].

    images, captions: float (N, F). Raises ValueError for embeddings of different shapes.
    """
    if images.shape != captions.shape:
        raise ValueError(f"embeddings of images {images.shape} and captions {captions.shape} do not belong together")
    first, second = (each.astype(np.float64) for each in (images, captions))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    scores: np.ndarray = 100 * np.maximum((first * second).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny), 0)
    return scores
