"""The obvious, slow way: what enat/ computes, written from the description, one image and one position at a time.

Weights are those of the fast modules; nothing else of them is used. No batching, no index arithmetic, no fused kernels.
Shape legend: L tokens, D width, V codebook size, S own tokens of a block, C conditioning tokens, N steps, T text tokens,
W width of caption features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from enat.blocks import Block, PreviousProjection
from enat.model import ENAT, TextCondition


@dataclass
class Caption:
    """hidden (T, W), pooled (W,) of one caption."""

    hidden: Tensor
    pooled: Tensor


@dataclass
class PlainOutput:
    """logits (L, V), features (L, D), mask bool (L,) of one image."""

    logits: Tensor
    features: Tensor
    mask: Tensor


def rows(condition: Tensor | TextCondition) -> list[int] | list[Caption]:
    """Labels (B,) or captions, one by one."""
    if isinstance(condition, Tensor):
        return condition.tolist()
    return [Caption(hidden, pooled) for hidden, pooled in zip(condition.hidden, condition.pooled, strict=True)]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.t() + layer.bias


def normalize(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def layer_norm(norm: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    return normalize(x, eps) * norm.weight + norm.bias


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def normalize_heads(norm: nn.LayerNorm, x: Tensor, num_heads: int) -> Tensor:
    """LayerNorm of every head of x (S, D) by itself."""
    return torch.cat([layer_norm(norm, part, 1e-6) for part in x.chunk(num_heads, dim=1)], dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D / heads)) v for query (S, D), key and value (C, D); zeros without keys."""
    width = query.shape[1] // num_heads
    gathered = torch.zeros_like(query)
    if len(key) == 0:
        return gathered
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.exp(query[:, part] @ key[:, part].t() / math.sqrt(width))
        gathered[:, part] = weights / weights.sum(dim=1, keepdim=True) @ value[:, part]
    return gathered


def block(weights: Block, x: Tensor, conditioning: Tensor | None, condition: Tensor, num_heads: int, attends_self: bool) -> Tensor:
    """One adaLN-Zero block on x (S, D); conditioning (C, D) or None for a block that has none; condition (D,) after SiLU."""
    numbers = linear(weights.modulation, condition)
    if conditioning is None:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = numbers.split(x.shape[1])
    else:
        shift, scale, shift_cond, scale_cond, gate, shift_mlp, scale_mlp, gate_mlp = numbers.split(x.shape[1])
    own = normalize(x, 1e-6) * (1 + scale) + shift
    keys, values = [], []
    if conditioning is not None:
        modulated = normalize(conditioning, 1e-6) * (1 + scale_cond) + shift_cond
        key, value = linear(weights.attention.key_value_conditioning, modulated).split(x.shape[1], dim=1)
        keys.append(key)
        values.append(value)
    if attends_self:
        key, value = linear(weights.attention.key_value_own, own).split(x.shape[1], dim=1)
        keys.append(key)
        values.append(value)
    query, key = linear(weights.attention.query, own), torch.cat(keys)
    if weights.attention.query_norm is not None:
        query = normalize_heads(weights.attention.query_norm, query, num_heads)
        key = normalize_heads(weights.attention.key_norm, key, num_heads)
    gathered = attend(query, key, torch.cat(values), num_heads)
    x = x + gate * linear(weights.attention.project, gathered)
    hidden = linear(weights.mlp.fc1, normalize(x, 1e-6) * (1 + scale_mlp) + shift_mlp)
    return x + gate_mlp * linear(weights.mlp.fc2, gelu_tanh(hidden))


def carry(projection: PreviousProjection, features: Tensor) -> Tensor:
    """The MLP that carries features (D,) of one position over to the next step."""
    return linear(projection.mlp.fc2, gelu_tanh(linear(projection.mlp.fc1, layer_norm(projection.norm, features, 1e-6))))


@torch.no_grad()
def forward(model: ENAT, tokens: Tensor, label: int | Caption, previous: PlainOutput | None = None) -> PlainOutput:
    """ENAT in eval mode on one image: tokens int64 (L,), and what this function returned for the step before."""
    config = model.config
    mask = tokens == config.codebook_size
    has_old = config.reuse and config.reused_features in ("visible", "all")
    old = ~previous.mask if previous is not None and has_old else torch.zeros_like(mask)
    new = ~mask & ~old

    if config.text_width is None:
        embedding, text = model.label_embedding.weight[label], torch.zeros(0, config.embed_dim)
    else:
        embedding, text = linear(model.pooled_projection, label.pooled), linear(model.text_projection, label.hidden)
    condition = embedding * torch.sigmoid(embedding)

    features = model.token_embedding.weight[tokens] + model.position_embedding.weight
    features = layer_norm(model.embedding_norm, features, 1e-6)
    if previous is not None and config.reused_features in ("masked", "all"):
        for position in range(len(tokens)):
            if previous.mask[position]:
                features[position] = features[position] + carry(model.masked_projection, previous.features[position])
    if previous is not None and has_old:
        for position in range(len(tokens)):
            if old[position]:
                features[position] = previous.features[position] + carry(model.previous_projection, previous.features[position])
    for weights in model.encoder:
        conditioning = torch.cat([text, features[old]]) if has_old or config.text_width is not None else None
        features[new] = block(weights, features[new], conditioning, condition, config.num_heads, attends_self=True)

    visible = features[~mask].clone()
    everything = features.clone()  # "full": visible tokens change inside the decoder only
    for weights in model.decoder:
        if config.decoder_attention == "full":
            conditioning = text if config.text_width is not None else None
            everything = block(weights, everything, conditioning, condition, config.num_heads, attends_self=True)
            features[mask] = everything[mask]
        else:
            attends_self = config.decoder_attention == "self_cross"
            conditioning = torch.cat([text, visible])
            features[mask] = block(weights, features[mask], conditioning, condition, config.num_heads, attends_self)

    head = model.head
    hidden = layer_norm(head.norm_out, gelu_exact(linear(head.dense, layer_norm(head.norm_in, features, 1e-5))), 1e-5)
    logits = hidden @ model.token_embedding.weight.t() + head.bias
    return PlainOutput(logits[:, : config.codebook_size], features, mask)


def smoothed_cross_entropy(logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float, z_loss: float = 0.0) -> float:
    """Mean over masked positions of -log p, smoothed towards uniform, plus z_loss (log sum exp)^2.

    logits (B, L, V), codes and mask (B, L).
    """
    terms = []
    for image in range(len(codes)):
        for position in range(codes.shape[1]):
            if mask[image, position]:
                log_probs = logits[image, position].double().log_softmax(dim=-1)
                hit = -log_probs[codes[image, position]].item()
                smoothed = (1 - label_smoothing) * hit - label_smoothing * log_probs.mean().item()
                terms.append(smoothed + z_loss * math.log(logits[image, position].double().exp().sum().item()) ** 2)
    return sum(terms) / len(terms)


def quantize(latents: Tensor, codebook: Tensor) -> Tensor:
    """float (B, Z, h, w) -> int64 (B, h, w): every squared distance, position by position."""
    batch, _, height, width = latents.shape
    codes = torch.zeros(batch, height, width, dtype=torch.int64)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                distances = (codebook - latents[image, :, row, column]).square().sum(dim=1)
                codes[image, row, column] = distances.argmin()
    return codes


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, from float64 features (B, F) of both sides, with scipy's matrix square root."""
    mean1, mean2 = first.mean(axis=0), second.mean(axis=0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(root)))
