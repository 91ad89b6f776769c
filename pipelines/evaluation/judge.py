"""A judge that has nothing to do with the extractor: a support vector machine that is fitted on the pixels of real images.

Shape legend: N samples, B images, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.readers import BlockReader, SourceImages, read_images

if TYPE_CHECKING:
    import torch

MAX_IMAGES = 20_000  # a support vector machine's fit grows with the square of it


def agreements(
    real: SourceImages, readers: Sequence[BlockReader], images_per_pass: int, requested: np.ndarray
) -> tuple[list[np.ndarray], float, float]:
    """Whether a support vector machine sees the requested label in each sample, float64 (N,) by reader; its accuracy on held-out
    real images; seconds.

    requested: int64 (N,), labels of the first N samples.
    """
    import torch
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    started = time.monotonic()
    torch.set_num_threads(1)
    images, labels = real.dataset.load_images(real.resolution, 0, MAX_IMAGES)
    pixels = _gray(torch.from_numpy(images))
    machine = SVC(C=10.0)
    accuracy = cross_val_score(machine, pixels, labels, cv=5).mean()
    machine.fit(pixels, labels)
    predicted = [machine.predict(_gray(read_images(reader, 0, len(requested), images_per_pass))) for reader in readers]
    return [(each == requested).astype(np.float64) for each in predicted], float(accuracy), time.monotonic() - started


def _gray(images: torch.Tensor) -> Any:
    """uint8 (B, 3, H, W) -> float64 (B, H * W) in [0, 1]"""
    return images.double().mean(dim=1).flatten(1).numpy() / 255
