"""A request to `enat sample`: labels, captions, a region of an image, outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from enat.images import ImageError, center_crop, decode_image, to_array
from enat.sampler_config import IMAGES_PER_PASS, SamplerConfig
from enat.training.masking import box_mask
from pipelines.data.dataset import MAX_FILE_BYTES
from pipelines.sampling.models import Generator

OUTPUTS = ("grid", "images", "steps", "gif", "npz")
_MAX_COPIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Region:
    """The region of an image to regenerate. pixels: uint8 (3, H, W).   is_masked: bool (L,), codes in the region."""

    pixels: Tensor
    is_masked: Tensor


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """labels or captions: used in turn; without either, each class in turn.   outputs: some of OUTPUTS.

    images_per_pass: images that are always computed together, by index, as in stage generate; incomplete passes are filled up.
    batch_size: images that are computed at once, in concurrent passes on the threads of a CPU.
    is_graphed: whether the sampler runs as one CUDA graph.
    """

    num_images: int
    sampler: SamplerConfig
    labels: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 64
    images_per_pass: int = IMAGES_PER_PASS
    is_bf16: bool = False
    is_graphed: bool = False
    outputs: tuple[str, ...] = OUTPUTS
    region: Region | None = None

    def __post_init__(self) -> None:
        if self.is_graphed and self.sampler.entropy_bound is not None:
            raise ValueError(
                "--cuda-graph records a sampler whose numbers of tokens are fixed, and entropy_bound chooses them at each step; "
                "leave one of them out"
            )

    @property
    def num_asked(self) -> int:
        return len(self.labels or self.captions)


def choose_device(name: str) -> str:
    """Check a device; "auto" takes a GPU if there is one. Raises ValueError if this machine does not have the device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device; choose cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name} does not exist; this machine has cpu and {torch.cuda.device_count()} GPUs")
    return name


def parse_labels(text: str, num_classes: int, class_names: Sequence[str] = ()) -> tuple[int, ...]:
    """Parse labels such as "207, 360-362, golden retriever x4": class numbers, inclusive ranges or names, optionally repeated.

    Raises ValueError for other text and for labels that the model does not have.
    """
    labels: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        repeated = re.fullmatch(r"(.*?)(?:(?<=\d)|\s)\s*[x×]\s*(\d{1,7})", item)
        wanted, count = (repeated[1].strip(), int(repeated[2])) if repeated else (item, 1)
        several = re.fullmatch(r"(\d{1,9})\s*-\s*(\d{1,9})", wanted)
        if several:
            first, last = int(several[1]), int(several[2])
            if first > last:
                raise ValueError(f"--labels has {item}, a range that ends before it begins; write {last}-{first}")
            _check_label(last, num_classes, item)
            found = list(range(first, last + 1))
        else:
            found = [_label(wanted, num_classes, class_names)]
        if len(found) * count + len(labels) > _MAX_COPIES:
            raise ValueError(f"--labels asks for more than {_MAX_COPIES:,} images")
        labels += found * count
    if not labels:
        raise ValueError("--labels is empty; give class numbers, such as 207,360 x4, or omit it")
    return tuple(labels)


def _label(wanted: str, num_classes: int, class_names: Sequence[str]) -> int:
    if re.fullmatch(r"\d{1,9}", wanted):
        _check_label(int(wanted), num_classes, wanted)
        return int(wanted)
    found = [label for label, name in enumerate(class_names) if name.casefold() == wanted.casefold()]
    if not class_names:
        raise ValueError(f"--labels has {wanted!r}, but the class names of this model are unknown; give numbers")
    if not found:
        raise ValueError(f"--labels has {wanted!r}, which is not a class of this model, unlike {class_names[0]!r}, for example")
    if len(found) > 1:
        raise ValueError(f"--labels has {wanted!r}, the name of several classes: {', '.join(map(str, found))}; give a number")
    return found[0]


def _check_label(label: int, num_classes: int, item: str) -> None:
    if not 0 <= label < max(1, num_classes):
        raise ValueError(f"--labels has {item}, but the classes of this model are 0 to {max(1, num_classes) - 1}")


def read_region(place: Path, box: Sequence[int], keep: str, generator: Generator) -> Region:
    """Read an image at the model's resolution and determine which of its codes to regenerate.

    box: left, top, right, bottom in pixels after the centre crop to the model's resolution; every code that it touches counts as
    inside.   keep: "outside" or "inside". Raises ValueError if the file is not an image or the box is not within it.
    """
    config = generator.vqgan.config
    try:
        if place.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"the file has more than {MAX_FILE_BYTES:,} bytes")
        pixels = to_array(center_crop(decode_image(place.read_bytes()), config.resolution))
    except OSError as error:
        raise ValueError(f"--inpaint {place} cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise ValueError(f"--inpaint {place}: {error}") from error
    left, top, right, bottom = box
    if not (0 <= left < right <= config.resolution and 0 <= top < bottom <= config.resolution):
        side = config.resolution
        raise ValueError(f"--box {left},{top},{right},{bottom} is not left,top,right,bottom within {side} x {side} pixels")
    size = config.downsampling
    row, column, end_row, end_column = top // size, left // size, -(-bottom // size), -(-right // size)
    inside = box_mask(config.grid_size, top=row, left=column, height=end_row - row, width=end_column - column)
    is_masked = inside if keep == "outside" else ~inside
    if not is_masked.any():
        raise ValueError(f"--box {left},{top},{right},{bottom} with --keep {keep} leaves nothing to generate")
    return Region(pixels=torch.from_numpy(pixels), is_masked=is_masked)


def check_request(request: SampleRequest, generator: Generator) -> None:
    """Raise ValueError if the model cannot fulfil the request."""
    config = generator.model.config
    if request.num_images < 1 or request.batch_size < 1 or request.images_per_pass < 1:
        raise ValueError("--num-images, --batch-size and --images-per-pass must be at least 1")
    if config.text_width is None and request.captions:
        condition = f"{config.num_classes:,} classes" if config.num_classes else "no condition"
        raise ValueError(f"--caption is for text-conditional models, but this model has {condition}; use --labels")
    if config.text_width is not None and not request.captions:
        raise ValueError("this model is text-conditional; give captions with --caption")
    if config.text_width is not None and request.labels:
        raise ValueError("--labels is for class-conditional models, but this model is text-conditional; use --caption")
    for label in request.labels:
        _check_label(label, config.num_classes, str(label))
    if generator.vqgan.config.codebook_size != config.codebook_size or generator.vqgan.config.grid_size != config.grid_size:
        raise ValueError("the tokenizer does not fit the model: their grids or codebooks differ")
