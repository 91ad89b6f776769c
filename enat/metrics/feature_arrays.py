"""Arrays of features: tensors of any device and precision, or numpy arrays, including memory-mapped ones.

Shape legend: N samples, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray
CHUNK = 4096  # rows that are converted to float64 at once


def check_features(features: Features, name: str = "features") -> int:
    """The number of samples N. Raises ValueError for anything but finite floats (N, F) with N and F above 0."""
    is_float = features.is_floating_point() if isinstance(features, Tensor) else features.dtype.kind == "f"
    if features.ndim != 2 or 0 in features.shape or not is_float:
        raise ValueError(f"{name} are {features.dtype} {tuple(features.shape)}; floats of shape (N, F) are needed")
    for start in range(0, len(features), CHUNK):
        chunk = features[start : start + CHUNK]
        is_finite = chunk.isfinite().all() if isinstance(chunk, Tensor) else np.isfinite(chunk).all()
        if not is_finite:
            raise ValueError(f"{name} hold values that are not finite; the extractor or its input is broken")
    return len(features)


def check_same_width(first: Features, second: Features) -> None:
    """Raises ValueError for features of different widths."""
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of width {first.shape[1]} and {second.shape[1]} cannot be compared")


def take_rows(features: Features, indices: np.ndarray) -> np.ndarray:
    """The rows of these indices, float64 (B, F) on the CPU, contiguous."""
    if isinstance(features, Tensor):
        return features[torch.from_numpy(indices).to(features.device)].detach().double().cpu().contiguous().numpy()
    return np.ascontiguousarray(features[indices], dtype=np.float64)
