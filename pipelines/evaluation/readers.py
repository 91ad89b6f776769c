"""Where images come from that features are computed of: a dataset, generated codes, anything that gives pixels.

A block reader loads rows on a CPU, and its decoder turns them into images on the device of whoever computes with them.

Shape legend: R images, P images of a pass, L codes of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from enat.checkpoint import load_vqgan
from enat.images import to_levels, to_uint8
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import Dataset
from pipelines.data.image_sets import ImageSet, ImageSetConfig
from pipelines.data.samples import read_samples

Rows = dict[str, torch.Tensor]
ROUNDINGS = ("uint8", "float")  # of decoded pixels, before anything is computed of them


@dataclass(frozen=True)
class Decoded:
    """images: uint8 (R, 3, H, W), or float32 in 0..255 where they are not rounded.

    measures: what else is known of each image by then, by name; (R,).
    """

    images: torch.Tensor
    measures: Mapping[str, torch.Tensor] = field(default_factory=dict)


Decoder = Callable[[Rows], Decoded]


class BlockReader(Protocol):
    """Sendable to workers. An image must not depend on which others it is decoded with, but for their number.

    load: the rows of images start..stop-1 by name, arrays of R; unreadable images may be left out.
    decoder: turns such rows, as tensors on the device, into images.
    """

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]: ...

    def decoder(self, device: str) -> Decoder: ...


class ImageReader(Protocol):
    """read: uint8 (R, 3, H, W) of sample indices start..stop-1; may leave out unreadable ones."""

    def read(self, start: int, stop: int, device: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class PixelBlocks:
    """Whatever reads pixels, as a block reader."""

    reader: ImageReader

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"pixels": self.reader.read(start, stop, "cpu").numpy()}

    def decoder(self, device: str) -> Decoder:
        return lambda rows: Decoded(rows["pixels"])


@dataclass(frozen=True)
class SourceImages:
    """The real images of a dataset, cropped as the token map crops them. Unreadable ones, which it quarantines, are left out."""

    dataset: Dataset
    resolution: int

    def read(self, start: int, stop: int, device: str) -> torch.Tensor:
        return torch.from_numpy(self.dataset.load_images(self.resolution, start, stop)[0]).to(device)


@dataclass(frozen=True)
class DecodedSamples:
    """Generated codes, decoded by the tokenizer."""

    store: ArtifactStore
    samples: Manifest
    tokenizer: Manifest
    rounding: str = "uint8"

    def load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"codes": read_samples(self.store, self.samples, start, stop).codes}

    def decoder(self, device: str) -> Decoder:
        return code_decoder(self.store, self.tokenizer, device, self.rounding)


def sample_reader(
    store: ArtifactStore,
    samples: Manifest,
    tokenizer: Manifest | None,
    images: ImageSetConfig | None,
    rounding: str = "uint8",
) -> BlockReader:
    """Of samples that were generated here, by stage `generate`, or elsewhere, by stage `images`. images: where those lie.
    rounding: of ROUNDINGS.

    Raises ValueError where images are to be float that were made elsewhere, as these were rounded by whoever made them.
    """
    if samples.stage == "images":
        assert images is not None
        if rounding != "uint8":
            raise ValueError("images that were made elsewhere are of 8 bits; leave evaluate.rounding at uint8")
        return PixelBlocks(ImageSet(images, store, samples))
    assert tokenizer is not None
    return DecodedSamples(store, samples, tokenizer, rounding)


def code_decoder(store: ArtifactStore, tokenizer: Manifest, device: str, rounding: str = "uint8") -> Decoder:
    """Rows "codes" int64 (R, L) -> images."""
    vqgan = load_vqgan(store.fetch(tokenizer, "vqgan.safetensors")).to(device)
    side = vqgan.config.grid_size
    finish = to_uint8 if rounding == "uint8" else to_levels
    return lambda rows: Decoded(finish(vqgan.decode(rows["codes"].view(-1, side, side))))


def read_images(reader: BlockReader, start: int, stop: int, images_per_pass: int) -> torch.Tensor:
    """A few images here and now, uint8 (R, 3, H, W) on the CPU, in passes from start on."""
    rows = reader.load(start, stop)
    decoder = reader.decoder("cpu")
    num_rows = len(next(iter(rows.values())))
    images = [
        run_pass(lambda padded: {"images": decoder(padded).images}, part, images_per_pass, "cpu")["images"]
        for first in range(0, num_rows, images_per_pass)
        for part in [{name: values[first : first + images_per_pass] for name, values in rows.items()}]
    ]
    return torch.from_numpy(np.concatenate(images)) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


@torch.inference_mode()
def run_pass(
    compute: Callable[[Rows], Mapping[str, torch.Tensor]], rows: Mapping[str, np.ndarray], images_per_pass: int, device: str
) -> dict[str, np.ndarray]:
    """Compute with R <= P rows, filled up with zeros to P: what a network computes depends on the size of its batch."""
    num_rows = len(next(iter(rows.values())))
    padded = {}
    for name, values in rows.items():
        padding = np.zeros((images_per_pass - num_rows, *values.shape[1:]), values.dtype)
        padded[name] = torch.from_numpy(np.concatenate([values, padding])).to(device)
    return {name: values[:num_rows].cpu().numpy() for name, values in compute(padded).items()}
