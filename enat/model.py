"""ENAT: a non-autoregressive transformer that spends its computation where tokens change.

Read top-down beside the paper (EfficientNAT, NeurIPS 2024, arXiv 2411.06959): configuration, adaLN, attention, block,
network, forward. An encoder sees visible tokens only; a shallow decoder lets the mask tokens gather information from
themselves and from the encoded visible tokens (self-cross attention, sec. 4.1); features of tokens that were visible at the
step before are projected and reused instead of being computed again (sec. 4.2).

Shape legend: B batch, L = grid_size**2 tokens, D width, V codebook size, M masked tokens (equal in every row of a batch),
S tokens of one block, C conditioning tokens of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

DECODER_ATTENTIONS = ("self_cross", "cross", "full")

# Table 1 of the paper gives width and depth; the encoder + decoder splits follow from its FLOPs.
_PRESETS: dict[str, dict[str, int]] = {
    "enat-s": {"encoder_layers": 15, "decoder_layers": 1, "embed_dim": 512, "num_heads": 8},
    "enat-b": {"encoder_layers": 15, "decoder_layers": 1, "embed_dim": 768, "num_heads": 12},
    "enat-l": {"encoder_layers": 22, "decoder_layers": 2, "embed_dim": 1024, "num_heads": 16},
    "enat-xl": {"encoder_layers": 26, "decoder_layers": 2, "embed_dim": 1280, "num_heads": 16},
}


@dataclass(frozen=True, kw_only=True)
class ENATConfig:
    """Architecture of an ENAT. Everything that decides the shape of its weights stands here.

    decoder_attention: who attends to whom in the decoder, [queries] <- [keys]:
        "self_cross"  [M] <- [M] and [V]: the paper's proposal
        "cross"       [M] <- [V]: CrossMAE type
        "full"        [M] and [V] <- [M] and [V]: MAE type
    reuse: whether features of the step before may be reused (paper sec. 4.2). Without it `previous` is refused.
    dropout: applied to the embedded tokens in training, a probability in [0, 1).
    """

    encoder_layers: int
    decoder_layers: int
    embed_dim: int
    num_heads: int
    grid_size: int = 16
    codebook_size: int = 1024
    num_classes: int = 1000
    decoder_attention: str = "self_cross"
    reuse: bool = True
    dropout: float = 0.1
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.decoder_attention not in DECODER_ATTENTIONS:
            raise ValueError(f"decoder_attention is {self.decoder_attention!r}; choose one of {', '.join(DECODER_ATTENTIONS)}")
        for name in ("embed_dim", "num_heads", "grid_size", "codebook_size", "num_classes", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.encoder_layers < 0 or self.decoder_layers < 1:
            raise ValueError(f"{self.encoder_layers} encoder and {self.decoder_layers} decoder layers; at least 0 and 1 are needed")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @classmethod
    def preset(cls, name: str, grid_size: int = 16, **overrides: Any) -> ENATConfig:
        """A published size: "enat-s", "enat-b", "enat-l" or "enat-xl". Raises ValueError for any other name."""
        if name not in _PRESETS:
            raise ValueError(f"no ENAT preset is called {name!r}; choose one of {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], "grid_size": grid_size, **overrides})

    @property
    def num_tokens(self) -> int:
        """L, tokens of one image."""
        return self.grid_size**2

    @property
    def mask_id(self) -> int:
        """The token that stands for "masked"."""
        return self.codebook_size

    @property
    def null_label(self) -> int:
        """The label that stands for "no class", used for guidance."""
        return self.num_classes


@dataclass(frozen=True)
class ENATOutput:
    """What one step computes, and what the next step may reuse.

    logits: (B, L, V); with logits="masked" only the masked positions, (B, M, V) in the order of `masked_index`.
    features: (B, L, D) before the final norm: encoder features where visible, decoder features where masked.
    mask: bool (B, L), True = masked.   masked_index: int64 (B, M), ascending positions.   num_masked: M.
    """

    logits: Tensor
    features: Tensor
    mask: Tensor
    masked_index: Tensor
    num_masked: int


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, L, D) at index (B, S) -> (B, S, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


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

    def __init__(self, dim: int, num_heads: int, *, attends_self: bool, has_conditioning: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value_conditioning = nn.Linear(dim, 2 * dim) if has_conditioning else None
        self.key_value_own = nn.Linear(dim, 2 * dim) if attends_self else None
        self.project = nn.Linear(dim, dim)

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
        self.attention = Attention(dim, config.num_heads, attends_self=attends_self, has_conditioning=has_conditioning)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.modulation = nn.Linear(dim, (8 if has_conditioning else 6) * dim)

    def forward(self, x: Tensor, conditioning: Tensor | None, label_embedding: Tensor) -> Tensor:
        """x (B, S, D), conditioning (B, C, D) or None, label_embedding (B, D) after SiLU -> (B, S, D)."""
        chunks = list(self.modulation(label_embedding).chunk(8 if self.has_conditioning else 6, dim=-1))
        shift, scale = chunks[:2]
        gate, shift_mlp, scale_mlp, gate_mlp = chunks[-4:]
        if self.has_conditioning and conditioning is not None:
            conditioning = _modulate(self.norm_conditioning(conditioning), chunks[2], chunks[3])
        gathered = self.attention(_modulate(self.norm_own(x), shift, scale), conditioning)
        x = x + gate[:, None] * gathered
        return x + gate_mlp[:, None] * self.mlp(_modulate(self.norm_mlp(x), shift_mlp, scale_mlp))


class PreviousProjection(nn.Module):
    """Carries the features of an earlier step over to this one (paper sec. 4.2)."""

    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = MLP(config.embed_dim, config.mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.mlp(self.norm(features))


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


class ENAT(nn.Module):
    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.token_embedding = nn.Embedding(config.codebook_size + 1, dim)
        self.position_embedding = nn.Embedding(config.num_tokens, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=1e-6)
        self.label_embedding = nn.Embedding(config.num_classes + 1, dim)
        self.previous_projection = PreviousProjection(config) if config.reuse else None
        self.encoder = nn.ModuleList([Block(config, has_conditioning=config.reuse) for _ in range(config.encoder_layers)])
        self.decoder = nn.ModuleList(
            [
                Block(
                    config,
                    attends_self=config.decoder_attention != "cross",
                    has_conditioning=config.decoder_attention != "full",
                )
                for _ in range(config.decoder_layers)
            ]
        )
        self.head = Head(config)

    def initialize(self, generator: torch.Generator) -> ENAT:
        """Published initialisation: Linear xavier-uniform with bias 0, embeddings N(0, 0.02), adaLN 0: blocks start as identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("modulation"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)
        return self

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        previous: ENATOutput | None = None,
        *,
        num_masked: int | None = None,
        logits: Literal["all", "masked"] = "all",
        dropout_generator: torch.Generator | None = None,
    ) -> ENATOutput:
        """Predict codes at every position from the visible ones.

        tokens: int64 (B, L), codes in [0, V) or the mask id V; every row has the same number of masked tokens.
        labels: int64 (B,) in [0, num_classes], num_classes meaning "no class".
        previous: the output of the step before on the same images; its visible tokens must still be visible and unchanged.
        num_masked: M where the caller knows it (sampler and trainer do). Without it the masks are counted and checked, which
            waits for the device and raises ValueError for rows that differ or for a visible token of `previous` masked again.
        logits: "masked" evaluates the head at masked positions only.
        dropout_generator: draws the dropout in training mode; None takes torch's default generator.
        """
        if tokens.shape != (len(labels), self.config.num_tokens):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; ({len(labels)}, {self.config.num_tokens}) is needed")
        mask = tokens == self.config.mask_id
        if previous is not None and self.previous_projection is None:
            raise ValueError("this model was made with reuse=False and takes no features of a previous step")
        if num_masked is None:
            num_masked = _count_masked(mask, previous)
        order, num_old = _split(mask, previous)
        num_visible = tokens.shape[1] - num_masked
        old_index, new_index, masked_index = order[:, :num_old], order[:, num_old:num_visible], order[:, num_visible:]

        embedded = self._embed(tokens, dropout_generator)
        label_embedding = F.silu(self.label_embedding(labels))

        # Encoder: newly visible tokens attend to themselves and to the projected features of the old ones.
        # In training, parts without a token run on empty tensors: every weight then has a gradient in every step, if zero,
        # and workers whose groups drew different modes can reduce the same buffers.
        new = _take(embedded, new_index)
        old = None
        if self.previous_projection is not None and (num_old or self.training):
            old = self.previous_projection(_take(embedded if previous is None else previous.features, old_index))
        if new.shape[1] or self.training:
            for block in self.encoder:
                new = block(new, old, label_embedding)
        visible = torch.cat([old, new], dim=1) if old is not None else new

        # Decoder: mask tokens gather from the visible ones.
        masked = _take(embedded, masked_index)
        if num_masked or self.training:
            masked = self._decode(masked, visible, label_embedding)

        in_order = torch.cat([visible, masked], dim=1)
        position = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        features = _take(in_order, position)
        return ENATOutput(
            logits=self.head(features if logits == "all" else masked, self.token_embedding.weight),
            features=features,
            mask=mask,
            masked_index=masked_index,
            num_masked=num_masked,
        )

    def _embed(self, tokens: Tensor, dropout_generator: torch.Generator | None) -> Tensor:
        embedded = self.embedding_norm(self.token_embedding(tokens) + self.position_embedding.weight)
        if self.training and self.config.dropout:
            keep = 1 - self.config.dropout
            drawn = torch.rand(embedded.shape, generator=dropout_generator, device=embedded.device)
            embedded = embedded * (drawn < keep) / keep
        return embedded

    def _decode(self, masked: Tensor, visible: Tensor, label_embedding: Tensor) -> Tensor:
        if self.config.decoder_attention == "full":
            both = torch.cat([visible, masked], dim=1)
            for block in self.decoder:
                both = block(both, None, label_embedding)
            return both[:, visible.shape[1] :]
        for block in self.decoder:
            masked = block(masked, visible, label_embedding)
        return masked


def _split(mask: Tensor, previous: ENATOutput | None) -> tuple[Tensor, int]:
    """Positions as [visible before ; newly visible ; masked], ascending within each: int64 (B, L); and the number visible before.

    The counts are known to the caller, so slices of this order have fixed sizes and nothing waits for the device.
    """
    if previous is None:
        return mask.to(torch.uint8).argsort(dim=1, stable=True), 0
    group = 2 * mask.to(torch.uint8) + (previous.mask & ~mask).to(torch.uint8)
    return group.argsort(dim=1, stable=True), mask.shape[1] - previous.num_masked


def _count_masked(mask: Tensor, previous: ENATOutput | None) -> int:
    counts = mask.sum(dim=1)
    if counts.numel() == 0:
        raise ValueError("an empty batch has no mask to predict; give at least one image")
    lowest, highest = int(counts.min()), int(counts.max())
    if lowest != highest:
        raise ValueError(f"rows of one batch have {lowest} to {highest} masked tokens; all must have the same number")
    if previous is not None and bool((mask & ~previous.mask).any()):
        raise ValueError("a token that was visible in `previous` is masked now; start again with previous=None")
    return lowest
