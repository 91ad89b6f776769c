"""VQGAN: images <-> codes, in the layout of MaskGIT's tokenizer as MAGE published it.

Convolutions only: no attention, no projection around the codebook; nearest codebook entry by squared L2. Downsampling is a
2x2 average pool, upsampling nearest x2 and a convolution.

Shape legend: B images, H x W pixels, h x w codes with h = H / downsampling, C channels, Z latent size, V codebook size.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from enat.config import NUM_GROUPS, VQGANConfig
from enat.execution.precision import computing_in

__all__ = ["VQGAN", "VQGANConfig"]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """h = conv2(swish(norm2(conv1(swish(norm1(x)))))); x + h, or shortcut(h) + h if the number of channels changes.

    The shortcut takes h, not x: the published weights were trained this way.
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
    """The residual blocks of one resolution, and the upsampling to the next one."""

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


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, ResidualBlock(channels, channels)) for name in ("block_1", "block_2")))


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        widths = [config.base_channels, *channels]
        self.down = nn.ModuleList([Level(a, b, config.num_res_blocks) for a, b in pairwise(widths)])
        self.mid = _middle(channels[-1])
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
        self.mid = _middle(channels[-1])
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

    def on(self, device: str | torch.device) -> VQGAN:
        """Move it. On GPUs, the channels of its convolutions are last, as tensor cores need them; elsewhere images would be rounded
        otherwise than before."""
        moved = self.to(device)
        if torch.device(device).type == "cuda":
            moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        return moved

    def compile_networks(self, backend: str = "inductor") -> VQGAN:
        """Compile encoder and decoder in place. A graph is made for each shape, so give batches of one size. What is computed
        differs by rounding. backend: of torch.compile."""
        for network in (self.encoder, self.decoder):
            network.compile(dynamic=False, backend=backend)
        return self

    def encode_latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B Z h w"]:
        """Latents before quantization, of images in [0, 1]. Raises ValueError for images of another shape."""
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(f"images have shape {tuple(images.shape)}; (B, 3, H, W) with sides divisible by {factor} is needed")
        return self.encoder(images)

    def quantize(self, latents: Float[Tensor, "B Z h w"]) -> Int64[Tensor, "B h w"]:
        """The nearest codebook entries by squared L2 distance."""
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        entries = self.codebook.weight
        # |z|^2 is the same for every entry and is left out.
        distance = torch.addmm(entries.square().sum(dim=1), flat, entries.t(), alpha=-2)
        batch, _, height, width = latents.shape
        return distance.argmin(dim=1).view(batch, height, width)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"], precision: str = "fp32") -> Int64[Tensor, "B h w"]:
        """Images in [0, 1] -> codes in [0, V).

        `precision`: of the convolutions, see enat.execution.precision. The search for the nearest entry is always in float32.
        """
        with computing_in(precision, images.device.type):
            latents = self.encode_latents(images)
        return self.quantize(latents.float())

    @torch.no_grad()
    def decode(self, codes: Int64[Tensor, "B h w"], precision: str = "fp32") -> Float[Tensor, "B 3 H W"]:
        """Codes in [0, V) -> images in [0, 1], float32. `precision`: of the convolutions."""
        with computing_in(precision, codes.device.type):
            images = self.decode_latents(self.codebook(codes).permute(0, 3, 1, 2))
        return images.float().clamp(0, 1)

    def decode_latents(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, not clamped."""
        return self.decoder(latents)
