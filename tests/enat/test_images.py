"""Images in and out: any bytes give 8-bit RGB pixels or an ImageError."""

import io
import struct
import warnings
import zlib

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from enat.images import ImageError, center_crop, decode_image, make_grid, png_bytes, to_array, to_float, to_uint8


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(width=20, height=24, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(width=40, height=32):
    """RGB ramps, which JPEG keeps nearly as they are."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def png_with_header(width, height):
    """A PNG that claims a size and holds one byte of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20, 24), (1, 1), (3, 50)])
def test_png_keeps_pixels_and_pngs_round_trip(width, height):
    image = noise(width, height)
    decoded = decode_image(png_bytes(image))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_is_decoded(options):
    decoded = np.asarray(decode_image(encoded(smooth(), "JPEG", quality=95, **options))).astype(int)
    assert np.abs(decoded - np.asarray(smooth())).max() < 16


def test_cmyk_jpeg_becomes_rgb():
    cmyk = smooth().convert("CMYK")
    decoded = decode_image(encoded(cmyk, "JPEG", quality=95))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(smooth())).mean() < 6


def test_16_bit_grayscale_is_scaled_and_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG"))).astype(float)
    assert decoded[0, 0, 0] == 0
    assert decoded[-1, -1, 0] == 255
    assert np.abs(decoded - values[..., None] / 257).max() < 1


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_other_modes_become_what_pillow_shows(mode):
    image = noise().convert(mode)
    decoded = decode_image(encoded(image, "PNG"))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    image = noise(channels=4).convert(mode)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(decode_image(encoded(image, "PNG"))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(mode):
    image = noise().convert(mode)
    transparent = image.getpixel((2, 3))
    decoded = np.asarray(decode_image(encoded(image, "PNG", transparency=transparent)))
    pixels = np.asarray(image).reshape(24, 20, -1)
    is_transparent = (pixels == transparent).all(axis=-1)
    assert (decoded[is_transparent] == 255).all()
    assert np.array_equal(decoded[~is_transparent], np.asarray(image.convert("RGB"))[~is_transparent])


def test_an_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_image(encoded(smooth(), "JPEG", exif=exif)).size == smooth().size


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_half_a_file_is_refused(image_format, share):
    data = encoded(noise(64, 64), image_format)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"just text, named photo.jpg", "neither JPEG nor PNG"),
        (encoded(noise(), "GIF"), "neither JPEG nor PNG"),
        (encoded(noise(), "BMP"), "neither JPEG nor PNG"),
        (encoded(noise(), "WEBP"), "neither JPEG nor PNG"),
        (encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]), "neither JPEG nor PNG"),
        (encoded(noise(), "PNG", save_all=True, append_images=[noise(seed=1)]), r"animated \(2 frames\)"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded|neither"),
        (b"\xff\xd8\xff", "cannot be decoded|neither"),
    ],
    ids=["nothing", "text", "GIF", "BMP", "WEBP", "animated GIF", "animated PNG", "PNG signature", "JPEG signature"],
)
def test_what_is_not_one_jpeg_or_png_is_refused(data, message):
    with pytest.raises(ImageError, match=message):
        decode_image(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_the_bytes_count_and_not_a_name(image_format):
    """File names do not count: a PNG named .jpg is a PNG."""
    assert decode_image(encoded(smooth(), image_format)).size == (40, 32)


def test_large_images_are_refused_before_their_pixels_are_decoded():
    data = png_bytes(noise(20, 24))
    assert decode_image(data, max_pixels=480).size == (20, 24)
    with pytest.raises(ImageError, match="20 x 24 pixels is over the limit of 479"):
        decode_image(data, max_pixels=479)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="10000 x 10000 pixels is over the limit"):  # where Pillow would warn
            decode_image(png_with_header(10_000, 10_000))
        with pytest.raises(ImageError):  # where Pillow itself refuses
            decode_image(png_with_header(2**31 - 1, 2**31 - 1))


DAMAGEABLE = [encoded(noise(8, 8), "PNG"), encoded(noise(8, 8), "JPEG"), encoded(noise(8, 8).convert("P"), "PNG")]


@given(
    data=st.sampled_from(DAMAGEABLE),
    damage=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 700),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on odd metadata
def test_damaged_bytes_give_pixels_or_an_image_error(data, damage, length):
    damaged = bytearray(data[:length])
    for position, value in damage:
        if position < len(damaged):
            damaged[position] = value
    try:
        image = decode_image(bytes(damaged), max_pixels=10_000)
    except ImageError:
        return  # any other error fails the test
    assert image.mode == "RGB"
    assert image.width * image.height <= 10_000


@pytest.mark.parametrize("resolution", [16, 25])
@pytest.mark.parametrize(
    ("width", "height"),
    [(16, 16), (25, 25), (17, 40), (50, 49), (51, 99), (100, 37), (33, 31), (333, 128), (7, 9), (1, 6), (64, 65)],
)
def test_the_crop_is_that_of_adm(width, height, resolution):
    image = noise(width, height)
    cropped = center_crop(image, resolution)
    assert cropped.size == (resolution, resolution)
    assert np.array_equal(np.asarray(cropped), plain.center_crop(image, resolution))


@given(width=st.integers(1, 90), height=st.integers(1, 90), resolution=st.integers(1, 40))
def test_the_crop_of_any_size_is_that_of_adm(width, height, resolution):
    image = noise(width, height)
    assert np.array_equal(np.asarray(center_crop(image, resolution)), plain.center_crop(image, resolution))


def test_the_crop_takes_the_centre():
    """Left and right thirds black, the centre white: only white is left, and a fitting image is not touched."""
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 255
    assert (np.asarray(center_crop(Image.fromarray(pixels), 16)) == 255).all()
    assert np.array_equal(np.asarray(center_crop(noise(16, 16), 16)), np.asarray(noise(16, 16)))


def test_pixels_become_tensors_and_come_back():
    pixels = to_array(noise(20, 24))
    assert pixels.shape == (3, 24, 20)
    assert np.array_equal(pixels[1], np.asarray(noise(20, 24))[..., 1])
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert to_float(every).min() == 0
    assert to_float(every).max() == 1
    assert torch.equal(to_uint8(to_float(every)), every)
    rounded = to_uint8(torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.7]))
    assert rounded.tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_grid_places_images_row_by_row_on_white(as_list):
    images = torch.randint(0, 255, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(make_grid(list(images) if as_list else images, columns=3, scale=2, gap=1))
    assert grid.shape == (2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3)
    expected = np.full(grid.shape, 255, dtype=np.uint8)
    for index in range(5):
        for y in range(8):
            for x in range(12):
                row, column = 1 + index // 3 * 9 + y, 1 + index % 3 * 13 + x
                expected[row, column] = images[index, :, y // 2, x // 2].numpy()
    assert np.array_equal(grid, expected)


def test_a_jpeg_with_further_pictures_behind_it_is_its_first():
    first, second = (Image.new("RGB", (20, 12), color) for color in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=95)
    red, _, blue = np.asarray(decode_image(buffer.getvalue()), dtype=int).mean(axis=(0, 1))
    assert red > 240
    assert blue < 15


def test_an_image_too_narrow_to_be_resized_is_refused():
    with pytest.raises(ImageError, match="too narrow: at 256 pixels it would be 256 x 25600000"):
        center_crop(Image.new("RGB", (1, 100_000)), 256)
