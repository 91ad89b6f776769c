"""Hostile image files as found among the photographs of a scraped dataset, each with its expected outcome.

Photographs are those of scikit-image and scikit-learn, made small. PNGs are written here, byte by byte, and their pixels are
worked out with integers; JPEGs are written by Pillow and patched, their pixels are what torchvision's decoder makes of them.
Nothing of enat/ is used. The same bytes and pixels in every call. The module is long because it is a list.

Shape legend: H x W pixels, C channels.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # y, x, steps
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TRUNCATED, DAMAGED, UNSUPPORTED = "cannot be decoded: truncated", "cannot be decoded: damaged data", "an unsupported format"


@dataclass(frozen=True)
class Hostile:
    """A file. Either its pixels, RGB uint8 (H, W, 3), or a part of the reason why it has none."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.pixels is None) != (self.reason is None)
        assert self.pixels is None or (self.pixels.dtype == np.uint8 and self.pixels.shape[2:] == (3,))


@cache
def corpus() -> list[Hostile]:
    """All files, each under a name of its own, with a suffix as it might have in a folder. Not to be written to."""
    files = [*_jpegs(), *_metadata_jpegs(), *_broken_jpegs(), *_pngs(), *_transparent_pngs(), *_broken_pngs(), *_no_images()]
    assert len({file.name for file in files}) == len(files)
    return files


# Photographs


@cache
def photo(name: str, width: int = 61, height: int = 45) -> np.ndarray:
    """uint8 (H, W, 3): "astronaut", "chelsea" (a cat), "coffee" or "flower". Odd sizes: no whole number of JPEG's blocks."""
    folder, file = ("sklearn", "datasets/images/flower.jpg") if name == "flower" else ("skimage", f"data/{name}.png")
    spec = importlib.util.find_spec(folder)  # only to find the file: importing scikit-learn takes seconds
    assert spec is not None and spec.origin is not None
    with Image.open(Path(spec.origin).parent / file) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BOX))


def gray_photo(name: str, width: int = 61, height: int = 45) -> np.ndarray:
    """uint8 (H, W): the green channel."""
    return photo(name, width, height)[..., 1]


def deep(values: np.ndarray) -> np.ndarray:
    """uint8 -> uint16 whose upper bytes are the values and whose lower bytes are something else."""
    lower = np.random.default_rng(0).integers(0, 256, values.shape)
    return (values.astype(np.uint16) << 8) | lower.astype(np.uint16)


def in_rgb(gray: np.ndarray) -> np.ndarray:
    """(H, W) -> uint8 (H, W, 3)."""
    return np.repeat(gray[..., None], 3, axis=-1).astype(np.uint8)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) and alpha (H, W) in 0..255 -> uint8 (H, W, 3): colour a + white (1 - a), rounded to nearest."""
    alpha = alpha[..., None].astype(np.int64)
    return ((2 * (colours * alpha + 255 * (255 - alpha)) + 255) // 510).astype(np.uint8)


# PNG, written from its specification


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width: int, height: int, depth: int, colour_type: int, is_interlaced: bool = False) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, is_interlaced))


def png(
    samples: np.ndarray,
    depth: int,
    colour_type: int,
    *,
    before: bytes = b"",
    after: bytes = b"",
    is_interlaced: bool = False,
    chunk_size: int = 1000,
) -> bytes:
    """Samples (H, W, C) or (H, W) in 0..2**depth - 1 -> a file, with more chunks before and after the pixels."""
    height, width = samples.shape[:2]
    passes = [samples[y::down, x::across] for y, x, down, across in ADAM7] if is_interlaced else [samples]
    stream = zlib.compress(b"".join(filtered(part, depth, CHANNELS[colour_type]) for part in passes))
    pixels = b"".join(chunk(b"IDAT", stream[start : start + chunk_size]) for start in range(0, len(stream), chunk_size))
    start = SIGNATURE + header(width, height, depth, colour_type, is_interlaced)
    return start + before + pixels + after + chunk(b"IEND", b"")


def filtered(samples: np.ndarray, depth: int, channels: int) -> bytes:
    """Rows as PNG stores them; the five filters take turns."""
    height, width = samples.shape[:2]
    if height * width == 0:
        return b""
    flat = samples.reshape(height, width * channels)
    if depth == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    else:  # the bits of each sample, the highest first; the last byte is filled up
        bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    distance = max(1, depth * channels // 8)
    out, above = [], np.zeros(rows.shape[1], dtype=int)
    for y, row in enumerate(rows.astype(int)):
        left = np.concatenate([np.zeros(distance, dtype=int), row])[: len(row)]
        above_left = np.concatenate([np.zeros(distance, dtype=int), above])[: len(row)]
        guess = left + above - above_left
        candidates = np.stack([left, above, above_left])
        paeth = np.take_along_axis(candidates, np.abs(guess - candidates).argmin(axis=0)[None], axis=0)[0]
        predicted = [0, left, above, (left + above) // 2, paeth][y % 5]
        out.append(bytes([y % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes())
        above = row
    return b"".join(out)


def palette_of(image: np.ndarray, num_colours: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) -> indices (H, W), colours uint8 (num_colours, 3): the nearest of a few of the image's own colours."""
    colours = image.reshape(-1, 3)[np.linspace(0, len(image.reshape(-1, 3)) - 1, num_colours).astype(int)]
    distances = np.square(image[:, :, None].astype(int) - colours.astype(int)).sum(axis=-1)
    return distances.argmin(axis=-1), colours


# JPEG, written by Pillow


def jpeg(pixels: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """After the start of image, before all other segments."""
    return data[:2] + b"".join(segments) + data[2:]


def by_torchvision(data: bytes) -> np.ndarray:
    """JPEG -> uint8 (H, W, 3), by torchvision's own copy of libjpeg and its own way from CMYK to RGB."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()


def _decodable(files: Iterable[tuple[str, bytes]]) -> Iterator[Hostile]:
    for name, data in files:
        yield Hostile(name, data, by_torchvision(data))


def _jpegs() -> Iterator[Hostile]:
    """Kinds of JPEG, all of which are in use."""
    cat, cup = photo("chelsea"), photo("coffee")
    gray = jpeg(gray_photo("flower"))
    frame = gray.index(b"\xff\xc0")
    assert gray[frame + 11] == 0x11
    cmyk = np.concatenate([255 - cat, gray_photo("flower")[..., None] // 3], axis=-1)
    adobe = jpeg(cmyk, "CMYK")
    at = adobe.index(b"\xff\xee")
    # YCCK: luma and chroma of the first three inks; what is handed to Pillow is turned round by it, and black is kept so.
    luma = np.asarray(Image.fromarray(cmyk[..., :3]).convert("YCbCr"))
    ycck = jpeg(np.concatenate([255 - luma, cmyk[..., 3:]], axis=-1), "CMYK", subsampling=0)
    assert ycck[at + 4 : at + 9] == b"Adobe" and ycck[at + 15] == 0
    buffer = io.BytesIO()
    images = [Image.fromarray(pixels) for pixels in (cat, cup)]
    images[0].save(buffer, "MPO", save_all=True, append_images=images[1:], quality=90)
    yield from _decodable(
        [
            ("jpeg_baseline.jpg", jpeg(cat)),
            ("jpeg_progressive.jpg", jpeg(cup, progressive=True)),
            ("jpeg_444.jpg", jpeg(photo("flower"), subsampling=0)),
            ("jpeg_422.jpg", jpeg(photo("astronaut"), subsampling=1)),
            ("jpeg_420.jpg", jpeg(cup, subsampling=2)),
            ("jpeg_quality_100.jpg", jpeg(cat, quality=100)),
            ("jpeg_quality_1.jpg", jpeg(cat, quality=1)),
            ("jpeg_optimized_with_restarts.jpg", jpeg(cat, optimize=True, restart_marker_blocks=3)),
            ("jpeg_gray.jpg", gray),
            ("jpeg_gray_progressive.jpg", jpeg(gray_photo("chelsea"), progressive=True)),
            ("jpeg_gray_that_says_420.jpg", gray[: frame + 11] + b"\x22" + gray[frame + 12 :]),
            ("jpeg_rgb_without_luma.jpg", jpeg(cat, keep_rgb=True)),
            ("jpeg_cmyk_adobe.jpg", adobe),
            ("jpeg_cmyk_without_adobe.jpg", adobe[:at] + adobe[at + 16 :]),  # taken as inverted, too, as all viewers do
            ("jpeg_ycck.jpg", ycck[: at + 15] + b"\x02" + ycck[at + 16 :]),
            ("jpeg_1x1.jpg", jpeg(photo("coffee", 1, 1))),
            ("jpeg_2x4000.jpg", jpeg(photo("astronaut", 2, 4000))),
            ("jpeg_4000x2.jpg", jpeg(photo("astronaut", 4000, 2))),
            ("jpeg_ending_in_mid_gray.jpg", jpeg(np.full((40, 40, 3), 128, dtype=np.uint8))),
            ("jpeg_ending_in_mid_gray_progressive.jpg", jpeg(np.full((40, 40, 3), 128, dtype=np.uint8), progressive=True)),
            ("jpeg_named_png.png", jpeg(cup)),
            ("mpo.jpg", buffer.getvalue()),
        ]
    )


def _metadata_jpegs() -> Iterator[Hostile]:
    """Intact pixels and strange company; the pixels stay as they are stored."""
    pixels = photo("astronaut")
    data = jpeg(pixels)
    noise = np.random.default_rng(1).integers(0, 256, 65_500, dtype=np.uint8).tobytes()
    exif_of = {orientation: Image.Exif() for orientation in range(2, 9)}
    for orientation, exif in exif_of.items():
        exif[0x0112] = orientation
    tables = data.index(b"\xff\xdb")
    files = [(f"jpeg_orientation_{turn}.jpg", jpeg(pixels, exif=exif)) for turn, exif in exif_of.items()]
    files += [
        ("jpeg_garbage_exif.jpg", with_segments(data, segment(0xE1, b"Exif\0\0" + noise))),
        ("jpeg_exif_that_loops.jpg", with_segments(data, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"))),
        ("jpeg_huge_exif.jpg", with_segments(data, *[segment(0xE1, b"Exif\0\0" + noise)] * 40)),
        ("jpeg_garbage_icc.jpg", with_segments(data, segment(0xE2, b"ICC_PROFILE\0\x01\x09" + noise))),
        ("jpeg_short_icc.jpg", with_segments(data, segment(0xE2, b"ICC_PROFILE\0"))),
        ("jpeg_short_jfif.jpg", with_segments(data, segment(0xE0, b"JFIF\0"))),
        ("jpeg_short_adobe.jpg", with_segments(data, segment(0xEE, b"Adobe"))),
        ("jpeg_short_photoshop.jpg", with_segments(data, segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"))),
        ("jpeg_garbage_mpf.jpg", with_segments(data, segment(0xE2, b"MPF\0" + noise[:300]))),
        ("jpeg_mpf_without_pictures.jpg", with_segments(data, segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\0"))),
        ("jpeg_huge_comment.jpg", with_segments(data, *[segment(0xFE, noise)] * 40)),
        ("jpeg_junk_between_segments.jpg", data[:tables] + bytes(100) + b"junk\xff\0\xff\xff\xff" + data[tables:]),
        ("jpeg_trailing_garbage.jpg", data + noise),
        ("jpeg_trailing_html.jpg", data + b"<html><body>\xff\xd8 502 \xff\xd9</body></html>"),
    ]
    yield from _decodable(files)


def _broken_jpegs() -> Iterator[Hostile]:
    data = jpeg(photo("chelsea"))
    huffman, frame, scan = (data.index(marker) for marker in (b"\xff\xc4", b"\xff\xc0", b"\xff\xda"))
    middle = (scan + len(data)) // 2
    progressive = jpeg(photo("chelsea"), progressive=True)
    yield Hostile("jpeg_3_bytes.jpg", data[:3], reason=TRUNCATED)
    yield Hostile("jpeg_cut_in_tables.jpg", data[: huffman + 20], reason=TRUNCATED)
    yield Hostile("jpeg_header_only.jpg", data[:scan], reason=TRUNCATED)
    yield Hostile("jpeg_without_scan_data.jpg", data[: scan + 14], reason=TRUNCATED)
    yield Hostile("jpeg_half.jpg", data[:middle], reason=TRUNCATED)
    yield Hostile("jpeg_half_progressive.jpg", progressive[: len(progressive) // 2], reason=TRUNCATED)
    yield Hostile("jpeg_last_byte_missing.jpg", data[:-1], reason=TRUNCATED)
    yield Hostile("jpeg_half_then_zeros.jpg", data[:middle] + bytes(len(data) - middle), reason=TRUNCATED)
    yield Hostile("jpeg_half_then_closed.jpg", data[:middle] + b"\xff\xd9", reason=TRUNCATED)
    gray = jpeg(gray_photo("coffee"))
    yield Hostile("jpeg_gray_half_then_closed.jpg", gray[: len(gray) * 3 // 4] + b"\xff\xd9", reason=TRUNCATED)
    huge = data[: frame + 5] + struct.pack(">HH", 65500, 65500) + data[frame + 9 :]
    yield Hostile("jpeg_65500x65500.jpg", huge, reason="65500 x 65500 pixels is over the limit of 89478485")
    empty = data[: frame + 5] + struct.pack(">HH", 0, 61) + data[frame + 9 :]
    yield Hostile("jpeg_without_height.jpg", empty, reason=DAMAGED)
    yield Hostile("jpeg_12_bit.jpg", data[: frame + 4] + b"\x0c" + data[frame + 5 :], reason="unsupported (cannot handle 12-bit")
    no_length = data[: huffman + 2] + bytes(2) + data[huffman + 4 :]
    yield Hostile("jpeg_segment_without_length.jpg", no_length, reason="cannot be decoded")
    without_tables = data[:huffman] + data[scan:]
    yield Hostile("jpeg_without_tables.jpg", without_tables, by_torchvision(without_tables))  # the standard's own are taken
    without_quantization = data[: data.index(b"\xff\xdb")] + data[frame:]
    yield Hostile("jpeg_without_quantization.jpg", without_quantization, reason=DAMAGED)
    # Flipped bits mostly go unnoticed in a JPEG; then at least each decoder shows the same.
    for place in (scan + 200, middle, len(data) - 100):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        yield Hostile(f"jpeg_flipped_bit_at_{place}.jpg", bytes(flipped), by_torchvision(bytes(flipped)))


def _pngs() -> Iterator[Hostile]:
    """Every colour type and depth of PNG, plain and interlaced."""
    cat, gray = photo("chelsea"), gray_photo("flower")
    for is_interlaced in (False, True):
        suffix = "_interlaced" if is_interlaced else ""
        for depth in (1, 2, 4, 8, 16):
            samples = deep(gray) if depth == 16 else gray >> (8 - depth)
            shown = in_rgb(gray if depth == 16 else samples * (255 // (2**depth - 1)))
            yield Hostile(f"png_gray_{depth}{suffix}.png", png(samples, depth, GRAY, is_interlaced=is_interlaced), shown)
        for depth in (8, 16):
            samples = deep(cat) if depth == 16 else cat
            yield Hostile(f"png_rgb_{depth}{suffix}.png", png(samples, depth, RGB, is_interlaced=is_interlaced), cat)
        for depth in (1, 2, 4, 8):
            indices, colours = palette_of(cat, min(2**depth, 100))
            data = png(indices, depth, PALETTE, before=chunk(b"PLTE", colours.tobytes()), is_interlaced=is_interlaced)
            yield Hostile(f"png_palette_{depth}{suffix}.png", data, colours[indices])
    yield Hostile("png_named_jpg.jpg", png(cat, 8, RGB), cat)
    yield Hostile("png_1x1.png", png(cat[:1, :1], 8, RGB), cat[:1, :1])
    yield Hostile("png_1x1_interlaced.png", png(gray[:1, :1], 8, GRAY, is_interlaced=True), in_rgb(gray[:1, :1]))
    tall, wide = photo("astronaut", 2, 4000), photo("astronaut", 4000, 2)
    yield Hostile("png_2x4000.png", png(tall, 8, RGB), tall)
    yield Hostile("png_4000x2.png", png(wide, 8, RGB), wide)
    yield Hostile("png_many_small_chunks.png", png(cat, 8, RGB, chunk_size=1), cat)
    metadata = {
        "gamma": chunk(b"gAMA", struct.pack(">I", 100_000)),
        "srgb": chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 45_455)),
        "short_gamma": chunk(b"gAMA", b"\0"),
        "background": chunk(b"bKGD", struct.pack(">HHH", 255, 0, 0)),
        "garbage_icc": chunk(b"iCCP", b"x\0\x07" + b"garbage"),
        "orientation": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "garbage_exif": chunk(b"eXIf", b"garbage"),
        "zipped_text_bomb": chunk(b"zTXt", b"Comment\0\0" + _bomb()),
        "international_text_bomb": chunk(b"iTXt", b"Comment\0\x01\0\0\0" + _bomb()),
        "profile_bomb": chunk(b"iCCP", b"x\0\0" + _bomb()),
        "wrong_checksum_of_text": chunk(b"tEXt", b"Comment\0right")[:-1] + b"?",
        "single_frame_animation": chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(b"fcTL", bytes(26)),
    }
    for name, chunks in metadata.items():
        yield Hostile(f"png_{name}.png", png(cat, 8, RGB, before=chunks), cat)
    yield Hostile("png_text_bomb_behind_pixels.png", png(cat, 8, RGB, after=metadata["zipped_text_bomb"]), cat)
    whole = png(cat, 8, RGB)
    yield Hostile("png_trailing_garbage.png", whole + bytes(range(256)) * 20, cat)
    yield Hostile("png_without_end.png", whole[:-12], cat)
    yield Hostile("png_cut_in_end.png", whole[:-5], cat)
    bloated = zlib.compress(filtered(cat, 8, 3) + bytes(100_000_000))
    yield Hostile("png_more_rows_than_declared.png", _png_of_parts(cat, chunk(b"IDAT", bloated)), cat)


@cache
def _bomb() -> bytes:
    """100 MB of spaces, in about 100 KB."""
    return zlib.compress(b" " * 100_000_000)


def _png_of_parts(pixels: np.ndarray, chunks: bytes) -> bytes:
    height, width = pixels.shape[:2]
    return SIGNATURE + header(width, height, 8, RGB) + chunks + chunk(b"IEND", b"")


def _transparent_pngs() -> Iterator[Hostile]:
    """Transparency is laid on white: as a channel, as one transparent colour, as the alphas of a palette."""
    cat, gray, alpha = photo("chelsea"), gray_photo("flower"), gray_photo("coffee")
    gray_alpha = np.stack([gray, alpha], axis=-1)
    rgba = np.concatenate([cat, alpha[..., None]], axis=-1)
    for depth, make in ((8, np.asarray), (16, deep)):
        yield Hostile(f"png_gray_alpha_{depth}.png", png(make(gray_alpha), depth, GRAY_ALPHA), on_white(in_rgb(gray), alpha))
        yield Hostile(f"png_rgba_{depth}.png", png(make(rgba), depth, RGBA), on_white(cat, alpha))
    for depth in (1, 2, 4, 8, 16):
        samples = deep(gray) if depth == 16 else gray >> (8 - depth)
        samples[5:9, 5:9] = key = samples[20, 30]
        shown = in_rgb(samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1)))
        shown[samples == key] = 255
        yield Hostile(f"png_gray_{depth}_key.png", png(samples, depth, GRAY, before=chunk(b"tRNS", struct.pack(">H", key))), shown)
    for depth in (8, 16):
        samples = deep(cat) if depth == 16 else cat.copy()
        samples[5:9, 5:9] = key = samples[20, 30]
        samples[30, 30] = key ^ 1  # all but the same colour
        is_key = (samples == key).all(axis=-1)
        shown = np.where(is_key[..., None], 255, samples >> (depth - 8)).astype(np.uint8)
        before = chunk(b"tRNS", struct.pack(">HHH", *key.tolist()))
        yield Hostile(f"png_rgb_{depth}_key.png", png(samples, depth, RGB, before=before), shown)
        if depth == 16:
            data = png(samples, depth, RGB, before=before, is_interlaced=True)
            yield Hostile("png_rgb_16_key_interlaced.png", data, shown)
    for depth in (1, 4, 8):
        indices, colours = palette_of(cat, min(2**depth, 100))
        alphas = {
            "one_transparent": np.where(np.arange(len(colours)) == len(colours) // 2, 0, 255),
            "alphas": np.linspace(0, 255, len(colours)).astype(int),
            "some_alphas": np.concatenate([[7], np.full(len(colours) - 1, 255)]),
        }
        for name, values in alphas.items():
            stored = values[:1] if name == "some_alphas" else values
            before = chunk(b"PLTE", colours.tobytes()) + chunk(b"tRNS", stored.astype(np.uint8).tobytes())
            yield Hostile(
                f"png_palette_{depth}_{name}.png",
                png(indices, depth, PALETTE, before=before),
                on_white(colours[indices], values[indices]),
            )


def _broken_pngs() -> Iterator[Hostile]:
    cat = photo("chelsea")
    data = png(cat, 8, RGB, chunk_size=4000)
    pixels = data.index(b"IDAT")
    stream = zlib.compress(filtered(cat, 8, 3))
    yield Hostile("png_signature_only.png", data[:8], reason=TRUNCATED)
    yield Hostile("png_header_only.png", data[: pixels - 4], reason=TRUNCATED)
    yield Hostile("png_cut_in_pixels.png", data[: pixels + 2000], reason=TRUNCATED)
    yield Hostile("png_cut_between_chunks.png", data[: pixels + 4008], reason=TRUNCATED)
    yield Hostile("png_half_a_stream.png", _png_of_parts(cat, chunk(b"IDAT", stream[: len(stream) // 2])), reason=TRUNCATED)
    yield Hostile("png_without_pixels.png", _png_of_parts(cat, b""), reason=TRUNCATED)
    yield Hostile("png_half_then_zeros.png", data[: pixels + 2000].ljust(len(data), b"\0"), reason=DAMAGED)
    flipped = bytearray(data)
    flipped[pixels + 1000] ^= 0x10
    yield Hostile("png_flipped_bit.png", bytes(flipped), reason="damaged data (wrong checksum of IDAT)")
    flipped = bytearray(data)
    flipped[data.index(b"IHDR") + 7] ^= 0x01
    yield Hostile("png_flipped_width.png", bytes(flipped), reason="damaged data (wrong checksum of IHDR)")
    garbage = np.random.default_rng(2).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    yield Hostile("png_garbage_stream.png", _png_of_parts(cat, chunk(b"IDAT", garbage)), reason=DAMAGED)
    unknown_filter = zlib.compress(b"\x09" + filtered(cat, 8, 3)[1:])
    yield Hostile("png_unknown_filter.png", _png_of_parts(cat, chunk(b"IDAT", unknown_filter)), reason=DAMAGED)
    end = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    yield Hostile("png_without_width.png", SIGNATURE + header(0, 45, 8, RGB) + end, reason=DAMAGED)
    yield Hostile("png_unknown_depth.png", SIGNATURE + header(61, 45, 3, RGB) + end, reason=DAMAGED)
    for size in (10_000, 65_500, 2**31 - 1):
        reason = f"{size} x {size} pixels is over the limit of 89478485"
        yield Hostile(f"png_{size}x{size}.png", SIGNATURE + header(size, size, 8, RGB) + end, reason=reason)
    indices, colours = palette_of(cat, 16)
    colours[10:] = 0  # black, as the specification suggests for what a palette lacks
    short = chunk(b"PLTE", colours[:10].tobytes())
    yield Hostile("png_short_palette.png", png(indices, 4, PALETTE, before=short), colours[indices])
    yield Hostile("png_without_palette.png", png(indices, 4, PALETTE), reason=DAMAGED)
    yield Hostile("png_animated.png", _pillow("PNG", frames=3), reason="animated (3 frames)")


def _pillow(image_format: str, frames: int = 1) -> bytes:
    images = [Image.fromarray(photo(name)) for name in ("chelsea", "coffee", "flower")][:frames]
    buffer = io.BytesIO()
    images[0].save(buffer, image_format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return buffer.getvalue()


def _no_images() -> Iterator[Hostile]:
    """Other formats, and files that are not images."""
    for image_format, suffix in (("GIF", "gif"), ("WebP", "webp"), ("BMP", "bmp"), ("TIFF", "tif"), ("AVIF", "avif")):
        yield Hostile(f"{suffix}.{suffix}", _pillow(image_format), reason=f"{image_format}, {UNSUPPORTED}")
    yield Hostile("gif_named_jpg.jpg", _pillow("GIF"), reason=f"GIF, {UNSUPPORTED}")
    yield Hostile("gif_animated.gif", _pillow("GIF", frames=3), reason=f"GIF, {UNSUPPORTED}")
    yield Hostile("webp_animated.webp", _pillow("WebP", frames=3), reason=f"WebP, {UNSUPPORTED}")
    yield Hostile("jpeg_2000.jp2", _pillow("JPEG2000"), reason=f"JPEG 2000, {UNSUPPORTED}")
    svg = b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    yield Hostile("svg.jpg", svg, reason=f"SVG, {UNSUPPORTED}")
    html = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found <svg></svg></body></html>"
    yield Hostile("error_page.jpg", html, reason="not an image but HTML")
    yield Hostile("text.jpg", b"This photo is no longer available.\n", reason="neither JPEG nor PNG")
    yield Hostile("error.json.jpg", b'{"error": "rate limit"}', reason="neither JPEG nor PNG")
    yield Hostile("nothing.jpg", b"", reason="empty")
    yield Hostile("zeros.jpg", bytes(5000), reason="nothing but zeros")
    shifted = b"\r\n" + jpeg(photo("chelsea"))
    yield Hostile("jpeg_behind_a_line.jpg", shifted, reason="neither JPEG nor PNG")  # browsers, too, show nothing
