"""Parts of an ENAT: adaLN, attention, block, the projection of earlier features, the head. model.py assembles them.

Shape legend: B batch, L tokens of an image, D width, V codebook size, S tokens of one block, C conditioning tokens of one block,
K tokens whose keys and values a block attends to.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from enat.config import ENATConfig


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = LinearGELU(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


FUSED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # absent where torch is built without oneDNN
if FUSED_LINEAR is not None:

    @register_flop_formula(FUSED_LINEAR)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
        """For FlopCounterMode, which otherwise does not know this product."""
        return 2 * x_shape.numel() * weight_shape[0]


class LinearGELU(nn.Linear):
    """A linear layer and a GELU in its tanh form. On CPUs, in float32 and without gradients, oneDNN computes both at once: torch's
    own GELU takes nearly as long as the product. torch.compile fuses by itself."""

    def forward(self, input: Tensor) -> Tensor:
        if FUSED_LINEAR is not None and _can_be_fused(input):
            return FUSED_LINEAR(input, self.weight, self.bias, "gelu", [], "tanh")
        return F.gelu(super().forward(input), approximate="tanh")


def _can_be_fused(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class Attention(nn.Module):
    """Queries from the block's own tokens; keys and values from [conditioning tokens ; own tokens].

    The two sources have separate key-value projections, because one holds finished features and the other tokens that are still
    being computed. attends_self=False leaves only the conditioning tokens (CrossMAE).
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

    def key_value(self, x: Float[Tensor, "B S D"], conditioning: Float[Tensor, "B C D"] | None) -> Float[Tensor, "B K 2*D"]:
        """Keys and values of all tokens that are attended to."""
        sources = []
        if self.key_value_conditioning is not None and conditioning is not None:
            sources.append(self.key_value_conditioning(conditioning))
        if self.key_value_own is not None:
            sources.append(self.key_value_own(x))
        return torch.cat(sources, dim=1) if len(sources) > 1 else sources[0]

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        conditioning: Float[Tensor, "B C D"] | None,
        key_value: Float[Tensor, "B K 2*D"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """`key_value`: from self.key_value, where they are known already."""
        if key_value is None:
            key_value = self.key_value(x, conditioning)
        if not key_value.shape[1]:  # cross attention at the first step: nothing is visible yet
            return self.project(torch.zeros_like(x))
        key, value = rearrange(key_value, "b s (two h d) -> two b h s d", two=2, h=self.num_heads)
        query = rearrange(self.query(x), "b s (h d) -> b h s d", h=self.num_heads)
        if self.query_norm is not None and self.key_norm is not None:
            # autocast computes norms in float32; attention must not follow.
            query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        gathered = F.scaled_dot_product_attention(query, key, value)
        return self.project(rearrange(gathered, "b h s d -> b s (h d)"))


class Block(nn.Module):
    """adaLN-Zero transformer block whose attention can see conditioning tokens in addition to its own."""

    def __init__(self, config: ENATConfig, *, attends_self: bool = True, has_conditioning: bool = True) -> None:
        super().__init__()
        dim = config.embed_dim
        self.has_conditioning = has_conditioning
        self.norm_own = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config, attends_self=attends_self, has_conditioning=has_conditioning)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.modulation = nn.Linear(dim, (8 if has_conditioning else 6) * dim)

    def key_value(
        self, x: Float[Tensor, "B S D"], conditioning: Float[Tensor, "B C D"] | None, modulation: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B K 2*D"]:
        """Keys and values of this block, [conditioning ; x], to be kept. The same arguments as of forward."""
        chunks = modulation.chunk(8 if self.has_conditioning else 6, dim=-1)
        if self.has_conditioning and conditioning is not None:
            conditioning = _modulate(conditioning, chunks[2], chunks[3])
        return self.attention.key_value(_modulate(self.norm_own(x), *chunks[:2]), conditioning)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        conditioning: Float[Tensor, "B C D"] | None,
        modulation: Float[Tensor, "B N"],
        key_value: Float[Tensor, "B K 2*D"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """`conditioning`: normalized, once for all blocks that see it.

        `modulation`: of the embedding of label or caption after SiLU, from self.modulation. N is 8 D with conditioning, else 6 D.
        `key_value`: of all tokens that are attended to, in place of those of conditioning and x.
        """
        chunks = modulation.chunk(8 if self.has_conditioning else 6, dim=-1)
        shift, scale = chunks[:2]
        gate, shift_mlp, scale_mlp, gate_mlp = chunks[-4:]
        if self.has_conditioning and conditioning is not None:
            conditioning = _modulate(conditioning, chunks[2], chunks[3])
        gathered = self.attention(_modulate(self.norm_own(x), shift, scale), conditioning, key_value)
        x = torch.addcmul(x, gate[:, None], gathered)
        return torch.addcmul(x, gate_mlp[:, None], self.mlp(_modulate(self.norm_mlp(x), shift_mlp, scale_mlp)))


class PreviousProjection(nn.Module):
    """Projects features of an earlier step for use in this one (paper sec. 4.2).

    For visible tokens the MLP is a residual on their features. Masked positions (see ENATConfig.reused_features) have an embedding
    of this step, to which only the output of the MLP is added.
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
    """Logits over the codebook from the transposed token embedding, detached: the head sends no gradient to it."""

    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.norm_in = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.norm_out = nn.LayerNorm(config.embed_dim, eps=1e-5)
        # The last entry belongs to the mask id and is never used; it keeps the published shape.
        self.bias = nn.Parameter(torch.zeros(config.codebook_size + 1))

    def forward(self, features: Float[Tensor, "B P D"], token_embedding: Float[Tensor, "V+1 D"]) -> Float[Tensor, "B P V"]:
        hidden = self.norm_out(F.gelu(self.dense(self.norm_in(features))))
        return F.linear(hidden, token_embedding.detach()[: self.codebook_size], self.bias[: self.codebook_size])
