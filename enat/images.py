"""Images in and out: decoding bytes with limits, the ADM centre crop, tensors, grids.

Shape legend: B images, H x W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485  # Pillow's own threshold, but an error here where Pillow only warns
_FORMATS = ("JPEG", "PNG")


class ImageError(ValueError):
    """These bytes cannot become pixels; the message says why, in a few words."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """JPEG or PNG bytes -> 8-bit RGB image, as stored (an EXIF orientation is not applied, as in ADM's loader).

    Transparency is laid on white, 16 bits are scaled to 8. Raises ImageError for anything that is not exactly one whole image.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not used, and of bombs, which are an error below
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels is over the limit of {max_pixels}")
            # An MPO is a JPEG with further pictures behind it (phones, stereo cameras); the first is the photograph.
            if image.format != "MPO" and (num_frames := getattr(image, "n_frames", 1)) > 1:
                raise ImageError(f"it is animated ({num_frames} frames)")
            image.load()
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError("it is neither JPEG nor PNG") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises all of these for damaged files
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"it cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale; convert("RGB") would clip it to 255
        values = np.asarray(image, dtype=np.uint32)
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's crop to (resolution, resolution): halve with BOX while at least twice too large, BICUBIC to size, centre crop.

    Raises ImageError for an image so narrow that the resized one would be over MAX_PIXELS.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ImageError(f"it is too narrow: at {resolution} pixels it would be {width} x {height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def to_array(image: Image.Image) -> np.ndarray:
    """RGB image -> uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [0, 1] -> uint8, rounded to nearest."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def make_grid(images: Tensor | Sequence[Tensor], columns: int, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """uint8 (B, 3, H, W) -> one RGB picture, row by row on white; scale enlarges each pixel."""
    stacked = images if isinstance(images, Tensor) else torch.stack(list(images))
    count, _, height, width = stacked.shape
    rows = -(-count // columns)
    height, width = height * scale, width * scale
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, pixels in enumerate(stacked.cpu().numpy()):
        tile = Image.fromarray(pixels.transpose(1, 2, 0)).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (gap + index % columns * (width + gap), gap + index // columns * (height + gap)))
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
