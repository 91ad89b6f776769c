"""The parts of generating samples with their FID on one device, and the time for the 50,000 samples of published scores.

Stage generate: float32 weights, passes of one size, optionally under autocast to bfloat16 and compiled, noise drawn per sample on
the CPU. Stage evaluate: decoder and Inception in float32 without TF32. Last, the Frechet distance. evaluation.py measures what Ray
adds.

Shape legend: P images of a pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from training_loops import DTYPES, fastest_seconds, make_model

from enat.config import ENATConfig
from enat.images import to_uint8
from enat.metrics.inception import InceptionExtractor, random_inception_weights
from enat.metrics.moments import FeatureMoments, frechet_distance
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN, VQGANConfig
from pipelines.evaluation.readers import run_pass
from pipelines.sampling.fixed_batches import PassSampler, fixed_numerics

NUM_SAMPLES = 50_000
PARTS = ("sampling", "decoding", "features")


def sampling(preset: str, *, batch_size: int, device: str, precision: str, num_rounds: int, compiled: bool) -> float:
    """Images per second of stage generate's passes of batch_size."""
    model = make_model(ENATConfig.preset(preset), device).eval().requires_grad_(False)
    if compiled:
        model.compile_blocks()
    sampler = PassSampler(
        model=model,
        sampler=SamplerConfig(),
        run_seed=0,
        images_per_pass=batch_size,
        is_bf16=precision == "bf16",
        conditions=lambda samples: torch.from_numpy(samples % model.config.num_classes),
    )
    with fixed_numerics(device):
        return batch_size / fastest_seconds(lambda: sampler.states(range(batch_size)), device, num_rounds)


@torch.no_grad()
def decoding(*, batch_size: int, device: str, precision: str, num_rounds: int) -> float:
    """Images per second of the tokenizer's decoder at 256 px. The stages decode in "fp32"."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig.preset("vqgan-256")).eval().to(device=device, dtype=DTYPES[precision])
    codes = torch.randint(vqgan.config.codebook_size, (batch_size, 16, 16)).to(device)
    with fixed_numerics(device):
        return batch_size / fastest_seconds(lambda: to_uint8(vqgan.decode(codes)), device, num_rounds)


def features(*, batch_size: int, device: str, num_rounds: int) -> float:
    """Images per second of Inception at 256 px, including the copy of the features to the CPU."""
    extractor = InceptionExtractor(random_inception_weights()).to(device)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 3, 256, 256), dtype=np.uint8)

    def look() -> None:
        run_pass(lambda rows: extractor(rows["images"]), {"images": images}, batch_size, device)

    with fixed_numerics(device):
        return batch_size / fastest_seconds(look, device, num_rounds)


def distance_seconds(width: int = 2048) -> float:
    """Seconds of the Frechet distance on all CPUs of the driver. Independent of the number of samples."""
    moments = [FeatureMoments(width).add(np.random.default_rng(seed).normal(size=(2 * width, width))) for seed in range(2)]
    started = time.perf_counter()
    frechet_distance(*moments)
    return time.perf_counter() - started


def minutes(speeds: Mapping[str, float], distance: float) -> float:
    """speeds: images per second of each of PARTS, which run in sequence."""
    return (NUM_SAMPLES * sum(1 / speeds[part] for part in PARTS) + distance) / 60


def project(
    preset: str,
    fastest: tuple[str, float],
    *,
    batch_size: int,
    device: str,
    precision: str,
    num_rounds: int = 2,
    compiled: bool = False,
) -> dict[str, Any]:
    """Minutes with the settings of the stages, and with the fastest ones. fastest: name of a sampler and its images per second."""
    given: dict[str, Any] = {"batch_size": batch_size, "device": device, "num_rounds": num_rounds}
    speeds = {
        "sampling": sampling(preset, precision=precision, compiled=compiled, **given),
        "decoding": decoding(precision="fp32", **given),
        "features": features(**given),
    }
    best = {
        **speeds,
        "sampling": max(fastest[1], speeds["sampling"]),
        "decoding": max(decoding(precision=precision, **given), speeds["decoding"]) if precision != "fp32" else speeds["decoding"],
    }
    distance = distance_seconds()
    is_stages_own = best["sampling"] == speeds["sampling"]
    path = f"{precision} autocast over fp32 weights" if precision != "fp32" else "fp32"
    own = f"{path}{', compiled blocks' if compiled else ''}"
    exact = "fp32 without TF32"
    return {
        **{f"stages_{part}_images_per_second": speed for part, speed in speeds.items()},
        "fastest_decoding_images_per_second": best["decoding"],
        "distance_seconds": distance,
        "stages_path": f"{own}; decoder and Inception {exact}",
        "stages_minutes_for_50k_samples_with_fid": minutes(speeds, distance),
        "fastest_path": f"{own if is_stages_own else f'{fastest[0]}, {precision} weights'}; "
        f"decoder {precision if best['decoding'] > speeds['decoding'] else exact}, Inception {exact}",
        "fastest_minutes_for_50k_samples_with_fid": minutes(best, distance),
    }
