"""ENAT: a non-autoregressive transformer that spends its computation where tokens change.

Read top-down beside the paper (EfficientNAT, NeurIPS 2024, arXiv 2411.06959): condition, network, forward, then its parts one after
the other; configuration and blocks stand in enat/config.py and enat/blocks.py. An encoder sees visible tokens only; a shallow
decoder lets the mask tokens gather information from themselves and from the encoded visible tokens (self-cross attention,
sec. 4.1); features of tokens that were visible at the step before are projected and reused instead of being computed again
(sec. 4.2).

Shape legend: B batch, L = grid_size**2 tokens, D width, V codebook size, M masked tokens (equal in every row of a
batch), T text tokens, W width of caption features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enat.blocks import Block, Head, PreviousProjection
from enat.config import DECODER_ATTENTIONS, REUSED_FEATURES, ENATConfig

__all__ = ["DECODER_ATTENTIONS", "ENAT", "REUSED_FEATURES", "ENATConfig", "ENATOutput", "TextCondition", "draw_dropout_mask"]


@dataclass(frozen=True)
class TextCondition:
    """Captions as a model sees them: hidden (B, T, W), a feature of every text token; pooled (B, W), one of the whole caption.

    Any floating dtype: the model computes in that of its weights. Length, slices and devices are as of a tensor of labels.
    """

    hidden: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> TextCondition:
        return TextCondition(self.hidden[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> TextCondition:
        return TextCondition(self.hidden.to(device), self.pooled.to(device))


@dataclass(frozen=True)
class ENATOutput:
    """What one step computes, and what the next step may reuse.

    logits: (B, L, V); with logits="masked" those of masked positions, (B, M, V) as in `masked_index`; with "none" (B, 0, V).
    features: (B, L, D) before the final norm: encoder features where visible, decoder features where masked. Text has none.
    mask: bool (B, L), True = masked.   masked_index: int64 (B, M), ascending positions.   num_masked: M.
    """

    logits: Tensor
    features: Tensor
    mask: Tensor
    masked_index: Tensor
    num_masked: int


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, L, D) at index (B, S) -> (B, S, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


class ENAT(nn.Module):
    """activation_checkpointing, an attribute: in training, blocks keep their inputs only and run again for the backward pass."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        dim, has_text = config.embed_dim, config.text_width is not None
        self.token_embedding = nn.Embedding(config.codebook_size + 1, dim)
        self.position_embedding = nn.Embedding(config.num_tokens, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=1e-6)
        self.label_embedding = nn.Embedding(config.num_classes + 1, dim) if not has_text else None
        self.text_projection = nn.Linear(config.text_width, dim) if config.text_width is not None else None
        self.pooled_projection = nn.Linear(config.text_width, dim) if config.text_width is not None else None
        if config.text_width is not None:  # the empty caption: zeros until set_null_caption
            self.register_buffer("null_hidden", torch.zeros(config.num_text_tokens, config.text_width))
            self.register_buffer("null_pooled", torch.zeros(config.text_width))
        self.previous_projection = PreviousProjection(config, is_residual=True) if config.reuses_visible else None
        self.masked_projection = PreviousProjection(config, is_residual=False) if config.reuses_masked else None
        self.encoder = nn.ModuleList(
            [Block(config, has_conditioning=config.reuses_visible or has_text) for _ in range(config.encoder_layers)]
        )
        self.decoder = nn.ModuleList(
            [
                Block(
                    config,
                    attends_self=config.decoder_attention != "cross",
                    has_conditioning=config.decoder_attention != "full" or has_text,
                )
                for _ in range(config.decoder_layers)
            ]
        )
        self.head = Head(config)

    def initialize(self, generator: torch.Generator) -> ENAT:
        """Published initialisation: Linear xavier-uniform with bias 0, embeddings N(0, 0.02), adaLN 0: blocks start as identity.

        The projection of masked positions starts at 0, so that training starts as if nothing of them were reused.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("modulation") or name == "masked_projection.mlp.fc2":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)
        return self

    def compile_blocks(self) -> None:
        """Compile every block with torch.compile, in place. Sizes stay dynamic: the number of masked tokens changes often."""
        for block in (*self.encoder, *self.decoder):
            block.compile(dynamic=True)

    def set_null_caption(self, hidden: Tensor, pooled: Tensor) -> None:
        """Keep the features of the empty caption, hidden (T, W) and pooled (W,), as buffers that are saved with the weights."""
        self.check_condition(TextCondition(hidden[None], pooled[None]))
        self.null_hidden.copy_(hidden)
        self.null_pooled.copy_(pooled)

    def null_condition(self, num_images: int) -> Tensor | TextCondition:
        """The condition that says nothing, on the model's device: null labels int64 (B,), or the empty caption."""
        if self.config.text_width is None:
            device = self.token_embedding.weight.device
            return torch.full((num_images,), self.config.null_label, dtype=torch.int64, device=device)
        return TextCondition(self.null_hidden.expand(num_images, -1, -1), self.null_pooled.expand(num_images, -1))

    def drop_condition(self, condition: Tensor | TextCondition, is_dropped: Tensor) -> Tensor | TextCondition:
        """The condition with the null label or the empty caption where is_dropped, bool (B,)."""
        self.check_condition(condition)
        if not isinstance(condition, TextCondition):
            return condition.masked_fill(is_dropped, self.config.null_label)
        return TextCondition(
            torch.where(is_dropped[:, None, None], self.null_hidden, condition.hidden),
            torch.where(is_dropped[:, None], self.null_pooled, condition.pooled),
        )

    def check_condition(self, condition: Tensor | TextCondition) -> None:
        """Raises ValueError for a condition of another kind or shape than the model's. Values are not looked at."""
        num_text_tokens, width = self.config.num_text_tokens, self.config.text_width
        if width is None:
            if isinstance(condition, TextCondition):
                raise ValueError("this model knows no text: it takes labels, not a TextCondition")
            if condition.ndim != 1:
                raise ValueError(f"labels have shape {tuple(condition.shape)}; one label per image, (B,), is needed")
        elif not isinstance(condition, TextCondition):
            raise ValueError("this model is conditioned on text: it takes a TextCondition, not labels")
        elif condition.hidden.shape[1:] != (num_text_tokens, width) or condition.pooled.shape != (len(condition), width):
            shapes = f"{tuple(condition.hidden.shape)} and {tuple(condition.pooled.shape)}"
            raise ValueError(f"caption features have shapes {shapes}; (B, {num_text_tokens}, {width}) and (B, {width}) are needed")

    def compile_blocks(self) -> None:
        """Compile every block in place, with dynamic shapes: the number of masked tokens varies."""
        for block in (*self.encoder, *self.decoder):
            block.compile(dynamic=True)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | TextCondition,
        previous: ENATOutput | None = None,
        *,
        num_masked: int | None = None,
        logits: Literal["all", "masked", "none"] = "all",
        dropout_mask: Tensor | None = None,
    ) -> ENATOutput:
        """Predict codes at every position from the visible ones.

        tokens: int64 (B, L), codes in [0, V) or the mask id V; every row has the same number of masked tokens.
        labels: int64 (B,) in [0, num_classes], num_classes meaning "no class"; a TextCondition for a model with text.
        previous: the output of the step before on the same images; its visible tokens must still be visible and unchanged.
        num_masked: M where the caller knows it (sampler and trainer do). Without it the masks are counted and checked, which
            waits for the device and raises ValueError for rows that differ or for a visible token of `previous` masked again.
        logits: "masked" evaluates the head at masked positions only. "none" computes only what the next step reuses: no head, and
            where that is the visible tokens no decoder; masked positions then hold their embedding.
        dropout_mask: bool (B, L, D), True = kept, of draw_dropout_mask; used in training mode with dropout only. None draws it
            from torch's default generator.
        """
        self._check(tokens, labels, previous)
        mask = tokens == self.config.mask_id
        if num_masked is None:
            num_masked = _count_masked(mask, previous)
        order, num_visible_before = _split(mask, previous)
        num_visible = tokens.shape[1] - num_masked

        # In training, parts without a token run on empty tensors: every weight then has a gradient in every step, if zero,
        # and workers whose groups drew different modes can reduce the same buffers.
        condition, text = self._embed_condition(labels)
        old, computed = self._reuse(self._embed(tokens, dropout_mask), order, num_visible_before, previous)
        new, masked = computed.tensor_split([computed.shape[1] - num_masked], dim=1)
        visible = self._encode(new, old, text, condition)
        if (num_masked and (logits != "none" or self.config.reuses_masked)) or self.training:
            masked = self._decode(masked, visible, text, condition)

        in_order = torch.cat([visible, masked], dim=1)
        position = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        features = _take(in_order, position)
        scored = {"all": features, "masked": masked, "none": masked[:, :0]}[logits]
        return ENATOutput(self.head(scored, self.token_embedding.weight), features, mask, order[:, num_visible:], num_masked)

    def _check(self, tokens: Tensor, labels: Tensor | TextCondition, previous: ENATOutput | None) -> None:
        self.check_condition(labels)
        if tokens.shape != (len(labels), self.config.num_tokens):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; ({len(labels)}, {self.config.num_tokens}) is needed")
        if previous is not None and not self.config.reuse:
            raise ValueError("this model was made with reuse=False and takes no features of a previous step")

    def _embed(self, tokens: Tensor, dropout_mask: Tensor | None) -> Tensor:
        # Every weight is used through a call of its module: ZeRO-3 gathers partitioned weights when a module is called.
        position = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.embedding_norm(self.token_embedding(tokens) + self.position_embedding(position))
        if self.training and self.config.dropout:
            if dropout_mask is None:
                dropout_mask = draw_dropout_mask(self.config, len(tokens), None, embedded.device)
            if dropout_mask is None or dropout_mask.shape != embedded.shape:
                raise ValueError(f"dropout_mask does not have the shape of the embedded tokens, {tuple(embedded.shape)}")
            embedded = embedded * dropout_mask / (1 - self.config.dropout)
        return embedded

    def _embed_condition(self, labels: Tensor | TextCondition) -> tuple[Tensor, Tensor | None]:
        """What drives adaLN, (B, D) after SiLU, and the text as conditioning tokens (B, T, D), None without text."""
        if isinstance(labels, TextCondition):
            assert self.text_projection is not None and self.pooled_projection is not None
            dtype = self.text_projection.weight.dtype
            return F.silu(self.pooled_projection(labels.pooled.to(dtype))), self.text_projection(labels.hidden.to(dtype))
        assert self.label_embedding is not None
        return F.silu(self.label_embedding(labels)), None

    def _reuse(
        self, embedded: Tensor, order: Tensor, num_visible_before: int, previous: ENATOutput | None
    ) -> tuple[Tensor | None, Tensor]:
        """Features of old tokens, projected, None where there are none; and the other tokens in the order of _split, as they are
        to be computed. Old are tokens visible before, in a model that reuses those (paper sec. 4.2)."""
        num_old = num_visible_before if self.config.reuses_visible else 0
        # A teacher may compute in another precision than the model it teaches.
        before = embedded if previous is None else previous.features.to(embedded.dtype)
        old, computed = None, _take(embedded, order[:, num_old:])
        if self.masked_projection is not None and (previous is not None or self.training):
            carried_index = order[:, num_visible_before if previous is not None else order.shape[1] :]
            carried = self.masked_projection(_take(before, carried_index))
            others, masked_before = computed.tensor_split([computed.shape[1] - carried.shape[1]], dim=1)
            computed = torch.cat([others, masked_before + carried], dim=1)
        if self.previous_projection is not None and (num_old or self.training):
            old = self.previous_projection(_take(before, order[:, :num_old]))
        return old, computed

    def _encode(self, new: Tensor, old: Tensor | None, text: Tensor | None, condition: Tensor) -> Tensor:
        """Newly visible tokens attend to themselves, to the text and to the projected features of old ones -> all visible ones."""
        if new.shape[1] or self.training:
            conditioning = _join(text, old)
            for block in self.encoder:
                new = self._run(block, new, conditioning, condition)
        return torch.cat([old, new], dim=1) if old is not None else new

    def _decode(self, masked: Tensor, visible: Tensor, text: Tensor | None, condition: Tensor) -> Tensor:
        """Mask tokens gather from themselves, from the text and from the visible ones, as far as decoder_attention has it."""
        if self.config.decoder_attention == "full":
            both = torch.cat([visible, masked], dim=1)
            for block in self.decoder:
                both = self._run(block, both, text, condition)
            return both[:, visible.shape[1] :]
        conditioning = _join(text, visible)
        for block in self.decoder:
            masked = self._run(block, masked, conditioning, condition)
        return masked

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # A block draws nothing: there is no state of a generator to keep.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


def draw_dropout_mask(
    config: ENATConfig, num_images: int, generator: torch.Generator | None, device: torch.device | str
) -> Tensor | None:
    """What dropout keeps of a group's embedded tokens, bool (B, L, D), True = kept; None where the config has no dropout.

    Drawn for a whole group and cut into rows, it is the same whatever the number of passes that compute the group.
    """
    if not config.dropout:
        return None
    drawn = torch.rand((num_images, config.num_tokens, config.embed_dim), generator=generator, device=device)
    return drawn < 1 - config.dropout


def _join(text: Tensor | None, tokens: Tensor | None) -> Tensor | None:
    """[text ; tokens] of what there is."""
    sources = [source for source in (text, tokens) if source is not None]
    return torch.cat(sources, dim=1) if len(sources) > 1 else (sources[0] if sources else None)


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
