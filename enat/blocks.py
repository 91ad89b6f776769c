"""What an ENAT is built of: adaLN, attention, block, the projection of earlier features, the head. model.py puts them together.

Shape legend: B batch, L tokens of an image, D width, V codebook size, S tokens of one block, C conditioning tokens of one block.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from enat.config import ENATConfig


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Queries from the block's own tokens; keys and values from [conditioning tokens ; own tokens].

    The two sources have separate key-value projections, because one carries finished features and the other tokens still
    being computed. attends_self=False leaves only the conditioning tokens (CrossMAE type).
    """

    def __init__(self, config: ENATConfig, *, attends_self: bool, has_conditioning: bool) -> None:
        super().__init__()
        dim, self.num_heads = config.embed_dim, config.num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value_conditioning = nn.Linear(dim, 2 * dim) if has_conditioning else None
        self.key_value_own = nn.Linear(dim, 2 * dim) if attends_self else None
        self.project = nn.Linear(dim, dim)
        self.query_norm = nn.LayerNorm(dim // self.num_heads, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.LayerNorm(dim // self.num_heads, eps=1e-6) if config.qk_norm else None

    def forward(self, x: Tensor, conditioning: Tensor | None) -> Tensor:
        sources = []
        if self.key_value_conditioning is not None and conditioning is not None:
            sources.append(self.key_value_conditioning(conditioning))
        if self.key_value_own is not None:
            sources.append(self.key_value_own(x))
        key_value = torch.cat(sources, dim=1) if len(sources) > 1 else sources[0]
        if not key_value.shape[1]:  # cross attention at the first step: nothing is visible yet, so nothing is gathered
            return self.project(torch.zeros_like(x))
        key, value = rearrange(key_value, "b s (two h d) -> two b h s d", two=2, h=self.num_heads)
        query = rearrange(self.query(x), "b s (h d) -> b h s d", h=self.num_heads)
        if (
            self.query_norm is not None and self.key_norm is not None
        ):  # autocast norms in float32, which attention would have to follow
            query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        gathered = F.scaled_dot_product_attention(query, key, value)
        return self.project(rearrange(gathered, "b h s d -> b s (h d)"))


class Block(nn.Module):
    """adaLN-Zero transformer block whose attention may see conditioning tokens beside its own."""

    def __init__(self, config: ENATConfig, *, attends_self: bool = True, has_conditioning: bool = True) -> None:
        super().__init__()
        dim = config.embed_dim
        self.has_conditioning = has_conditioning
        self.norm_own = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm_conditioning = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config, attends_self=attends_self, has_conditioning=has_conditioning)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.modulation = nn.Linear(dim, (8 if has_conditioning else 6) * dim)

    def forward(self, x: Tensor, conditioning: Tensor | None, condition: Tensor) -> Tensor:
        """x (B, S, D), conditioning (B, C, D) or None, condition (B, D), of label or caption, after SiLU -> (B, S, D)."""
        chunks = list(self.modulation(condition).chunk(8 if self.has_conditioning else 6, dim=-1))
        shift, scale = chunks[:2]
        gate, shift_mlp, scale_mlp, gate_mlp = chunks[-4:]
        if self.has_conditioning and conditioning is not None:
            conditioning = _modulate(self.norm_conditioning(conditioning), chunks[2], chunks[3])
        gathered = self.attention(_modulate(self.norm_own(x), shift, scale), conditioning)
        x = x + gate[:, None] * gathered
        return x + gate_mlp[:, None] * self.mlp(_modulate(self.norm_mlp(x), shift_mlp, scale_mlp))


class PreviousProjection(nn.Module):
    """Carries features of an earlier step over to this one (paper sec. 4.2).

    Visible tokens keep their features and the MLP is a residual. Masked positions (see ENATConfig.reused_features) have an
    embedding of this step, to which the MLP's output alone is added.
    """

    def __init__(self, config: ENATConfig, *, is_residual: bool) -> None:
        super().__init__()
        self.is_residual = is_residual
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = MLP(config.embed_dim, config.mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.mlp(self.norm(features))
        return features + projected if self.is_residual else projected


class Head(nn.Module):
    """Logits over the codebook from the transposed token embedding, which gets no gradient from here."""

    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.norm_in = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.norm_out = nn.LayerNorm(config.embed_dim, eps=1e-5)
        # One entry is for the mask id and never used: it keeps the published shape.
        self.bias = nn.Parameter(torch.zeros(config.codebook_size + 1))

    def forward(self, features: Tensor, token_embedding: Tensor) -> Tensor:
        hidden = self.norm_out(F.gelu(self.dense(self.norm_in(features))))
        return F.linear(hidden, token_embedding.detach()[: self.codebook_size], self.bias[: self.codebook_size])
