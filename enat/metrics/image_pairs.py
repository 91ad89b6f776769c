"""Scores of pairs of images: how close a reconstruction is to its original.

Shape legend: B images, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 255.0  # range of uint8
WINDOW_SIGMA, WINDOW_RADIUS = 1.5, 5  # pixels; a window of 11 x 11, as in Wang et al.
STABILITY = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2  # C1 and C2 of Wang et al.


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(255^2 / mean squared error) of each pair, in decibels; infinite for equal images.

    images, others: uint8 (B, 3, H, W) -> float64 (B,). Raises ValueError for other dtypes and for different shapes.
    """
    _check_pairs(images, others)
    return torch.stack([_psnr(image.double(), other.double()) for image, other in zip(images, others, strict=True)])


def _psnr(image: Tensor, other: Tensor) -> Tensor:
    return 10 * torch.log10(PEAK**2 / (image - other).square().mean())


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, in [-1, 1], 1 for equal images (Wang et al. 2004, eq. 13).

    Only complete Gaussian windows count; values are averaged over windows and colours.
    images, others: uint8 (B, 3, H, W), at least 11 x 11 -> float64 (B,). Raises ValueError for any other images.
    """
    _check_pairs(images, others)
    side = 2 * WINDOW_RADIUS + 1
    if min(images.shape[-2:]) < side:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are smaller than the window of SSIM, {side} x {side}")
    return torch.stack([_ssim(image.double(), other.double()) for image, other in zip(images, others, strict=True)])


def _ssim(image: Tensor, other: Tensor) -> Tensor:
    """float64 (3, H, W) twice -> scalar. One image at a time, because the blurred products of a large batch need much memory."""
    products = torch.stack([image, other, image * image, other * other, image * other])
    mean, other_mean, square, other_square, product = _blur(products)
    variances = square - mean**2 + other_square - other_mean**2
    covariance = product - mean * other_mean
    c1, c2 = STABILITY
    similarity = (2 * mean * other_mean + c1) * (2 * covariance + c2) / ((mean**2 + other_mean**2 + c1) * (variances + c2))
    return similarity.mean()


def _blur(planes: Tensor) -> Tensor:
    """float64 (P, 3, H, W) -> (P, 3, H - 10, W - 10), each a weighted mean of the window around it."""
    offsets = torch.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1, dtype=planes.dtype, device=planes.device)
    weights = torch.exp(-0.5 * (offsets / WINDOW_SIGMA) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    return F.conv2d(F.conv2d(planes, weights, groups=3), weights.transpose(2, 3), groups=3)


def _check_pairs(images: Tensor, others: Tensor) -> None:
    for batch in (images, others):
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
            raise ValueError(f"images are {batch.dtype} {tuple(batch.shape)}; uint8 (B, 3, H, W) is needed")
    if images.shape != others.shape:
        raise ValueError(f"images of shape {tuple(images.shape)} and {tuple(others.shape)} cannot be compared")
