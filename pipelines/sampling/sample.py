"""`enat sample`: samples of one model on this machine, with pictures of the decoding steps, without Ray.

Sample i has the same seed as in stage generate and is computed in passes of the same composition. With equal images_per_pass,
precision and device both give the same codes at any batch size.

Shape legend: B images of a batch, L codes, N steps, H x W pixels.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from enat.images import make_grid, png_bytes, to_float
from enat.metrics.adm import AdmWriter
from enat.model import TextCondition
from enat.sampling.cuda_graph import GraphedLoop
from enat.text import TextEncoder, TextFeatures
from enat.tokenizer import VQGAN
from pipelines.cluster.device import device_name, peak_memory_gb
from pipelines.data.samples import sample_label, sample_seed
from pipelines.sampling import pictures
from pipelines.sampling.fixed_batches import (
    PassSampler,
    fixed_numerics,
    in_a_pass,
    pass_pool,
    passes_at_once,
    split_into_passes,
)
from pipelines.sampling.models import Generator
from pipelines.sampling.request import SampleRequest, check_request
from pipelines.storage.base import canonical_json

GRID, STEPS, ANIMATION, NPZ, RECORD, SOURCE = "grid.png", "steps.png", "progress.gif", "samples.npz", "samples.json", "source.png"
FILES = (GRID, STEPS, ANIMATION, NPZ, RECORD, SOURCE)  # beside those in FOLDER
FOLDER = "images"
_SHOWN_IN_GRID = 100
_SHOWN_BY_STEPS = 8


@dataclass(frozen=True)
class Batch:
    """index: of the samples.   states: int64 (B, N + 1, L), tokens fed at each step, and codes.   images: uint8 (B, 3, H, W)."""

    index: range
    states: Tensor
    images: Tensor

    @property
    def codes(self) -> Tensor:
        """int64 (B, L)"""
        return self.states[:, -1]

    @property
    def trajectory(self) -> list[Tensor]:
        """The tokens fed at each step: N times int64 (B, L)."""
        return list(self.states[:, :-1].unbind(dim=1))


def make_samples(
    generator: Generator,
    request: SampleRequest,
    folder: Path,
    encoder: TextEncoder | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Sample, decode and write the requested outputs into a folder. Returns the record, which is also written as samples.json.

    encoder: for a text-conditional model.   advance: called with the number of images after each batch. Memory holds a batch of
    images at a time.
    """
    check_request(request, generator)  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    resolution = generator.vqgan.config.resolution
    shown, first, files, started = [], [], [], time.monotonic()
    sampling_seconds = 0.0
    with ExitStack() as stack:
        writer = None
        if "npz" in request.outputs:
            labels = None if request.captions else _labels(request, generator, range(request.num_images))
            writer = stack.enter_context(
                AdmWriter(folder / NPZ, num_images=request.num_images, height=resolution, width=resolution, labels=labels)
            )
            files.append(NPZ)
        for batch, seconds in sample_batches(generator, request, encoder):
            sampling_seconds += seconds
            if writer is not None:
                writer.write(batch.images)
            for index, pixels in zip(batch.index, batch.images.numpy(), strict=True) if "images" in request.outputs else ():
                _write(folder, _image_name(index), png_bytes(Image.fromarray(pixels.transpose(1, 2, 0))))
            if batch.index.start < _SHOWN_IN_GRID:
                shown.append(batch.images)
            if batch.index.start < _SHOWN_BY_STEPS:
                first.append(batch.states[:_SHOWN_BY_STEPS])
            advance(len(batch.index))
    files += _write_steps(generator, request, torch.cat(first)[:_SHOWN_BY_STEPS], folder)
    if "grid" in request.outputs:
        files.append(_write(folder, GRID, png_bytes(pictures.grid_of(torch.cat(shown)[:_SHOWN_IN_GRID], request.num_asked))))
    record = {
        **_record(generator, request, [*files, RECORD]),
        "seconds": time.monotonic() - started,
        "images_per_second": request.num_images / sampling_seconds,
        "peak_memory_gb": peak_memory_gb(request.device),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    return record


def sample_batches(generator: Generator, request: SampleRequest, encoder: TextEncoder | None) -> Iterator[tuple[Batch, float]]:
    """Batches in order, each with the seconds for sampling and decoding. `encoder`: for a text-conditional model."""
    check_request(request, generator)
    sampler, vqgan = _pass_sampler(generator, request, encoder), generator.vqgan.on(request.device)

    def make(index: range) -> tuple[Tensor, Tensor]:
        states = sampler.states(index)
        return states, _decode(vqgan, states[:, -1], index, min(request.images_per_pass, pictures.IMAGES_PER_PASS))

    passes = split_into_passes(0, request.num_images, request.images_per_pass)
    sizes = {"batch_size": request.batch_size, "images_per_pass": request.images_per_pass}
    num_at_once = passes_at_once(request.device, **sizes, num_threads=torch.get_num_threads())
    with pass_pool(num_at_once) as pool:
        for at in range(0, len(passes), num_at_once):
            started = time.monotonic()
            together = passes[at : at + num_at_once]
            with fixed_numerics(request.device):
                states, images = map(torch.cat, zip(*pool.map(make, together), strict=True))
            yield Batch(range(together[0].start, together[-1].stop), states, images), time.monotonic() - started


def _decode(vqgan: VQGAN, codes: Tensor, index: range, images_per_pass: int) -> Tensor:
    """Decode codes int64 (B, L) to uint8 (B, 3, H, W), in smaller passes than the model's: decoding takes more memory."""
    parts = split_into_passes(index.start, index.stop, images_per_pass)

    def decode(samples: np.ndarray) -> Tensor:
        return pictures.decode_codes(vqgan, codes[torch.from_numpy(samples - index.start)])

    return torch.cat([in_a_pass(decode, part, images_per_pass) for part in parts])


def _pass_sampler(generator: Generator, request: SampleRequest, encoder: TextEncoder | None) -> PassSampler:
    features = _encode(generator, request, encoder)
    start = None if request.region is None else _start(generator, request)

    def conditions(samples: np.ndarray) -> Tensor | TextCondition:
        if features is None:
            return torch.from_numpy(_labels(request, generator, samples.tolist()))
        rows = torch.from_numpy(samples % len(request.captions))
        return TextCondition(features.hidden.cpu()[rows], features.pooled.cpu()[rows])

    model = generator.model.to(request.device)
    return PassSampler(
        model=copy.deepcopy(model).hold_bf16() if request.is_bf16 else model,
        sampler=request.sampler,
        run_seed=request.seed,
        images_per_pass=request.images_per_pass,
        is_bf16=request.is_bf16,
        conditions=conditions,
        starts=lambda samples: None if start is None else start.expand(len(samples), -1),
        loop=GraphedLoop() if request.is_graphed else None,
    )


def _labels(request: SampleRequest, generator: Generator, index: Sequence[int]) -> np.ndarray:
    """int64 (B,)"""
    num_classes = generator.model.config.num_classes
    return np.array([sample_label(i, num_classes, request.labels) for i in index], np.int64)


def _encode(generator: Generator, request: SampleRequest, encoder: TextEncoder | None) -> TextFeatures | None:
    if not request.captions:
        return None
    if encoder is None:
        raise ValueError("--caption requires --text-encoder, the CLIP text model that the model was trained with")
    known, own = (encoder.num_positions, encoder.width), (generator.model.config.num_text_tokens, generator.model.config.text_width)
    if known != own:
        raise ValueError(
            f"--text-encoder gives {known[0]} x {known[1]} features per caption, but the model expects {own[0]} x {own[1]}"
        )
    return encoder.to(request.device).encode(request.captions)


def _start(generator: Generator, request: SampleRequest) -> Tensor:
    """The image's codes with the region masked, int64 (1, L) on the CPU."""
    assert request.region is not None
    vqgan = generator.vqgan
    with torch.no_grad():
        codes = vqgan.encode(to_float(request.region.pixels[None]).to(request.device)).flatten(1).cpu()
    return codes.masked_fill(request.region.is_masked, generator.model.config.mask_id)


# Writing ---------------------------------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name


def _image_name(index: int) -> str:
    return f"{FOLDER}/{index:06d}.png"


def _write_steps(generator: Generator, request: SampleRequest, states: Tensor, folder: Path) -> list[str]:
    """Write the steps of the first images as strip and animation, and the source of a region. `states`: int64 (B, N + 1, L)."""
    files, scale = [], pictures.scale_for(generator.vqgan.config.resolution)
    is_given = request.region is not None
    if is_given or {"steps", "gif"} & set(request.outputs):
        *trajectory, codes = states.unbind(dim=1)
        frames = pictures.step_images(generator.vqgan, trajectory, codes, generator.model.config.mask_id)
        if "steps" in request.outputs:
            files.append(_write(folder, STEPS, png_bytes(pictures.strip(frames, scale, with_start=is_given))))
        if "gif" in request.outputs:
            files.append(_write(folder, ANIMATION, pictures.animation(frames, pictures.columns_of(frames.shape[1]), scale)))
        if request.region is not None:
            beside = torch.stack([request.region.pixels, frames[0, 0]])
            files.append(_write(folder, SOURCE, png_bytes(make_grid(beside, 2, scale=scale))))
    return files


def _record(generator: Generator, request: SampleRequest, files: Sequence[str]) -> dict[str, Any]:
    """The content of samples.json."""
    samples = []
    for index, label in enumerate(_labels(request, generator, range(request.num_images)).tolist()):
        sample: dict[str, Any] = {"index": index, "seed": sample_seed(request.seed, index)}
        if request.captions:
            sample["caption"] = request.captions[index % len(request.captions)]
        else:
            sample |= {"label": label, **({"class": generator.class_names[label]} if generator.class_names else {})}
        if "images" in request.outputs:
            sample["file"] = _image_name(index)
        samples.append(sample)
    region = {} if request.region is None else {"regenerated_codes": request.region.is_masked.nonzero().flatten().tolist()}
    return {
        "model": dict(generator.origin),
        "parameters": sum(tensor.numel() for tensor in generator.model.parameters()),
        "sampler": json.loads(canonical_json(asdict(request.sampler))),
        "seed": request.seed,
        "precision": "bf16" if request.is_bf16 else "fp32",
        "device": device_name(request.device),
        "images_per_pass": request.images_per_pass,
        "batch_size": request.batch_size,
        "resolution": generator.vqgan.config.resolution,
        **region,
        "files": list(files),
        "samples": samples,
    }
