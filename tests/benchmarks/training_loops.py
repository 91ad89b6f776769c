"""Two training loops in one process: a straightforward one over all tokens with attention masks, and the bare loop of the pipeline
without Ray and DeepSpeed. Weights, draws and losses are equal. It needs neither Ray nor DeepSpeed and runs on any machine with a
GPU:

    python tests/benchmarks/training_loops.py --device cuda --preset enat-l --group-size 128 --precision bf16

Shape legend: B images, L tokens, D width, V codebook size.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[2]))

from enat.blocks import Block
from enat.config import ENATConfig
from enat.cost import training_macs
from enat.execution.peak import matmul_peak
from enat.model import ENAT, draw_dropout_mask
from enat.training.loss import objective, token_accuracy
from enat.training.masking import MaskedCodes, MaskingConfig, mask_codes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMA_DECAY = 0.999


class Draws:
    """Data of successive steps: codes (B, L), labels (B,), masked codes, dropout."""

    def __init__(self, config: ENATConfig, group_size: int, device: str) -> None:
        self.config, self.group_size, self.device = config, group_size, device

    def group(self, step: int) -> tuple[Tensor, Tensor, MaskedCodes, Tensor | None]:
        config, rng = self.config, np.random.default_rng(step)
        codes = torch.from_numpy(rng.integers(0, config.codebook_size, (self.group_size, config.num_tokens))).to(self.device)
        labels = torch.from_numpy(rng.integers(0, config.num_classes, self.group_size)).to(self.device)
        masking = MaskingConfig(reuse_probability=float(step % 2) if config.reuse else 0.0)  # fresh and reusing steps alternate
        masked = mask_codes(codes, config.mask_id, masking, rng)
        generator = torch.Generator(self.device).manual_seed(step)
        return codes, labels, masked, draw_dropout_mask(config, self.group_size, generator, self.device)

    def macs(self, step: int) -> int:
        masked = self.group(step)[2]
        previous = masked.previous_num_masked if masked.previous_tokens is not None else None
        return self.group_size * training_macs(self.config, masked.num_masked, previous)


class ObviousLoop:
    """All tokens through every layer, attention masks, logits at every position, parameters updated one by one."""

    def __init__(self, model: ENAT, precision: str) -> None:
        self.model, self.ema = model.train(), copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.99, 0.99), weight_decay=0.03)
        self.precision = precision

    def step(self, codes: Tensor, labels: Tensor, masked: MaskedCodes, dropout: Tensor | None) -> Tensor:
        with autocast(codes.device, self.precision):
            previous, mask_before = None, None
            if masked.previous_tokens is not None:
                with torch.no_grad():
                    previous, _ = dense_forward(self.ema, masked.previous_tokens, labels)
                mask_before = masked.previous_tokens == self.model.config.mask_id
            _, logits = dense_forward(self.model, masked.tokens, labels, previous, mask_before, dropout)
        mask = masked.tokens == self.model.config.mask_id
        loss = F.cross_entropy(logits[mask].float(), codes[mask], label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                averaged.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        return loss.detach()


class PublishedLikeLoop:
    """What the published code does: visible tokens are gathered, as here. Attention is explicit, the head scores every position,
    every block normalizes and modulates for itself, and optimizer and average go through the parameters one by one."""

    def __init__(self, model: ENAT, precision: str) -> None:
        self.model, self.ema = model.train(), copy.deepcopy(model).eval().requires_grad_(False)
        settings: dict[str, Any] = {"lr": 4e-4, "betas": (0.99, 0.99), "weight_decay": 0.03}
        self.optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False, **settings)
        self.precision = precision

    def step(self, codes: Tensor, labels: Tensor, masked: MaskedCodes, dropout: Tensor | None) -> Tensor:
        with autocast(codes.device, self.precision):
            previous, mask_before = None, None
            if masked.previous_tokens is not None:
                with torch.no_grad():
                    previous, _ = gathered_forward(self.ema, masked.previous_tokens, labels)
                mask_before = masked.previous_tokens == self.model.config.mask_id
            _, logits = gathered_forward(self.model, masked.tokens, labels, previous, mask_before, dropout)
            mask = masked.tokens == self.model.config.mask_id
            loss = F.cross_entropy(logits[mask].float(), codes[mask], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                averaged.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        return loss.detach()


class BareLoop:
    """The computation of a worker without Ray, DeepSpeed and metrics."""

    def __init__(self, model: ENAT, precision: str, *, compile: bool = False) -> None:
        self.model, self.ema = model.train(), copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.99, 0.99), weight_decay=0.03, fused=True)
        self.update_ema = get_ema_multi_avg_fn(EMA_DECAY)
        self.precision = precision
        if compile:
            self.model.compile_blocks()
            self.ema.compile_blocks()

    def step(self, codes: Tensor, labels: Tensor, masked: MaskedCodes, dropout: Tensor | None) -> Tensor:
        with autocast(codes.device, self.precision):
            loss, output = objective(self.model, self.ema, codes, labels, masked, dropout_mask=dropout)
        token_accuracy(output, codes)
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.update_ema(list(self.ema.parameters()), list(self.model.parameters()), 1)


def dense_forward(
    model: ENAT,
    tokens: Tensor,
    labels: Tensor,
    previous: Tensor | None = None,
    mask_before: Tensor | None = None,
    dropout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (B, L, D) and logits (B, L, V) of an ENAT with self-cross attention. previous: features of the step before."""
    mask, embedded, condition = _embedded(model, tokens, labels, dropout)
    old, projected = torch.zeros_like(mask), None
    if previous is not None:
        assert mask_before is not None and model.previous_projection is not None
        old, projected = ~mask_before, model.previous_projection(previous)
    new, x = ~mask & ~old, embedded
    for block in _blocks(model.encoder):
        x = _dense_block(block, x, projected, condition, torch.cat([old, new], dim=1) if projected is not None else new)
    visible = torch.where(old[..., None], projected, x) if projected is not None else x
    y = embedded
    for block in _blocks(model.decoder):
        y = _dense_block(block, y, visible, condition, torch.cat([~mask, mask], dim=1))
    features = torch.where(mask[..., None], y, visible)
    return features, model.head(features, model.token_embedding.weight)


def _dense_block(block: Block, x: Tensor, conditioning: Tensor | None, condition: Tensor, is_key: Tensor) -> Tensor:
    """is_key: bool (B, keys), which of [conditioning ; own] tokens may be attended to."""
    return _plain_block(
        block,
        x,
        conditioning,
        condition,
        lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=is_key[:, None, None]),
    )


def gathered_forward(
    model: ENAT,
    tokens: Tensor,
    labels: Tensor,
    previous: Tensor | None = None,
    mask_before: Tensor | None = None,
    dropout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What dense_forward returns. Only the tokens that a layer needs go through it, as in the published code."""
    mask, embedded, condition = _embedded(model, tokens, labels, dropout)
    old, projected = torch.zeros_like(mask), None
    if previous is not None:
        assert mask_before is not None and model.previous_projection is not None
        old = ~mask_before
        projected = model.previous_projection(_rows(previous, old))
    x = _rows(embedded, ~mask & ~old)
    if x.shape[1]:
        for block in _blocks(model.encoder):
            x = _plain_block(block, x, projected, condition, _explicit_attention)
    features = embedded.masked_scatter((~mask & ~old)[..., None], x)
    if projected is not None:
        features = features.masked_scatter(old[..., None], projected)
    visible, y = _rows(features, ~mask), _rows(embedded, mask)
    for block in _blocks(model.decoder):
        y = _plain_block(block, y, visible, condition, _explicit_attention)
    features = features.masked_scatter(mask[..., None], y)
    return features, model.head(features, model.token_embedding.weight)


def _blocks(blocks: nn.ModuleList) -> Iterator[Block]:
    for block in blocks:
        assert isinstance(block, Block)
        yield block


def _embedded(model: ENAT, tokens: Tensor, labels: Tensor, dropout: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are masked, the embedded tokens and the input of adaLN."""
    assert model.label_embedding is not None
    position = torch.arange(tokens.shape[1], device=tokens.device)
    embedded = model.embedding_norm(model.token_embedding(tokens) + model.position_embedding(position))
    if dropout is not None:
        embedded = embedded * dropout / (1 - model.config.dropout)
    return tokens == model.config.mask_id, embedded, F.silu(model.label_embedding(labels))


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    """(B, S, D), the chosen tokens, equally many in every row."""
    return x[chosen].view(len(x), -1, x.shape[-1])


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value


def _plain_block(
    block: Block, x: Tensor, conditioning: Tensor | None, condition: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    chunks = [chunk[:, None] for chunk in block.modulation(condition).chunk(8, dim=-1)]
    shift, scale, shift_cond, scale_cond, gate, shift_mlp, scale_mlp, gate_mlp = chunks
    attention, heads = block.attention, block.attention.num_heads
    assert attention.key_value_own is not None and attention.key_value_conditioning is not None
    own = _normalized(x) * (1 + scale) + shift
    key_value = attention.key_value_own(own)
    if conditioning is not None:
        modulated = _normalized(conditioning) * (1 + scale_cond) + shift_cond
        key_value = torch.cat([attention.key_value_conditioning(modulated), key_value], dim=1)
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (attention.query(own), *key_value.chunk(2, dim=-1))
    )
    x = x + gate * attention.project(attend(query, key, value).transpose(1, 2).flatten(2))
    fc1 = block.mlp.fc1
    hidden = F.gelu(F.linear(_normalized(x) * (1 + scale_mlp) + shift_mlp, fc1.weight, fc1.bias), approximate="tanh")
    return x + gate_mlp * block.mlp.fc2(hidden)


def _normalized(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def make_model(config: ENATConfig, device: str) -> ENAT:
    return ENAT(config).initialize(torch.Generator().manual_seed(0)).to(device)


def compare(
    preset: str, *, group_size: int, device: str, precision: str, num_steps: int, warm_up: int = 2, compiled: bool = False
) -> dict[str, Any]:
    """Seconds of a step of every loop and their ratios, also of fresh and of reusing steps alone.

    The loops take turns at each step, so a slow moment of the machine affects all. Draws are not counted.
    """
    config = ENATConfig.preset(preset)
    draws = Draws(config, group_size, device)
    loops: dict[str, Any] = {"obvious": ObviousLoop, "published_like": PublishedLikeLoop, "bare": BareLoop}
    loops = {name: loop(make_model(config, device), precision) for name, loop in loops.items()}
    if compiled:
        loops["compiled"] = BareLoop(make_model(config, device), precision, compile=True)
    for name, loop in loops.items():
        for number in range(10 if name == "compiled" else warm_up):
            loop.step(*draws.group(number))
    seconds = {name: {"fresh": 0.0, "reusing": 0.0} for name in loops}
    for number in range(warm_up, warm_up + num_steps):
        given = draws.group(number)
        for name, loop in loops.items():
            started = clock(device)
            loop.step(*given)
            seconds[name]["reusing" if number % 2 else "fresh"] += clock(device) - started
    flops = 2 * sum(draws.macs(number) for number in range(warm_up, warm_up + num_steps))
    total = {name: sum(kinds.values()) for name, kinds in seconds.items()}
    figures: dict[str, Any] = {f"{name}_seconds_per_step": total[name] / num_steps for name in loops}
    for name in [*loops][2:]:
        figures |= {f"{rival}_over_{name}": total[rival] / total[name] for rival in ("obvious", "published_like")}
        figures |= {
            f"published_like_over_{name}_{kind}": seconds["published_like"][kind] / took
            for kind, took in seconds[name].items()
            if took
        }
        figures[f"{name}_tflops"] = flops / total[name] / 1e12
    return figures


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def clock(device: str) -> float:
    """Seconds, when all work of the device is done."""
    synchronize(device)
    return time.perf_counter()


def fastest_seconds(call: Callable[[], Any], device: str, num_rounds: int) -> float:
    """Fastest of num_rounds calls, after one to warm up."""
    fastest = float("inf")
    for number in range(num_rounds + 1):
        started = clock(device)
        call()
        if number:
            fastest = min(fastest, clock(device) - started)
    return fastest


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="enat-s")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--compiled", action="store_true")
    given = vars(parser.parse_args())
    peak = matmul_peak(torch.device(given["device"]), DTYPES[given["precision"]])
    print(json.dumps({"matmul_tflops": peak / 1e12, **compare(given.pop("preset"), **given)}, indent=1))  # noqa: T201
