"""Small models whose every weight is random, and the golden data with its models.

Random weights matter: as initialised, adaLN is zero, every block is the identity, and a wrong block would go unseen.
Shape legend: B images, L tokens, T text tokens, W width of caption features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from enat.checkpoint import load_published_enat, load_published_vqgan
from enat.config import DECODER_ATTENTIONS, ENATConfig
from enat.model import ENAT, TextCondition
from enat.tokenizer import VQGAN, VQGANConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def small_config(**overrides: Any) -> ENATConfig:
    """L = 16 tokens, V = 24 codes, 5 classes, two blocks on either side."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "embed_dim": 32, "num_heads": 4}
    return ENATConfig(**{**sizes, "grid_size": 4, "codebook_size": 24, "num_classes": 5, **overrides})


def randomize(module: ModuleT, seed: int = 0, std: float = 0.1) -> ModuleT:
    """Every parameter gets N(0, std) added to 1 for the scales of norms and to 0 for the rest; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    scales = {
        id(norm.weight) for norm in module.modules() if isinstance(norm, nn.LayerNorm | nn.GroupNorm) and norm.weight is not None
    }
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator).add_(1.0 if id(parameter) in scales else 0.0)
    return module.eval()


def small_enat(seed: int = 0, std: float = 0.2, **overrides: Any) -> ENAT:
    """Width 32 and std 0.2 keep activations near 1, so that attention, adaLN and the logits are all far from uniform."""
    model = randomize(ENAT(small_config(**overrides)), seed, std)
    if model.config.text_width is not None:
        empty = captions(model.config, 1, seed=999)
        model.set_null_caption(empty.hidden[0], empty.pooled[0])
    return model


# A text-conditional small model: small_enat(**TEXT).
TEXT: dict[str, Any] = {"text_width": 12, "num_text_tokens": 3, "num_classes": 0}


def captions(config: ENATConfig, num_images: int, seed: int = 0) -> TextCondition:
    """Random caption features float32, hidden (B, T, W) and pooled (B, W)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((num_images, config.num_text_tokens, config.text_width), generator=generator)
    return TextCondition(hidden, torch.randn((num_images, config.text_width), generator=generator))


def conditions(model: ENAT, num_images: int = 3) -> Tensor | TextCondition:
    """Different captions or labels; the last is the null one. For an unconditional model all are."""
    if model.config.text_width is None:
        labels = torch.arange(num_images).clamp_max(model.config.null_label)
        labels[-1] = model.config.null_label
        return labels
    is_last = torch.arange(num_images) == num_images - 1
    return model.drop_condition(captions(model.config, num_images), is_last)


def small_vqgan(seed: int = 0, **overrides: Any) -> VQGAN:
    """16 px to a 4 x 4 grid."""
    sizes = {"base_channels": 32, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "latent_dim": 8, "codebook_size": 24}
    return randomize(VQGAN(VQGANConfig(**{**sizes, "resolution": 16, **overrides})), seed)


def nested_tokens(config: ENATConfig, num_masked: list[int], num_images: int = 3, seed: int = 0) -> list[Tensor]:
    """Random codes with num_masked[k] mask ids a row at step k, other positions in every row; visible tokens stay visible."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (num_images, config.num_tokens), generator=generator)
    rank = torch.rand(codes.shape, generator=generator).argsort(dim=1)
    return [codes.masked_fill(rank < count, config.mask_id) for count in num_masked]


def pairwise_cases(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A few combinations in which any two values of two factors occur together."""
    places = [range(len(values)) for values in factors]
    missing = {((i, a), (j, b)) for i, j in combinations(range(len(factors)), 2) for a in places[i] for b in places[j]}
    cases = []
    while missing:
        row = dict(min(missing))
        for factor in sorted(set(range(len(factors))) - set(row)):
            row[factor] = max(
                places[factor], key=lambda value: sum(tuple(sorted(((factor, value), pair))) in missing for pair in row.items())
            )
        missing -= set(combinations(sorted(row.items()), 2))
        cases.append(tuple(factors[factor][row[factor]] for factor in range(len(factors))))
    return cases


# Variants of a model, as overrides of small_config: attention, reuse, condition, layers.
ARCHITECTURES: tuple[list[dict[str, Any]], ...] = (
    [{"decoder_attention": kind} for kind in DECODER_ATTENTIONS],
    [{}, {"reused_features": "masked"}, {"reused_features": "all"}, {"reuse": False}],
    [{}, TEXT, {"num_classes": 0}],
    [{}, {"qk_norm": True}, {"encoder_layers": 0, "decoder_layers": 4}],
)


def golden(name: str) -> dict[str, Any]:
    """The arrays of one golden file as tensors, `meta` as a dict."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return {**tensors, "meta": json.loads(arrays["meta"].tobytes())}


def published_weights(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}


def golden_enat_config(arrays: dict[str, Any]) -> ENATConfig:
    names = ("encoder_layers", "decoder_layers", "embed_dim", "num_heads", "codebook_size", "num_classes")
    return ENATConfig(grid_size=arrays["meta"]["grid"], **{name: arrays["meta"][name] for name in names})


def golden_vqgan_config(arrays: dict[str, Any]) -> VQGANConfig:
    meta = arrays["meta"]
    return VQGANConfig(
        base_channels=meta["ch"],
        channel_multipliers=meta["ch_mult"],
        num_res_blocks=meta["num_res_blocks"],
        latent_dim=meta["z_channels"],
        codebook_size=meta["codebook_size"],
        resolution=meta["resolution"],
    )


def golden_enat(arrays: dict[str, Any]) -> ENAT:
    return load_published_enat(published_weights(arrays), golden_enat_config(arrays))


def golden_vqgan(arrays: dict[str, Any]) -> VQGAN:
    return load_published_vqgan(published_weights(arrays), golden_vqgan_config(arrays))
