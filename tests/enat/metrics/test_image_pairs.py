"""PSNR and SSIM equal scikit-image's, image by image."""

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from enat.metrics.image_pairs import psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    """Photographs and noisy, darker, blocky versions, uint8 (4, 3, 48, 61)."""
    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    images = np.stack([photograph[100:148, 150:211] for photograph in photographs])
    noise = np.random.default_rng(0).normal(scale=20, size=images.shape)
    others = (images + noise).clip(0, 255)
    others[1] = images[1] * 0.6
    others[2] = images[2][::4].repeat(4, axis=0)
    return images, others.astype(np.uint8)


def tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def test_psnr_equals_scikit_image(pairs):
    ratios = psnr(*map(tensor, pairs))
    assert ratios.dtype == torch.float64
    expected = [peak_signal_noise_ratio(image, other, data_range=255) for image, other in zip(*pairs, strict=True)]
    np.testing.assert_allclose(ratios, expected, rtol=1e-12)


def test_ssim_equals_scikit_image(pairs):
    similarities = ssim(*map(tensor, pairs))
    assert similarities.dtype == torch.float64
    expected = [
        structural_similarity(
            image, other, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for image, other in zip(*pairs, strict=True)
    ]
    np.testing.assert_allclose(similarities, expected, rtol=1e-9)


def test_equal_images_have_infinite_psnr_and_ssim_1(pairs):
    images = tensor(pairs[0])
    assert (psnr(images, images) == torch.inf).all()
    assert torch.equal(ssim(images, images), torch.ones(len(images), dtype=torch.float64))


def test_psnr_equals_the_formula():
    """All values 5 apart: 10 log10(255^2 / 25)."""
    images = torch.full((2, 3, 11, 11), 100, dtype=torch.uint8)
    np.testing.assert_allclose(psnr(images, images + 5), 20 * np.log10(51), rtol=1e-14)


@pytest.mark.parametrize("score", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), r"uint8 \(B, 3, H, W\) is needed"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "is needed"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 3, 16, 16, dtype=torch.uint8), "is needed"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "cannot be compared"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(score, images, others, message):
    with pytest.raises(ValueError, match=message):
        score(images, others)


def test_images_smaller_than_the_window_have_no_ssim():
    images = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="smaller than the window of SSIM, 11 x 11"):
        ssim(images, images)
