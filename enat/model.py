"""ENAT: a non-autoregressive transformer that spends its computation where tokens change.

Read top-down beside the paper (EfficientNAT, NeurIPS 2024, arXiv 2411.06959): condition, network, forward, then its parts in order.
Configuration and blocks are in enat/config.py and enat/blocks.py. An encoder sees visible tokens only; a shallow
decoder lets the mask tokens gather information from themselves and from the encoded visible tokens (self-cross attention,
sec. 4.1); features of tokens that were visible at the step before are projected and reused instead of being computed again
(sec. 4.2).

Shape legend: B batch, L = grid_size**2 tokens, D width, V codebook size, M masked tokens (equal in every row of a
batch), T text tokens, W width of caption features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enat.blocks import Block, Head, PreviousProjection
from enat.config import DECODER_ATTENTIONS, REUSED_FEATURES, ENATConfig
from enat.files.hub import CONFIG, MODEL, HubConfig, fetch

__all__ = ["DECODER_ATTENTIONS", "ENAT", "REUSED_FEATURES", "ENATConfig", "ENATOutput", "TextCondition", "draw_dropout_mask"]


@dataclass(frozen=True)
class TextCondition:
    """Captions as a model sees them: `hidden`, a feature of every text token, and `pooled`, one of the whole caption.

    Any floating dtype: the model converts it to the dtype of its weights. len(), slices and .to() work as on a tensor of labels.
    """

    hidden: Float[Tensor, "B T W"]
    pooled: Float[Tensor, "B W"]

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> TextCondition:
        return TextCondition(self.hidden[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> TextCondition:
        return TextCondition(self.hidden.to(device), self.pooled.to(device))


@dataclass(frozen=True)
class PreparedCondition:
    """A condition as the blocks take it, which ENAT.prepare computes once for all steps of a call. len() and rows as of labels.

    embedded: the input of adaLN, after SiLU.   text: the text as conditioning tokens, None without text.
    modulations: the numbers of adaLN of every block; none where they are computed as blocks run.
    """

    embedded: Float[Tensor, "B D"]
    text: Float[Tensor, "B T D"] | None
    modulations: Mapping[Block, Tensor]

    def __len__(self) -> int:
        return len(self.embedded)

    def __getitem__(self, rows: slice | Tensor) -> PreparedCondition:
        text = None if self.text is None else self.text[rows]
        return PreparedCondition(self.embedded[rows], text, {block: each[rows] for block, each in self.modulations.items()})

    def of(self, block: Block) -> Tensor:
        """The numbers of adaLN of a block."""
        return self.modulations[block] if block in self.modulations else block.modulation(self.embedded)


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values that a forward pass of plain NAT kept of the tokens at `index`, for ENAT.forward_local.

    key_values: of every block, (B, T + S, 2 D): those of the text, then those of the S tokens.
    """

    index: Int64[Tensor, "B S"]
    key_values: tuple[Tensor, ...]

    def __getitem__(self, rows: slice | Tensor) -> KeyValueCache:
        return KeyValueCache(self.index[rows], tuple(each[rows] for each in self.key_values))

    def without(self, own: Int64[Tensor, "B K"]) -> KeyValueCache:
        """What is kept of the other tokens."""
        is_own = torch.zeros_like(self.index, dtype=torch.uint8).scatter_(1, own, 1)
        others = is_own.gather(1, self.index).argsort(dim=1, stable=True)[:, : self.index.shape[1] - own.shape[1]]
        num_text = self.key_values[0].shape[1] - self.index.shape[1]
        kept = [torch.cat([each[:, :num_text], _take(each[:, num_text:], others)], dim=1) for each in self.key_values]
        return KeyValueCache(self.index.gather(1, others), tuple(kept))


@dataclass(frozen=True)
class ENATOutput:
    """What one step computes, and what the next step may reuse.

    logits: P = L; with logits="masked" P = M, in the order of `masked_index`; with "none" P = 0.
    features: before the final norm: encoder features of visible tokens, decoder features of masked ones. Text is not included.
    mask: True = masked.   masked_index: ascending positions.   num_masked: M.
    guide_logits: those of the first layers alone, if they were asked for; see forward.   cache: likewise.
    """

    logits: Float[Tensor, "B P V"]
    features: Float[Tensor, "B L D"]
    mask: Bool[Tensor, "B L"]
    masked_index: Int64[Tensor, "B M"]
    num_masked: int
    guide_logits: Float[Tensor, "B M V"] | None = None
    cache: KeyValueCache | None = None


_RECOMPILE_LIMIT = 64  # torch's default is 8


def _take(x: Float[Tensor, "B L D"], index: Int64[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """The rows of x at index."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


class ENAT(nn.Module):
    """The network.

    activation_checkpointing: an attribute. In training, blocks keep only their inputs and run again for the backward pass.
    is_compiled: whether compile_blocks was called.
    """

    null_hidden: Tensor
    null_pooled: Tensor

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> ENAT:
        """The model of an exported folder, or of owner/name on the Hugging Face hub, in eval mode on the CPU; see enat.files.hub.

        Raises ValueError for a folder that does not hold such a model.
        """
        from enat.files.weights import load_configured  # not above: the network needs no safetensors

        folder = fetch(source, revision)
        return load_configured(folder / MODEL, cls, HubConfig.read(folder / CONFIG).model)

    def __init__(self, config: ENATConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.is_compiled = False
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

        The projection of masked positions starts at 0: at first, training reuses nothing of them.
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

    def set_null_caption(self, hidden: Float[Tensor, "T W"], pooled: Float[Tensor, " W"]) -> None:
        """Keep the features of the empty caption as buffers, which are saved with the weights."""
        self.check_condition(TextCondition(hidden[None], pooled[None]))
        self.null_hidden.copy_(hidden)
        self.null_pooled.copy_(pooled)

    def null_condition(self, num_images: int) -> Tensor | TextCondition:
        """The null condition on the model's device: null labels int64 (B,), or the empty caption."""
        if self.config.text_width is None:
            device = self.token_embedding.weight.device
            return torch.full((num_images,), self.config.null_label, dtype=torch.int64, device=device)
        return TextCondition(self.null_hidden.expand(num_images, -1, -1), self.null_pooled.expand(num_images, -1))

    def drop_condition(self, condition: Tensor | TextCondition, is_dropped: Bool[Tensor, " B"]) -> Tensor | TextCondition:
        """The condition with the null label, or the empty caption, for the images in `is_dropped`."""
        self.check_condition(condition)
        if not isinstance(condition, TextCondition):
            return condition.masked_fill(is_dropped, self.config.null_label)
        return TextCondition(
            torch.where(is_dropped[:, None, None], self.null_hidden, condition.hidden),
            torch.where(is_dropped[:, None], self.null_pooled, condition.pooled),
        )

    def check_condition(self, condition: Tensor | TextCondition) -> None:
        """Raises ValueError for a condition of another kind or shape than the model's. Values are not checked."""
        num_text_tokens, width = self.config.num_text_tokens, self.config.text_width
        if width is None:
            if isinstance(condition, TextCondition):
                raise ValueError("this model is not conditioned on text: it takes labels, not a TextCondition")
            if condition.ndim != 1:
                raise ValueError(f"labels have shape {tuple(condition.shape)}; one label per image, (B,), is needed")
        elif not isinstance(condition, TextCondition):
            raise ValueError("this model is conditioned on text: it takes a TextCondition, not labels")
        elif condition.hidden.shape[1:] != (num_text_tokens, width) or condition.pooled.shape != (len(condition), width):
            shapes = f"{tuple(condition.hidden.shape)} and {tuple(condition.pooled.shape)}"
            raise ValueError(f"caption features have shapes {shapes}; (B, {num_text_tokens}, {width}) and (B, {width}) are needed")

    def hold_bf16(self) -> ENAT:
        """Keep the weights of linear layers in bfloat16. Under autocast to bfloat16 outputs have the same bits, but weights are not
        cast in every call. For sampling: a model that is trained needs its float32 weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every block in place, with dynamic shapes: the number of masked tokens varies. backend: of torch.compile.

        The number of graphs is bounded (see _run), and small. The limit of this process is raised all the same, because torch runs
        what exceeds it uncompiled, without a word.
        """
        self.is_compiled = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
        for block in (*self.encoder, *self.decoder):
            block.compile(dynamic=True, backend=backend)

    def prepare(self, labels: Int64[Tensor, " B"] | TextCondition) -> PreparedCondition:
        """What does not change over the steps of a call, for forward in place of labels or captions. Not for training."""
        self.check_condition(labels)
        condition = self._embed_condition(labels)
        return replace(condition, modulations={block: condition.of(block) for block in (*self.encoder, *self.decoder)})

    def forward(
        self,
        tokens: Int64[Tensor, "B L"],
        labels: Int64[Tensor, " B"] | TextCondition | PreparedCondition,
        previous: ENATOutput | None = None,
        *,
        num_masked: int | None = None,
        logits: Literal["all", "masked", "none"] = "all",
        dropout_mask: Bool[Tensor, "B L D"] | None = None,
        guide_layers: int | None = None,
        keeps_key_values: bool = False,
    ) -> ENATOutput:
        """Predict codes at every position from the visible ones.

        `tokens`: codes in [0, V) or the mask id V; all rows have the same number of masked tokens.
        `labels`: in [0, num_classes], where num_classes means "no class"; a TextCondition for a model with text; or from prepare.
        `previous`: the output of the step before for the same images; its visible tokens must still be visible and unchanged.
        `num_masked`: M, if the caller knows it (sampler and trainer do). Without it the forward counts and checks the masks, which
            waits for the device. Raises ValueError if rows differ or if a visible token of `previous` is masked again.
        `logits`: "masked" evaluates the head at masked positions only. "none" computes only what the next step reuses: no head,
            and no decoder if only visible tokens are reused; the features of masked positions are then their embeddings.
        `dropout_mask`: True = kept, from draw_dropout_mask; used only in training mode with dropout. None draws it from torch's
            default generator.
        `guide_layers`: also the logits of masked positions that this network gives without its later layers. With an encoder, it
            ends after so many blocks, and the decoder runs a second time; without one, the decoder ends after so many. Reused
            features are the same. None if there are no tokens to encode, so that nothing would differ, or none to predict.
        `keeps_key_values`: also keep keys and values of all tokens, in plain NAT: for forward_local.
        """
        self._check(tokens, labels, previous)
        mask = tokens == self.config.mask_id
        if num_masked is None:
            num_masked = _count_masked(mask, previous)
        order, num_visible_before = _split(mask, previous)
        num_visible = tokens.shape[1] - num_masked

        # In training, parts without tokens run on empty tensors. Every weight then has a gradient (possibly zero) in every step,
        # and workers whose groups drew different modes can reduce the same buffers.
        condition = labels if isinstance(labels, PreparedCondition) else self._embed_condition(labels)
        old, computed = self._reuse(self._embed(tokens, dropout_mask), order, num_visible_before, previous)
        new, masked = computed.tensor_split([computed.shape[1] - num_masked], dim=1)
        visible, early = self._encode(new, old, condition, guide_layers if self.encoder else None)
        guide = self._decode(masked, early, condition, None)[0] if early is not None and num_masked else None
        key_values: list[Tensor] | None = [] if keeps_key_values else None
        if (num_masked and (logits != "none" or self.config.reuses_masked)) or self.training:
            masked, early = self._decode(masked, visible, condition, None if self.encoder else guide_layers, key_values)
            guide = early if early is not None else guide

        in_order = torch.cat([visible, masked], dim=1)
        position = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        features = _take(in_order, position)
        scored = {"all": features, "masked": masked, "none": masked[:, :0]}[logits]
        guide_logits = self.head(guide, self.token_embedding.weight) if guide is not None else None
        scores = self.head(scored, self.token_embedding.weight)
        cache = KeyValueCache(order, tuple(key_values)) if key_values else None
        return ENATOutput(scores, features, mask, order[:, num_visible:], num_masked, guide_logits, cache)

    def forward_local(
        self,
        tokens: Int64[Tensor, "B L"],
        labels: PreparedCondition,
        cache: KeyValueCache,
        own: Int64[Tensor, "B K"],
        *,
        num_masked: int,
        guide_layers: int | None = None,
    ) -> ENATOutput:
        """Plain NAT on K tokens of each image alone, which attend to themselves and to what is kept of all others.

        `own`: positions, of which num_masked are masked in every row.   `cache`: of the other tokens; see KeyValueCache.without.
        Returns logits of the masked ones and, with guide_layers, those of the first layers. The features are those of `own`.
        """
        order = (tokens.gather(1, own) == self.config.mask_id).to(torch.uint8).argsort(dim=1, stable=True)
        index, first = own.gather(1, order), own.shape[1] - num_masked
        x, guide = _take(self._embed(tokens, None), index), None
        for number, (block, kept) in enumerate(zip(self.decoder, cache.key_values, strict=True)):
            guide = x[:, first:] if number == guide_layers else guide
            assert isinstance(block, Block)
            x = self._run(block, x, None, labels, torch.cat([kept, block.key_value(x, None, labels.of(block))], dim=1))
        scores, guide_logits = (
            None if each is None else self.head(each, self.token_embedding.weight) for each in (x[:, first:], guide)
        )
        assert scores is not None
        return ENATOutput(scores, x, tokens == self.config.mask_id, index[:, first:], num_masked, guide_logits)

    def _check(self, tokens: Tensor, labels: Tensor | TextCondition | PreparedCondition, previous: ENATOutput | None) -> None:
        if not isinstance(labels, PreparedCondition):
            self.check_condition(labels)
        if tokens.shape != (len(labels), self.config.num_tokens):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; ({len(labels)}, {self.config.num_tokens}) is needed")
        if previous is not None and not self.config.reuse:
            raise ValueError("this model was made with reuse=False and does not take features of a previous step")

    def _embed(self, tokens: Int64[Tensor, "B L"], dropout_mask: Bool[Tensor, "B L D"] | None) -> Float[Tensor, "B L D"]:
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

    def _embed_condition(self, labels: Tensor | TextCondition) -> PreparedCondition:
        if isinstance(labels, TextCondition):
            assert self.text_projection is not None and self.pooled_projection is not None
            dtype = self.text_projection.weight.dtype
            pooled = self.pooled_projection(labels.pooled.to(dtype))
            return PreparedCondition(F.silu(pooled), self.text_projection(labels.hidden.to(dtype)), {})
        assert self.label_embedding is not None
        return PreparedCondition(F.silu(self.label_embedding(labels)), None, {})

    def _reuse(
        self,
        embedded: Float[Tensor, "B L D"],
        order: Int64[Tensor, "B L"],
        num_visible_before: int,
        previous: ENATOutput | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Projected features of old tokens, and the embeddings of the others in the order of _split.

        Old tokens are those that were visible before, in a model that reuses them (paper sec. 4.2). None without old tokens.
        """
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

    def _encode(
        self, new: Tensor, old: Tensor | None, condition: PreparedCondition, early_at: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Newly visible tokens attend to themselves, to the text and to the projected features of old ones -> all visible ones.

        early_at: also all visible ones as they are after so many blocks; None without new tokens.
        """
        early = None
        if new.shape[1] or self.training:
            conditioning = _normalized(condition.text, old)
            for number, block in enumerate(self.encoder):
                early = new if number == early_at else early
                new = self._run(block, new, conditioning, condition)
        if old is None:
            return new, early
        return torch.cat([old, new], dim=1), torch.cat([old, early], dim=1) if early is not None else None

    def _decode(
        self,
        masked: Tensor,
        visible: Tensor,
        condition: PreparedCondition,
        early_at: int | None,
        key_values: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mask tokens gather from themselves, from the text and from the visible tokens, as decoder_attention allows.

        early_at: also the mask tokens as they are after so many blocks.   key_values: gets those of each block.
        """
        is_full = self.config.decoder_attention == "full"
        conditioning = _normalized(condition.text) if is_full else _normalized(condition.text, visible)
        own, early = torch.cat([visible, masked], dim=1) if is_full else masked, None
        first = own.shape[1] - masked.shape[1]
        for number, block in enumerate(self.decoder):
            early = own[:, first:] if number == early_at else early
            if key_values is not None:
                assert isinstance(block, Block)
                key_values.append(block.key_value(own, conditioning, condition.of(block)))
            own = self._run(block, own, conditioning, condition, key_values[-1] if key_values else None)
        return own[:, first:], early

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        conditioning: Tensor | None,
        condition: PreparedCondition,
        key_value: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(block, Block)
        inputs = x, conditioning, condition.of(block), key_value
        if self.is_compiled and (x.shape[1] < 2 or (conditioning is not None and conditioning.shape[1] < 2)):
            return block.forward(*inputs)  # torch.compile makes graphs of their own for sizes 0 and 1
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # A block draws no random numbers, so the state of the generators need not be kept.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


def draw_dropout_mask(
    config: ENATConfig, num_images: int, generator: torch.Generator | None, device: torch.device | str
) -> Bool[Tensor, "B L D"] | None:
    """Which of a group's embedded tokens dropout keeps, True = kept; None if the config has no dropout.

    Drawn for a whole group and cut into rows: the mask does not depend on the number of passes that compute the group.
    """
    if not config.dropout:
        return None
    drawn = torch.rand((num_images, config.num_tokens, config.embed_dim), generator=generator, device=device)
    return drawn < 1 - config.dropout


def _normalized(*sources: Tensor | None) -> Tensor | None:
    """Conditioning tokens [text ; tokens], those that are not None, after a LayerNorm without weights. Blocks share it."""
    given = [source for source in sources if source is not None]
    joined = torch.cat(given, dim=1) if len(given) > 1 else (given[0] if given else None)
    return None if joined is None else F.layer_norm(joined, joined.shape[-1:], eps=1e-6)


def _split(mask: Bool[Tensor, "B L"], previous: ENATOutput | None) -> tuple[Int64[Tensor, "B L"], int]:
    """Positions as [visible before ; newly visible ; masked], ascending within each, and the number visible before.

    The caller knows the counts, so slices of this order have fixed sizes and nothing waits for the device.
    """
    if previous is None:
        return mask.to(torch.uint8).argsort(dim=1, stable=True), 0
    group = 2 * mask.to(torch.uint8) + (previous.mask & ~mask).to(torch.uint8)
    return group.argsort(dim=1, stable=True), mask.shape[1] - previous.num_masked


def _count_masked(mask: Bool[Tensor, "B L"], previous: ENATOutput | None) -> int:
    counts = mask.sum(dim=1)
    if counts.numel() == 0:
        raise ValueError("an empty batch has no masked tokens; give at least one image")
    lowest, highest = int(counts.min()), int(counts.max())
    if lowest != highest:
        raise ValueError(f"rows of one batch have {lowest} to {highest} masked tokens; all must have the same number")
    if previous is not None and bool((mask & ~previous.mask).any()):
        raise ValueError("a token that was visible in `previous` is masked now; start again with previous=None")
    return lowest
