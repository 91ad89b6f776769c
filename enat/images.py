"""Images in and out: decoding bytes with limits, the ADM centre crop, tensors, grids.

Shape legend: B images, H x W pixels.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, NoReturn

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

if TYPE_CHECKING:  # files are read by processes that need no tensors, and importing torch takes over a second
    from jaxtyping import Float, Float32, UInt8
    from torch import Tensor

MAX_PIXELS = 89_478_485  # Pillow's own threshold, above which Pillow only warns
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
_JPEG_END = b"\xff\xd9"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_OTHER_FORMATS = {  # in this order, because an HTML page may contain SVG
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "WebP": rb"RIFF.{4}WEBP",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(hei|hev|mif1)",
    "JPEG 2000": rb".{4}jP  |\xff\x4f\xff\x51",
    "HTML": rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body)\b",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*|<!.*)?<svg\b",
}


class ImageError(ValueError):
    """These bytes cannot be decoded; the message gives the reason in a few words."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """JPEG or PNG bytes -> 8-bit RGB image. Raises ImageError for anything that is not exactly one complete image.

    Pixels are returned as stored, as in ADM's loader: EXIF orientation, colour profile and gamma are not applied. CMYK is read as
    inverted, as Photoshop writes it, with or without an Adobe marker. Of 16 bits the upper 8 are used. Transparent images are
    placed on white, whereas ADM's loader drops the transparency.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels is over the limit of {max_pixels}")
        return _to_rgb(image)
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these for damaged files
        if "truncated" in str(error).lower():
            raise ImageError("it cannot be decoded: truncated") from error
        kind = "unsupported" if "cannot handle" in str(error) else "damaged data"  # "cannot handle 12-bit layers"
        raise ImageError(f"it cannot be decoded: {kind} ({error})") from error


def _open(data: bytes) -> JpegImageFile | PngImageFile:
    """The image without its pixels. The format is that of the bytes. Not Image.open, which drops the reason of a refusal."""
    if data.startswith(b"\xff\xd8\xff"):
        # Of an MPO, a JPEG followed by other pictures (phones, stereo cameras), this is the first one, the photograph.
        return JpegImageFile(io.BytesIO(_jpeg_without_metadata(data)))
    if data.startswith(_PNG_SIGNATURE):
        return PngImageFile(io.BytesIO(_png_without_metadata(data)))
    _refuse_other_formats(data)


def _refuse_other_formats(data: bytes) -> NoReturn:
    if not data.strip(b"\0"):
        raise ImageError(f"it is {'nothing but zeros' if data else 'empty'}, neither JPEG nor PNG")
    for name, pattern in _OTHER_FORMATS.items():
        if re.match(pattern, data[:1024], re.DOTALL):
            if name == "HTML":
                raise ImageError("it is not an image but HTML")
            raise ImageError(f"it is {name}, an unsupported format (neither JPEG nor PNG)")
    raise ImageError("it is neither JPEG nor PNG")


def _jpeg_without_metadata(data: bytes) -> bytes:
    """A JPEG without EXIF, profiles and comments: pixels do not depend on them, and Pillow fails on malformed ones."""
    kept, position = [data[:2]], 2
    while marker := _JPEG_MARKER.search(data, position):  # libjpeg, too, skips what is between segments
        code, start = data[marker.end() - 1], marker.end()
        if code == 0xDA:  # the first scan, and all behind it
            if data.find(_JPEG_END, start) < 0:  # Pillow would take what follows a cut for pixels: zeros of a download, say
                break
            return b"".join(kept) + data[start - 2 :]
        length = int.from_bytes(data[start : start + 2], "big")
        position = start + length
        # JFIF's APP0 and Adobe's APP14 tell the colour space, if they are long enough for libjpeg to heed them.
        if not (0xE0 <= code <= 0xEF or code == 0xFE) or (code in (0xE0, 0xEE) and length >= 14):
            kept.append(data[start - 2 : position])
    raise ImageError("it cannot be decoded: truncated")


def _png_without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that pixels do not depend on, which may be damaged or bombs. Verifies checksums of the others.

    Pillow does not verify the checksums of pixels, and refuses an image because of its texts.
    """
    kept, position, previous = [_PNG_SIGNATURE], len(_PNG_SIGNATURE), b""
    while True:
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if previous == b"IDAT" != kind:  # all chunks after the pixels are metadata; Pillow detects incomplete pixels
            return b"".join([*kept, _PNG_END])
        end = position + 12 + length
        if end > len(data):
            raise ImageError("it cannot be decoded: truncated")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"IDAT"):
            if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ImageError(f"it cannot be decoded: damaged data (wrong checksum of {kind.decode()})")
            if kind != b"acTL":
                kept.append(data[position:end])
            elif (num_frames := int.from_bytes(data[position + 8 : position + 12], "big")) > 1:
                raise ImageError(f"it is animated ({num_frames} frames)")
        position, previous = end, kind


def _to_rgb(image: JpegImageFile | PngImageFile) -> Image.Image:
    if not image.tile or (image.mode == "P" and image.palette is None):
        raise SyntaxError("no palette" if image.tile else "no pixels")
    rawmode, stream = image.tile[0].args, image.fp  # Pillow's name of the stored format; gone after loading
    assert stream is not None
    image.load()
    if isinstance(image, JpegImageFile) and _ends_early(image, stream):
        raise ImageError("it cannot be decoded: truncated")
    key = image.info.get("transparency")  # the transparent colour; for a palette, its index or the alphas
    if image.mode == "I;16":  # convert("RGB") would clip it to 255
        pixels = np.asarray(image)
        rgb = Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
        return rgb if key is None else _whiten(rgb, pixels == key)
    if rawmode == "RGB;16B" and key is not None:
        stream.seek(0)
        lower = PngImageFile(stream)
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # the only way to the lower bytes in Pillow
        pixels = np.asarray(image, dtype=np.uint16) * 256 + np.asarray(lower)
        return _whiten(image, (pixels == key).all(axis=-1))
    if rawmode in ("L;2", "L;4") and key is not None:  # Pillow scales the pixels to 0..255, but not the transparent one
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    if image.mode in ("RGBA", "LA") or key is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _ends_early(image: JpegImageFile, stream: IO[bytes]) -> bool:
    """Whether the file ends before its last block; libjpeg leaves the rest mid-gray, and Pillow does not report it.

    If a photograph ends in exactly this gray, appended bytes decide: a complete image does not use them.
    """
    if image.getpixel((image.width - 1, image.height - 1)) not in (128, (128, 128, 128)):
        return False
    stream.seek(0)
    scans, end, rest = stream.read().rpartition(_JPEG_END)
    longer = JpegImageFile(io.BytesIO(scans + bytes(64) + end + rest))
    return longer.tobytes() != image.tobytes()


def _whiten(image: Image.Image, is_transparent: np.ndarray) -> Image.Image:
    """The RGB image with white pixels in `is_transparent`, bool (H, W)."""
    pixels = np.array(image)
    pixels[is_transparent] = 255
    return Image.fromarray(pixels)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's crop to (resolution, resolution): halve with BOX while at least twice too large, BICUBIC to size, centre crop.

    Raises ImageError for an image so narrow that the resized one would exceed MAX_PIXELS.
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


def to_float(images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B 3 H W"]:
    """Levels 0..255 -> [0, 1]."""
    return images.float() / 255


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
    """[0, 1] -> levels 0..255, rounded to nearest."""
    return (images.clamp(0, 1) * 255 + 0.5).byte()


def to_levels(images: Float[Tensor, "B 3 H W"]) -> Float32[Tensor, "B 3 H W"]:
    """[0, 1] -> levels 0..255, not rounded."""
    return images.float().clamp(0, 1) * 255


def make_grid(images: Tensor | Sequence[Tensor], columns: int, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """uint8 (B, 3, H, W) -> one RGB picture, row by row on white; scale enlarges each pixel."""
    rows = -(-len(images) // columns)
    height, width = images[0].shape[-2] * scale, images[0].shape[-1] * scale
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, pixels in enumerate(images):
        tile = Image.fromarray(pixels.cpu().numpy().transpose(1, 2, 0)).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (gap + index % columns * (width + gap), gap + index // columns * (height + gap)))
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
