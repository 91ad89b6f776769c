"""Two samplers in one process: a straightforward one, which sends all tokens through every layer with attention masks twice a step,
and that of enat.sampling, fresh and with reuse. Weights, noise and codes are equal. On a GPU also compiled, and as one CUDA graph
per call:

    python tests/benchmarks/sampling_loops.py --device cuda --preset enat-l --precision bf16 --batch-size 128 --compiled

Shape legend: B images, L tokens, V codebook size, N steps.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parent))
sys.path.insert(2, str(Path(__file__).parents[1]))

from training_loops import DTYPES, clock, dense_forward, gathered_forward, make_model

from enat.config import ENATConfig
from enat.cost import generation_cost
from enat.execution.peak import matmul_peak
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.sampling.cuda_graph import GraphedLoop
from enat.sampling.sampler import decode_steps, draw_uniforms

_SPEED = "_images_per_second"
FRESH, REUSE = SamplerConfig(reuse=False), SamplerConfig()


@torch.no_grad()
def obvious_sample(model: ENAT, conditions: Tensor, uniforms: Tensor, config: SamplerConfig) -> Tensor:
    """Codes int64 (B, L) of a model with self-cross attention; conditions int64 (2 B,), labels and then null labels.

    Both passes at every step, logits and codes for every position. Visible codes are put back.
    """
    (num_images, _, _, num_tokens), mask_id = uniforms.shape, model.config.mask_id
    tokens = torch.full((num_images, num_tokens), mask_id, device=uniforms.device)
    features, mask_before = None, None
    for step in range(config.num_steps):
        mask = tokens == mask_id
        features, logits = dense_forward(
            model, tokens.repeat(2, 1), conditions, features if config.reuse else None, mask_before if config.reuse else None
        )
        mask_before = mask.repeat(2, 1)
        cond, uncond = logits.float().chunk(2)
        tokens = _revealed(tokens, mask, cond, uncond, uniforms, step, config)
    return tokens


@torch.no_grad()
def published_like_sample(model: ENAT, conditions: Tensor, uniforms: Tensor, config: SamplerConfig) -> Tensor:
    """The same codes as the published code makes them: visible tokens are gathered, but attention is explicit, both passes run at
    every step, one after the other, and the head scores every position."""
    (num_images, _, _, num_tokens), mask_id = uniforms.shape, model.config.mask_id
    tokens = torch.full((num_images, num_tokens), mask_id, device=uniforms.device)
    features: list[Tensor | None] = [None, None]
    mask_before = None
    for step in range(config.num_steps):
        mask = tokens == mask_id
        (features[0], cond), (features[1], uncond) = (
            gathered_forward(model, tokens, labels, previous, mask_before)
            for labels, previous in zip(conditions.chunk(2), features, strict=True)
        )
        if config.reuse:
            mask_before = mask
        else:
            features = [None, None]
        tokens = _revealed(tokens, mask, cond.float(), uncond.float(), uniforms, step, config)
    return tokens


def _revealed(
    tokens: Tensor, mask: Tensor, cond: Tensor, uncond: Tensor, uniforms: Tensor, step: int, config: SamplerConfig
) -> Tensor:
    """Tokens after a step: codes are drawn for every position, and visible ones are put back."""
    log_probs = (uncond + config.guidance_at(step) * (cond - uncond)).log_softmax(dim=-1)
    cumulative = (log_probs / config.sampling_temperature_at(step)).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, step, 0, :, None] * cumulative[..., -1:], right=True)
    drawn = drawn.clamp_max(log_probs.shape[-1] - 1)
    noise = config.remask_temperature_at(step) * torch.log(-torch.log(uniforms[:, step, 1]))
    confidence = (log_probs.gather(-1, drawn)[..., 0] - noise).masked_fill(~mask, float("inf"))
    hidden = confidence.argsort(dim=1)[:, : config.num_masked_at(step + 1, tokens.shape[1])]
    return torch.where(mask, drawn[..., 0], tokens).scatter(1, hidden, log_probs.shape[-1])


class Loop:
    """The sampler of enat.sampling on prepared noise and conditions.

    compiled: its blocks go through torch.compile.   decode: decode_steps, or what replaces it.
    """

    def __init__(self, model: ENAT, config: SamplerConfig, *, compiled: bool = False, decode: Any = decode_steps) -> None:
        self.model, self.config, self.decode = model, config, decode
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # every step has its own shapes
            model.compile_blocks()

    def __call__(self, conditions: Tensor, uniforms: Tensor) -> Tensor:
        tokens = torch.full((len(uniforms), self.model.config.num_tokens), self.model.config.mask_id, device=uniforms.device)
        return self.decode(self.model, conditions, tokens, uniforms, self.config)[-1]


def inputs(model: ENAT, batch_size: int, config: SamplerConfig, device: str) -> tuple[Tensor, Tensor]:
    """Conditions and noise of the first batch_size samples."""
    labels = torch.arange(batch_size, device=device) % model.config.num_classes
    uniforms = draw_uniforms(range(batch_size), config.num_steps, model.config.num_tokens).to(device)
    return torch.cat([labels, torch.full_like(labels, model.config.null_label)]), uniforms


def compare(
    preset: str, *, batch_size: int, device: str, precision: str, num_rounds: int = 2, compiled: bool = False
) -> dict[str, Any]:
    """Images per second of both samplers, their ratios, and the ratio of MACs for reuse. Weights have `precision`."""
    model = _model(preset, precision, device)
    conditions, uniforms = inputs(model, batch_size, REUSE, device)
    samplers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "obvious": lambda conditions, uniforms: obvious_sample(model, conditions, uniforms, FRESH),
        "obvious_reuse": lambda conditions, uniforms: obvious_sample(model, conditions, uniforms, REUSE),
        "published_like": lambda conditions, uniforms: published_like_sample(model, conditions, uniforms, REUSE),
        "fresh": Loop(model, FRESH),
        "reuse": Loop(model, REUSE),
    }
    figures: dict[str, Any] = {}
    if compiled:
        samplers |= _compiled_samplers(_model(preset, precision, device), conditions, uniforms, figures)
    speeds = images_per_second(samplers, conditions, uniforms, num_rounds)
    macs = {
        name: generation_cost(model.config, config).executed_transformer_macs for name, config in (("fresh", FRESH), ("", REUSE))
    }
    for name, speed in speeds.items():
        figures[f"{name}_images_per_second"] = speed
        if not name.startswith(("obvious", "published")):
            figures[f"{name}_over_obvious"] = speed / speeds["obvious"]
            figures[f"{name}_over_published_like"] = speed / speeds["published_like"]
            figures[f"{name}_tflops"] = 2 * macs.get(name, macs[""]) * speed / 1e12
    figures["reuse_over_obvious_reuse"] = speeds["reuse"] / speeds["obvious_reuse"]
    figures["reuse_over_fresh"] = speeds["reuse"] / speeds["fresh"]
    figures["macs_of_fresh_over_reuse"] = macs["fresh"] / macs[""]
    return figures


def _compiled_samplers(
    model: ENAT, conditions: Tensor, uniforms: Tensor, figures: dict[str, Any]
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Compiled and recorded samplers that work here. The figures name those that do not."""
    samplers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    try:
        loop = Loop(model, REUSE, compiled=True)
        loop(conditions, uniforms)
        samplers["compiled"] = loop
        if conditions.is_cuda:
            samplers["graphed"] = Loop(model, REUSE, decode=GraphedLoop())
    except Exception as error:
        figures["compiling_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return samplers


def images_per_second(
    samplers: Mapping[str, Callable[[Tensor, Tensor], Tensor]], conditions: Tensor, uniforms: Tensor, num_rounds: int
) -> dict[str, float]:
    """The best of num_rounds alternating calls of each. A slow moment of the machine affects all. First calls warm up."""
    fastest = dict.fromkeys(samplers, float("inf"))
    few = slice(None) if conditions.is_cuda else slice(1)  # a GPU picks its kernels by shape
    for sampler in samplers.values():
        sampler(conditions.view(2, -1)[:, few].flatten(), uniforms[few])
    for _ in range(num_rounds):
        for name, sampler in samplers.items():
            started = clock(str(conditions.device))
            sampler(conditions, uniforms)
            fastest[name] = min(fastest[name], clock(str(conditions.device)) - started)
    return {name: len(uniforms) / seconds for name, seconds in fastest.items()}


def options_over_plain(preset: str, *, batch_size: int, device: str, precision: str, num_rounds: int = 2) -> dict[str, float]:
    """Speed with top-k and top-p, and with half of the tokens given, relative to plain sampling with reuse."""
    model = _model(preset, precision, device)
    conditions, uniforms = inputs(model, batch_size, REUSE, device)
    num_tokens = model.config.num_tokens
    codes = torch.zeros((batch_size, num_tokens), dtype=torch.int64, device=device)
    start = torch.where(torch.arange(num_tokens, device=device) < num_tokens // 2, codes, model.config.mask_id)

    def half_given(conditions: Tensor, uniforms: Tensor) -> Tensor:
        return decode_steps(model, conditions, start[: len(uniforms)], uniforms, REUSE, num_given=num_tokens // 2)[-1]

    filtered = Loop(model, SamplerConfig(top_k=512, top_p=0.95))
    samplers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain": Loop(model, REUSE),
        "filtered": filtered,
        "half_given": half_given,
    }
    speeds = images_per_second(samplers, conditions, uniforms, num_rounds)
    macs = [generation_cost(model.config, REUSE, num_given=count).executed_transformer_macs for count in (0, num_tokens // 2)]
    return {
        "top_k_and_top_p_over_plain": speeds["filtered"] / speeds["plain"],
        "half_given_over_plain": speeds["half_given"] / speeds["plain"],
        "macs_of_plain_over_half_given": macs[0] / macs[1],
    }


def one_image(preset: str, precision: str, num_rounds: int) -> dict[str, float]:
    """A batch of one image: speed relative to the published-like sampler."""
    model = _model(preset, precision, "cpu")
    samplers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "published_like": lambda conditions, uniforms: published_like_sample(model, conditions, uniforms, REUSE),
        "reuse": Loop(model, REUSE),
    }
    speeds = images_per_second(samplers, *inputs(model, 1, REUSE, "cpu"), 2 * num_rounds)
    tflops = 2 * generation_cost(model.config, REUSE).executed_transformer_macs * speeds["reuse"] / 1e12
    return {
        "reuse_of_one_image_over_published_like": speeds["reuse"] / speeds["published_like"],
        "reuse_of_one_image_tflops": tflops,
    }


def passes_side_by_side(preset: str, batch_size: int, precision: str, num_rounds: int) -> dict[str, float]:
    """A pass of batch_size on every core, one thread each, as stage generate computes them, relative to one pass on all cores."""
    model, num_threads = _model(preset, precision, "cpu"), torch.get_num_threads()
    loop, given = Loop(model, REUSE), inputs(model, batch_size, REUSE, "cpu")
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        apart = min(_seconds(lambda: [*pool.map(lambda _: loop(*given), range(num_threads))]) for _ in range(num_rounds + 1))
    torch.set_num_threads(num_threads)
    together = min(_seconds(lambda: loop(*given)) for _ in range(num_rounds + 1))
    return {"passes_side_by_side_over_one_on_all_cores": num_threads * together / apart}


def _seconds(call: Callable[[], Any]) -> float:
    started = clock("cpu")
    call()
    return clock("cpu") - started


def measure(
    preset: str, *, batch_size: int, device: str, precision: str, num_rounds: int = 2, compiled: bool = False
) -> dict[str, Any]:
    """All figures, with shares of the device's peak of matrix products and minutes for 50,000 samples with FID.

    On a CPU, with a thread for every core, and also one image at a time and a pass on every core.
    """
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    given: dict[str, Any] = {"batch_size": batch_size, "device": device, "precision": precision, "num_rounds": num_rounds}
    peak = matmul_peak(torch.device(device), DTYPES[precision]) / 1e12
    figures = compare(preset, compiled=compiled, **given)
    speeds = {name.removesuffix(_SPEED): value for name, value in figures.items() if name.endswith(_SPEED)}
    fastest = max(speeds, key=lambda name: speeds[name])
    figures |= options_over_plain(preset, **given)
    if device == "cpu":
        figures |= one_image(preset, precision, num_rounds) | passes_side_by_side(preset, batch_size, precision, num_rounds)
    if find_spec("ray") is not None and find_spec("pyarrow") is not None:  # what 50,000 samples take is that of the stages
        import samples_with_fid

        figures |= samples_with_fid.project(preset, (fastest, speeds[fastest]), compiled=compiled, **given)
    shares = {name.replace("tflops", "share_of_matmul_peak"): value / peak for name, value in figures.items() if "tflops" in name}
    return {"matmul_tflops": peak, **figures, **shares}


def _model(preset: str, precision: str, device: str) -> ENAT:
    return make_model(ENATConfig.preset(preset), device).to(DTYPES[precision]).eval().requires_grad_(False)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="enat-s")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    arguments = vars(parser.parse_args())
    print(json.dumps(measure(arguments.pop("preset"), **arguments), indent=1))  # noqa: T201
