"""Scores of images from their features: moments in float64 and the Frechet distance between two of them.

Shape legend: B samples, F features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file


class FeatureMoments:
    """Count, mean and scatter of features, added to in any number of pieces.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979): a plain sum of squares would lose digits to a large mean.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))  # sum of (x - mean)(x - mean)^T

    def add(self, features: torch.Tensor | np.ndarray) -> FeatureMoments:
        """features: float (B, F), any device and precision. Raises ValueError for another width or values that are not finite."""
        values = features.detach().cpu().double().numpy() if isinstance(features, torch.Tensor) else features
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(self._mean):
            raise ValueError(f"features have shape {values.shape}; (B, {len(self._mean)}) is needed")
        if not np.isfinite(values).all():
            raise ValueError("features hold values that are not finite; the extractor or its input is broken")
        if len(values):
            piece = FeatureMoments(len(self._mean))
            piece.count, piece._mean = len(values), values.mean(axis=0)
            centred = values - piece._mean
            piece._scatter = centred.T @ centred
            self.merge(piece)
        return self

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Add what another one saw. Merge in a fixed order where the last bits matter. Raises ValueError for another width."""
        if len(other._mean) != len(self._mean):
            raise ValueError(f"moments of {len(other._mean)} features cannot be merged into those of {len(self._mean)}")
        count = self.count + other.count
        if other.count:
            shift = other._mean - self._mean
            self._scatter = self._scatter + other._scatter + np.outer(shift, shift) * (self.count * other.count / count)
            self._mean = self._mean + shift * (other.count / count)
            self.count = count
        return self

    @property
    def mean(self) -> np.ndarray:
        """float64 (F,)"""
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """float64 (F, F), unbiased (divided by count - 1). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; there are {self.count}")
        return self._scatter / (self.count - 1)

    def save(self, path: Path) -> None:
        """To safetensors."""
        save_file({"count": np.array([self.count]), "mean": self._mean, "scatter": self._scatter}, path)

    @classmethod
    def load(cls, path: Path) -> FeatureMoments:
        with safe_open(str(path), framework="np") as file:
            moments = cls(len(file.get_tensor("mean")))
            moments.count = int(file.get_tensor("count")[0])
            moments._mean, moments._scatter = file.get_tensor("mean"), file.get_tensor("scatter")
        return moments


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0 (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real and exact also where a covariance is
    singular, as it is with fewer samples than features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of width {len(first.mean)} and {len(second.mean)} cannot be compared")
    shift = first.mean - second.mean
    roots = _square_root(first.covariance) @ _square_root(second.covariance)
    trace_of_root = np.linalg.svd(roots, compute_uv=False).sum()
    distance = shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return max(0.0, float(distance))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
