"""Architectures of an ENAT and of its tokenizer, with the published sizes, and the settings of their training.

Importing this module does not import torch.

Shape legend: L = grid_size**2 tokens, T text tokens, W width of caption features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

DECODER_ATTENTIONS = ("self_cross", "cross", "full")
REUSED_FEATURES = ("visible", "masked", "all")

# Table 1 of the paper gives width and depth; the encoder + decoder splits follow from its FLOPs.
_PRESETS: dict[str, dict[str, Any]] = {
    "enat-s": {"encoder_layers": 15, "decoder_layers": 1, "embed_dim": 512, "num_heads": 8},
    "enat-b": {"encoder_layers": 15, "decoder_layers": 1, "embed_dim": 768, "num_heads": 12},
    "enat-l": {"encoder_layers": 22, "decoder_layers": 2, "embed_dim": 1024, "num_heads": 16},
    "enat-xl": {"encoder_layers": 26, "decoder_layers": 2, "embed_dim": 1280, "num_heads": 16},
}
# The baseline of the paper's ablations, MaskGIT's network: one stack whose tokens all attend to all, without reuse.
_PRESETS |= {
    name.replace("enat", "nat"): {
        **sizes,
        "encoder_layers": 0,
        "decoder_layers": sizes["encoder_layers"] + sizes["decoder_layers"],
        "decoder_attention": "full",
        "reuse": False,
    }
    for name, sizes in _PRESETS.items()
}


def check_in(config: Any, interval: str, *names: str) -> None:
    """Raises ValueError for a field outside an interval such as "[0, 1)" or "(0, inf)". None is allowed, NaN is not."""
    low, high = map(float, interval[1:-1].split(","))
    allowed = f"in {interval}" if high < math.inf else f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    for name in names:
        if (value := getattr(config, name)) is None:
            continue
        is_in = low <= value <= high and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")
        if not is_in:
            raise ValueError(f"{name} is {value}; it must be {'' if math.isfinite(value) else 'finite and '}{allowed}")


def check_choices(config: Any, **choices: tuple[str, ...]) -> None:
    """Raises ValueError for a field whose value is not one of its choices."""
    for name, known in choices.items():
        check_choice(name, getattr(config, name), known)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")


PRECISIONS = ("fp32", "tf32", "bf16")  # of networks that are not trained: encoder, decoder, extractors of features


@dataclass(frozen=True, kw_only=True)
class ENATConfig:
    """Architecture of an ENAT: everything that determines the shapes of its weights."""

    architecture: ClassVar[str] = "enat"  # in the header of a file of weights

    encoder_layers: int
    """Blocks of the encoder, which sees visible tokens only. At least 0."""
    decoder_layers: int
    """Blocks of the decoder, which predicts the masked tokens. At least 1."""
    embed_dim: int
    """Width D of the tokens. Must be divisible by num_heads."""
    num_heads: int
    """Attention heads of every block."""
    grid_size: int = 16
    """Tokens along one side of an image; an image has L = grid_size**2 tokens."""
    codebook_size: int = 1024
    """Codes of the tokenizer, V. The mask id is V."""
    num_classes: int = 1000
    """Classes to condition on. 0 without text_width gives an unconditional model, whose only label is the null label 0."""
    decoder_attention: str = "self_cross"
    """Which tokens attend to which in the decoder, [queries] <- [keys]: "self_cross" is [M] <- [M] and [V], the paper's proposal;
    "cross" is [M] <- [V] (CrossMAE); "full" is [M] and [V] <- [M] and [V] (MAE; with encoder_layers 0 MaskGIT's plain stack)."""
    reuse: bool = True
    """Whether a step may reuse features of the step before (paper sec. 4.2). Without it the model refuses `previous`."""
    dropout: float = 0.1
    """Dropout of the embedded tokens in training, a probability in [0, 1)."""
    mlp_ratio: int = 4
    """Width of the hidden layer of every MLP, in multiples of embed_dim."""
    text_width: int | None = None
    """Width W of the caption features to condition on, null for a model without text. Excludes classes: num_classes must be 0."""
    num_text_tokens: int = 77
    """Tokens of a caption, T. Used only with text_width."""
    qk_norm: bool = False
    """LayerNorm of queries and keys in every head, for stability in half precision (Dehghani et al. 2023, arXiv 2302.05442)."""
    reused_features: str = "visible"
    """Which features are reused. "visible" (the paper): tokens that were visible before are not encoded again. For ablation:
    "masked" adds projected features of previously masked positions to their embeddings and encodes visible tokens again; "all" does
    both."""

    def __post_init__(self) -> None:
        check_choices(self, decoder_attention=DECODER_ATTENTIONS, reused_features=REUSED_FEATURES)
        counts = ("decoder_layers", "embed_dim", "num_heads", "grid_size", "codebook_size", "mlp_ratio")
        check_in(self, "[1, inf)", *counts, "num_text_tokens", "text_width")
        check_in(self, "[0, inf)", "encoder_layers", "num_classes")
        check_in(self, "[0, 1)", "dropout")
        if self.text_width is not None and self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes} with text_width; a text-conditional model needs num_classes 0")
        if not self.reuse and self.reused_features != "visible":
            raise ValueError(f"reused_features is {self.reused_features!r} with reuse=False, which reuses nothing")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim is {self.embed_dim}; it must be a multiple of num_heads, which is {self.num_heads}")

    @classmethod
    def preset(cls, name: str, grid_size: int = 16, **overrides: Any) -> ENATConfig:
        """A published size, "enat-s", "-b", "-l" or "-xl", or the plain NAT of the same width and depth, "nat-s" to "nat-xl".

        Raises ValueError for any other name.
        """
        check_choice("preset", name, _PRESETS)
        return cls(**{**_PRESETS[name], "grid_size": grid_size, **overrides})

    @property
    def num_tokens(self) -> int:
        """L, tokens of one image."""
        return self.grid_size**2

    @property
    def num_blocks(self) -> int:
        """Of encoder and decoder."""
        return self.encoder_layers + self.decoder_layers

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""
        return self.codebook_size

    @property
    def null_label(self) -> int:
        """The label that means "no class", used for guidance."""
        return self.num_classes

    @property
    def is_conditional(self) -> bool:
        """Whether the model has a condition that guidance can strengthen: classes or captions."""
        return self.num_classes > 0 or self.text_width is not None

    @property
    def reuses_visible(self) -> bool:
        return self.reuse and self.reused_features in ("visible", "all")

    @property
    def reuses_masked(self) -> bool:
        return self.reuse and self.reused_features in ("masked", "all")


LABEL_SMOOTHING = 0.1  # of the training objective, as published
NUM_GROUPS = 32  # of every GroupNorm of a VQGAN; its channel counts must be multiples of it

_VQGAN_PRESETS: dict[str, dict[str, Any]] = {
    # The published tokenizer: one set of weights, used at both resolutions.
    "vqgan-256": {"resolution": 256},
    "vqgan-512": {"resolution": 512},
    # Small images, trained here: 16 px to a 4 x 4 grid.
    "vqgan-small": {
        "base_channels": 32,
        "channel_multipliers": (1, 1, 2),
        "num_res_blocks": 1,
        "latent_dim": 16,
        "codebook_size": 128,
        "resolution": 16,
    },
}


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Architecture of a tokenizer."""

    architecture: ClassVar[str] = "vqgan"  # in the header of a file of weights

    base_channels: int = 128
    """Channels at full resolution; a multiple of 32."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in multiples of base_channels, full resolution first. Each level after the first halves the
    resolution."""
    num_res_blocks: int = 2
    """Residual blocks of each level."""
    latent_dim: int = 256
    """Channels of the latents and width of the codebook entries, Z."""
    codebook_size: int = 1024
    """Entries of the codebook, V."""
    resolution: int = 256
    """Pixels along one side of an image; a multiple of the downsampling factor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))  # lists come from JSON and YAML
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers is empty; a VQGAN has at least one level")
        if self.base_channels % NUM_GROUPS or self.base_channels < 1:
            raise ValueError(f"base_channels is {self.base_channels}; GroupNorm({NUM_GROUPS}) needs a multiple of {NUM_GROUPS}")
        check_in(self, "[1, inf)", "num_res_blocks", "latent_dim", "codebook_size", "resolution")
        if min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers is {self.channel_multipliers}; all must be at least 1")
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution is {self.resolution}; it must be a multiple of the downsampling factor {self.downsampling} of a "
                f"tokenizer with {len(self.channel_multipliers)} levels"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> VQGANConfig:
        """ "vqgan-256", "vqgan-512" (published) or "vqgan-small". Raises ValueError for any other name."""
        check_choice("preset", name, _VQGAN_PRESETS)
        return cls(**{**_VQGAN_PRESETS[name], **overrides})

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the encoder's levels, as many as the decoder's."""
        return self.num_res_blocks * len(self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def encoding_bytes(self) -> int:
        """Estimated peak memory of encoding one image in float32, in bytes: four times the widest activation."""
        widest = max(channels * (self.resolution >> depth) ** 2 for depth, channels in enumerate(self.level_channels))
        return 4 * 4 * widest

    @property
    def grid_size(self) -> int:
        """h = w, codes along one side."""
        return self.resolution // self.downsampling

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels per level, full resolution first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which codes are masked in training. The defaults are the published settings."""

    alpha: float = 12.0
    """First parameter of the Beta distribution of the mask ratio, above 0."""
    beta: float = 3.0
    """Second parameter of the Beta distribution of the mask ratio, above 0."""
    reuse_probability: float = 0.5
    """Probability that a group of images trains with features of an earlier step, in [0, 1]."""

    def __post_init__(self) -> None:
        check_in(self, "(0, inf)", "alpha", "beta")
        check_in(self, "[0, 1]", "reuse_probability")


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """Training of a small VQGAN by AdamW with a cosine learning rate."""

    num_steps: int = 400
    """Optimizer steps."""
    batch_size: int = 64
    """Images of a step."""
    learning_rate: float = 2e-3
    """Peak learning rate, reached after 20 steps."""
    warmup_share: float = 0.2
    """Share of the steps, in [0, 1), that train a plain autoencoder before quantization starts."""
    commitment: float = 0.25
    """Weight of the commitment loss, which keeps latents near their codebook entries."""
    revive_every: int = 20
    """Steps between two moves of unused codebook entries to latents of the batch."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "num_steps", "batch_size", "revive_every")
        check_in(self, "[0, inf)", "learning_rate", "commitment")
        check_in(self, "[0, 1)", "warmup_share")
