"""Sources of the images of an evaluation: a dataset, generated codes, or anything that gives pixels.

A block reader loads rows on a CPU. Its decoder turns them into images on the device that computes their features.

Shape legend: R images, P images of a pass, L codes of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from enat.images import to_levels, to_uint8
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import Dataset
from pipelines.data.image_sets import ImageSet, ImageSetConfig
from pipelines.data.samples import read_samples

if TYPE_CHECKING:
    import torch


Rows: TypeAlias = "dict[str, torch.Tensor]"
ROUNDINGS = ("uint8", "float")  # of decoded pixels, before features are computed


@dataclass(frozen=True)
class Decoded:
    """images: uint8 (R, 3, H, W), or float32 in [0, 255] if they are not rounded.

    measures: further values of each image by name, (R,).
    """

    images: torch.Tensor
    measures: Mapping[str, torch.Tensor] = field(default_factory=dict)


Decoder = Callable[[Rows], Decoded]


class BlockReader(Protocol):
    """Sent to workers. An image may depend on the number of images it is decoded with, but not on their content.

    load: rows of the images start..stop-1 by name, R each. Unreadable images may be left out.
    decoder: a function from such rows, as tensors on the device, to images.
    A reader that does not decode in fp32, or not as written because its decoder is compiled, has a method `exact`, which returns
    one that does.
    """

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]: ...

    def decoder(self, device: str) -> Decoder: ...


class ImageReader(Protocol):
    """read: images start..stop-1, uint8 (R, 3, H, W). May leave out unreadable ones."""

    def read(self, start: int, stop: int, device: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class PixelBlocks:
    """A block reader over an image reader."""

    reader: ImageReader

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"pixels": self.reader.read(start, stop, "cpu").numpy()}

    def decoder(self, device: str) -> Decoder:
        return lambda rows: Decoded(rows["pixels"])


@dataclass(frozen=True)
class SourceImages:
    """The images of a dataset, cropped as in the token map. Unreadable images are left out, as in the token map."""

    dataset: Dataset
    resolution: int

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.dataset.load_images(self.resolution, start, stop)[0]).to(device)


@dataclass(frozen=True)
class DecodedSamples:
    """Generated codes of one replicate, decoded by the tokenizer."""

    store: ArtifactStore
    samples: Manifest
    tokenizer: Manifest
    rounding: str = "uint8"
    replicate: int = 0
    precision: str = "fp32"
    is_compiled: bool = False

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"codes": read_samples(self.store, self.samples, start, stop, replicate=self.replicate).codes}

    def decoder(self, device: str) -> Decoder:
        places = (self.store, self.tokenizer, device, self.rounding)
        return code_decoder(*places, precision=self.precision, is_compiled=self.is_compiled)

    def exact(self) -> DecodedSamples:
        return replace(self, precision="fp32", is_compiled=False) if self.precision != "fp32" or self.is_compiled else self


def sample_reader(
    store: ArtifactStore,
    samples: Manifest,
    tokenizer: Manifest | None,
    images: ImageSetConfig | None,
    *,
    rounding: str = "uint8",
    replicate: int = 0,
    precision: str = "fp32",
    is_compiled: bool = False,
) -> BlockReader:
    """A reader of a replicate of generated samples (stage `generate`), or of images from elsewhere (stage `images`) at `images`.

    rounding: of ROUNDINGS.   precision, is_compiled: of the tokenizer's decoder.
    Raises ValueError for "float" with images from elsewhere: these are rounded already.
    """
    if samples.stage == "images":
        assert images is not None
        if rounding != "uint8":
            raise ValueError("images from elsewhere have 8 bits; set evaluate.rounding to uint8")
        return PixelBlocks(ImageSet(images, store, samples))
    assert tokenizer is not None
    return DecodedSamples(store, samples, tokenizer, rounding, replicate, precision, is_compiled)


def code_decoder(
    store: ArtifactStore,
    tokenizer: Manifest,
    device: str,
    rounding: str = "uint8",
    *,
    precision: str = "fp32",
    is_compiled: bool = False,
) -> Decoder:
    """A decoder of rows "codes", int64 (R, L), to images."""
    from enat.checkpoint import load_vqgan

    vqgan = load_vqgan(store.fetch(tokenizer, "vqgan.safetensors")).on(device)
    if is_compiled:
        vqgan.compile_networks()
    side = vqgan.config.grid_size
    finish = to_uint8 if rounding == "uint8" else to_levels
    return lambda rows: Decoded(finish(vqgan.decode(rows["codes"].view(-1, side, side), precision)))


def read_images(reader: BlockReader, start: int, stop: int, images_per_pass: int) -> torch.Tensor:
    """Read a few images in this process, in passes from `start` on: uint8 (R, 3, H, W) on the CPU."""
    import torch

    decoder = reader.decoder("cpu")
    images = [
        run_pass(lambda padded: {"images": decoder(padded).images}, rows, images_per_pass, "cpu")["images"]
        for rows in passes_of(reader.load(start, stop), images_per_pass)
    ]
    return torch.from_numpy(np.concatenate(images)) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


def passes_of(rows: Mapping[str, np.ndarray], images_per_pass: int) -> list[dict[str, np.ndarray]]:
    num_rows = len(next(iter(rows.values())))
    starts = range(0, num_rows, images_per_pass)
    return [{name: values[start : start + images_per_pass] for name, values in rows.items()} for start in starts]


def run_pass(
    compute: Callable[[Rows], Mapping[str, torch.Tensor]], rows: Mapping[str, np.ndarray], images_per_pass: int, device: str
) -> dict[str, np.ndarray]:
    """Compute with R <= P rows, padded with zeros to P, because the results of a network depend on the size of its batch."""
    import torch

    num_rows = len(next(iter(rows.values())))
    padded = {}
    for name, values in rows.items():
        padding = np.zeros((images_per_pass - num_rows, *values.shape[1:]), values.dtype)
        padded[name] = torch.from_numpy(np.concatenate([values, padding])).to(device)
    with torch.inference_mode():
        return {name: values[:num_rows].cpu().numpy() for name, values in compute(padded).items()}
