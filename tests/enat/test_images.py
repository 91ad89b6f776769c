"""Images in and out: the limit of pixels, the centre, tensors, grids. Which bytes are decoded to what: test_hostile_images.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from enat.images import ImageError, center_crop, decode_image, make_grid, png_bytes, to_array, to_float, to_uint8


def noise(width=20, height=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(1, 60), height=st.integers(1, 60))
def test_encoding_as_png_keeps_pixels_up_to_the_limit_of_pixels(width, height):
    data = png_bytes(noise(width, height))
    assert np.array_equal(np.asarray(decode_image(data, max_pixels=width * height)), np.asarray(noise(width, height)))
    with pytest.raises(ImageError, match=f"{width} x {height} pixels is over the limit of {width * height - 1}"):
        decode_image(data, max_pixels=width * height - 1)


def test_crop_takes_the_centre():
    """Left and right thirds are black, the centre is white: only white is left. A fitting image is not touched."""
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 255
    assert (np.asarray(center_crop(Image.fromarray(pixels), 16)) == 255).all()
    assert np.array_equal(np.asarray(center_crop(noise(16, 16), 16)), np.asarray(noise(16, 16)))
    with pytest.raises(ImageError, match="too narrow: at 256 pixels it would be 256 x 25600000"):
        center_crop(Image.new("RGB", (1, 100_000)), 256)


def test_pixels_round_trip_through_tensors():
    pixels = to_array(noise(20, 24))
    assert pixels.shape == (3, 24, 20)
    assert np.array_equal(pixels[1], np.asarray(noise(20, 24))[..., 1])
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert (to_float(every).min(), to_float(every).max()) == (0, 1)
    assert torch.equal(to_uint8(to_float(every)), every)
    rounded = to_uint8(torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.7]))
    assert rounded.tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("as_list", [False, True])
def test_grid_places_images_row_by_row_on_white(as_list):
    images = torch.randint(0, 255, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(make_grid(list(images) if as_list else images, columns=3, scale=2, gap=1))
    expected = np.full((2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images.numpy()):
        top, left = 1 + index // 3 * 9, 1 + index % 3 * 13
        expected[top : top + 8, left : left + 12] = image.transpose(1, 2, 0).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(grid, expected)
