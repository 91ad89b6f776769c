"""VQGAN: images <-> codes, in the layout of MaskGIT's tokenizer as MAGE published it.

Convolutions only: no attention, no projection around the codebook; nearest codebook entry by squared L2. Downsampling is a
2x2 average pool, upsampling nearest x2 and a convolution.

Shape legend: B images, H x W pixels, h x w codes with h = H / downsampling, C channels, Z latent size, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NUM_GROUPS = 32  # of every GroupNorm, so channels must be a multiple of it

_PRESETS: dict[str, dict[str, Any]] = {
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
    """Architecture of a tokenizer. Each level after the first halves the resolution."""

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_dim: int = 256
    codebook_size: int = 1024
    resolution: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))  # lists come from JSON and YAML
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers is empty; a VQGAN has at least one level")
        if self.base_channels % _NUM_GROUPS or self.base_channels < 1:
            raise ValueError(f"base_channels is {self.base_channels}; GroupNorm({_NUM_GROUPS}) needs a multiple of {_NUM_GROUPS}")
        for name in ("num_res_blocks", "latent_dim", "codebook_size", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers {self.channel_multipliers} must all be at least 1")
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by the tokenizer's downsampling factor {self.downsampling} "
                f"({len(self.channel_multipliers)} levels)"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> VQGANConfig:
        """ "vqgan-256", "vqgan-512" (published) or "vqgan-small". Raises ValueError for any other name."""
        if name not in _PRESETS:
            raise ValueError(f"no VQGAN preset is called {name!r}; choose one of {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def encoding_bytes(self) -> int:
        """Memory that encoding one image takes at its peak, in float32, as a rule of thumb: four times the widest activation."""
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


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NUM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """h = conv2(swish(norm2(conv1(swish(norm1(x)))))); x + h, or shortcut(h) + h where the channels change.

    The shortcut reads h, not x: that is how the published weights were trained.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(h)) + h


class Level(nn.Module):
    """The residual blocks of one resolution, and what leads to the next one."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, *, upsample: bool = False) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.block = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.upsample = nn.ModuleDict({"conv": nn.Conv2d(out_channels, out_channels, 3, padding=1)}) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample is not None:
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        widths = [config.base_channels, *channels]
        self.down = nn.ModuleList([Level(a, b, config.num_res_blocks) for a, b in pairwise(widths)])
        self.mid = Middle(channels[-1])
        self.norm_out = _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for depth, level in enumerate(self.down):
            x = level(x if depth == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(config.latent_dim, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        # up[i] works at the resolution of down[i], so it runs from the last to the first.
        widths = [*channels, channels[-1]]
        self.up = nn.ModuleList(
            [Level(widths[i + 1], widths[i], config.num_res_blocks, upsample=i > 0) for i in range(len(channels))]
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.latent_dim)
        self.decoder = Decoder(config)

    def encode_latents(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [0, 1] -> float (B, Z, h, w) before quantization. Raises ValueError for another size of image."""
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[-1] % self.config.downsampling
            or images.shape[-2] % self.config.downsampling
        ):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; "
                f"(B, 3, H, W) with sides divisible by {self.config.downsampling} is needed"
            )
        return self.encoder(images)

    def quantize(self, latents: Tensor) -> Tensor:
        """float (B, Z, h, w) -> int64 (B, h, w): the nearest codebook entry by squared L2 distance."""
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        entries = self.codebook.weight
        # |z|^2 is the same for every entry and left out.
        distance = torch.addmm(entries.square().sum(dim=1), flat, entries.t(), alpha=-2)
        batch, _, height, width = latents.shape
        return distance.argmin(dim=1).view(batch, height, width)

    @torch.no_grad()
    def encode(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """float (B, 3, H, W) in [0, 1] -> codes int64 (B, h, w) in [0, V).

        dtype: of the convolutions; the nearest entry is looked for in float32 in any case.
        """
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            latents = self.encode_latents(images)
        return self.quantize(latents.float())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 (B, h, w) in [0, V) -> float (B, 3, H, W) in [0, 1]."""
        return self.decode_latents(self.codebook(codes).permute(0, 3, 1, 2)).clamp(0, 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """float (B, Z, h, w) -> float (B, 3, H, W), not clamped."""
        return self.decoder(latents)
