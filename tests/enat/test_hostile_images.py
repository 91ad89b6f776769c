"""Files as a scraped dataset has them: exactly the right pixels or a short, right reason; never a warning, a bomb or a wait."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from enat.images import MAX_PIXELS, ImageError, center_crop, decode_image
from material.hostile import Hostile, corpus, photo

pytestmark = pytest.mark.filterwarnings("error")
FILES = corpus()
BOMBS = [file for file in FILES if "over the limit" in (file.reason or "")]


def outcome(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | str:
    """Pixels, or the reason of the refusal; any other error fails the test."""
    try:
        image = decode_image(data, max_pixels)
    except ImageError as error:
        return str(error)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_gives_its_pixels_or_its_reason(file: Hostile) -> None:
    tracemalloc.start()
    start = time.process_time()
    seen = outcome(file.data)
    seconds, (_, peak_bytes) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if file.pixels is None:
        assert isinstance(seen, str) and file.reason is not None
        assert file.reason in seen and len(seen) < 120
    else:
        assert not isinstance(seen, str), seen
        np.testing.assert_array_equal(seen, file.pixels)
    np.testing.assert_array_equal(outcome(file.data), seen)
    assert seconds < 2
    assert peak_bytes < 4_000_000 + 3 * len(file.data), "neither texts nor profiles are unpacked"


@pytest.mark.parametrize("file", BOMBS, ids=lambda file: file.name)
def test_bomb_is_refused_before_its_pixels_are_allocated(file: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{image.size} pixels are allocated")

    for reader in (ImageFile.ImageFile, JpegImageFile, PngImageFile):
        monkeypatch.setattr(reader, "load", load)
    assert "over the limit" in outcome(file.data)


def test_all_files_together_take_little_memory() -> None:
    """What Pillow allocates itself, which tracemalloc does not see: the peak of the process over what it was."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        pytest.skip("the peak can be reset on Linux only")
    reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    for file in FILES:
        outcome(file.data)
    assert _kilobytes(status, "VmHWM") - before < 64_000


def _kilobytes(status: Path, name: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])


def test_corpus_has_enough_files_and_is_deterministic() -> None:
    assert len(FILES) >= 36 and len(BOMBS) >= 4
    assert sum(file.pixels is None for file in FILES) > 40 and sum(file.pixels is not None for file in FILES) > 40
    again = corpus.__wrapped__()
    assert [(file.name, file.data) for file in again] == [(file.name, file.data) for file in FILES], "the same in every call"


@given(
    file=st.sampled_from([file for file in FILES if len(file.data) < 20_000]),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    share=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
)
@settings(max_examples=300)
def test_file_damaged_anywhere_gives_pixels_or_a_reason(file: Hostile, damage: list[tuple[float, int]], share: float) -> None:
    damaged = bytearray(file.data[: int(len(file.data) * share)])
    for place, value in damage:
        if damaged:
            damaged[int(place * min(len(damaged), 800))] = value
    first = outcome(bytes(damaged), max_pixels=100_000)
    np.testing.assert_array_equal(outcome(bytes(damaged), max_pixels=100_000), first)


# ADM's crop, as plain arithmetic: no resize, no crop of Pillow's


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resampled(pixels: np.ndarray, size: int, kernel, reach: float, first: int, count: int) -> np.ndarray:
    """Rows first .. first + count - 1 of uint8 (H, W, 3) resampled to size rows: uint8 (count, W, 3).

    Each row is a weighted mean of the rows within reach of its centre; shrinking widens the reach. Weights are rounded to
    22 bits and the mean to the nearest integer, as Pillow rounds for 8-bit images.
    """
    old_size = len(pixels)
    if size == old_size:
        return pixels[first : first + count]
    scale = old_size / size
    widening = max(scale, 1.0)
    out = []
    for row in range(first, first + count):
        centre = (row + 0.5) * scale
        start = max(int(centre - reach * widening + 0.5), 0)
        stop = min(int(centre + reach * widening + 0.5), old_size)
        weights = kernel((np.arange(start, stop) - centre + 0.5) * (1 / widening))
        weights = weights / weights.sum()
        rounded = np.trunc(weights * 2**22 + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        mean = (np.tensordot(rounded, pixels[start:stop].astype(np.int64), axes=1) + 2**21) >> 22
        out.append(mean.clip(0, 255))
    return np.stack(out).astype(np.uint8)


def adm_crop(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (resolution, resolution, 3); columns before rows, as Pillow does it, rounding in between."""
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * resolution:
        columns = resampled(pixels.swapaxes(0, 1), width // 2, box, 0.5, 0, width // 2)
        height, width = height // 2, width // 2
        pixels = resampled(columns.swapaxes(0, 1), height, box, 0.5, 0, height)
    scale = resolution / min(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    top, left = (new_height - resolution) // 2, (new_width - resolution) // 2
    columns = resampled(pixels.swapaxes(0, 1), new_width, bicubic, 2.0, left, resolution)
    return resampled(columns.swapaxes(0, 1), new_height, bicubic, 2.0, top, resolution)


@pytest.mark.slow
@given(
    width=st.integers(1, 1100),
    height=st.integers(1, 1100),
    resolution=st.sampled_from([16, 256, 512]),
    seed=st.integers(0, 9),
)
@settings(max_examples=30)
@example(width=4000, height=2, resolution=16, seed=0)
@example(width=4000, height=33, resolution=16, seed=0)
@example(width=600, height=2, resolution=256, seed=0)
@example(width=1, height=1, resolution=512, seed=0)
@example(width=500, height=375, resolution=256, seed=0)
@example(width=640, height=427, resolution=256, seed=0)
@example(width=1023, height=1025, resolution=512, seed=0)
def test_crop_equals_adm_bit_for_bit(width: int, height: int, resolution: int, seed: int) -> None:
    height = min(height, max(1, 3 * width // 2))  # taller ones are below
    if resolution * resolution * width / height > 2e7:  # only to be quick
        resolution = 16
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cropped = center_crop(Image.fromarray(pixels), resolution)
    np.testing.assert_array_equal(np.asarray(cropped), adm_crop(pixels, resolution))


@pytest.mark.parametrize(
    ("width", "height", "resolution"),
    [(2, 4000, 16), (33, 4000, 16), (2, 600, 256), (17, 43, 16), (50, 149, 16), (295, 697, 256), (346, 696, 256), (400, 1000, 512)],
)
def test_crop_of_a_tall_photograph_equals_adm_up_to_rounding(width: int, height: int, resolution: int) -> None:
    """Pillow 13 resamples the rows of a tall image first, where earlier ones took the columns first; that rounds differently."""
    pixels = photo("chelsea", width, height)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), resolution)).astype(int)
    difference = np.abs(cropped - adm_crop(pixels, resolution))
    assert difference.max() <= 3 and difference.mean() < 0.3


def test_every_decodable_file_of_the_corpus_can_be_cropped() -> None:
    for file in FILES:
        if file.pixels is not None:
            cropped = center_crop(decode_image(file.data), 16)
            assert cropped.size == (16, 16)
            if file.pixels.shape[0] <= file.pixels.shape[1]:
                np.testing.assert_array_equal(np.asarray(cropped), adm_crop(file.pixels, 16), err_msg=file.name)
