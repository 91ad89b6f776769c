"""Training of a small VQGAN that keeps its whole codebook in use.

The recipe: first a plain autoencoder without quantization, which spreads the latents; then the codebook starts from k-means of the
latents; then straight-through quantization, with entries that recent steps did not use moved to latents of the current batch.
Reconstruction is L1 + L2 in pixels, for small images, on which perceptual and adversarial losses (with which the published
tokenizer was trained) add nothing.

Shape legend: B images, Z latent size, h x w codes, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from enat.config import TokenizerRecipe
from enat.tokenizer import VQGAN


@dataclass(frozen=True)
class TokenizerStep:
    """Measures of one training step. reconstruction_error: mean squared error of pixels in [0, 1]."""

    step: int
    loss: float
    reconstruction_error: float
    is_quantized: bool


def train_tokenizer(vqgan: VQGAN, images: Tensor, recipe: TokenizerRecipe, generator: torch.Generator) -> Iterator[TokenizerStep]:
    """Train in place on float images (N, 3, H, W) in [0, 1], yielding after each step.

    All randomness after the initialisation of `vqgan` comes from `generator`: the same seed gives the same tokenizer.
    """
    vqgan.train()
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    first_quantized = int(recipe.num_steps * recipe.warmup_share)
    used = torch.zeros(vqgan.config.codebook_size, dtype=torch.bool, device=images.device)
    for step in range(recipe.num_steps):
        progress = step / recipe.num_steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * progress))
        batch = images[torch.randint(len(images), (recipe.batch_size,), generator=generator)]
        latents = vqgan.encode_latents(batch)
        is_quantized = step >= first_quantized
        if step == first_quantized:
            initialize_codebook(vqgan, images, generator)
        codebook_loss = torch.zeros((), device=images.device)
        fed = latents
        if is_quantized:
            codes = vqgan.quantize(latents.detach())
            used[codes.flatten()] = True
            entries = vqgan.codebook(codes).permute(0, 3, 1, 2)
            codebook_loss = F.mse_loss(entries, latents.detach()) + recipe.commitment * F.mse_loss(latents, entries.detach())
            fed = latents + (entries - latents).detach()  # straight-through: the decoder's gradient reaches the encoder
        decoded = vqgan.decode_latents(fed)
        reconstruction_error = F.mse_loss(decoded, batch)
        loss = reconstruction_error + 0.1 * F.l1_loss(decoded, batch) + 0.1 * codebook_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqgan.parameters(), 1.0)
        optimizer.step()
        if is_quantized and (step + 1 - first_quantized) % recipe.revive_every == 0:
            if progress < 0.8:  # no moves in the last steps, which settle
                revive_unused(vqgan, used, latents.detach(), generator)
            used.zero_()
        yield TokenizerStep(step + 1, loss.item(), reconstruction_error.item(), is_quantized)
    vqgan.eval()


@torch.no_grad()
def initialize_codebook(
    vqgan: VQGAN, images: Tensor, generator: torch.Generator, iterations: int = 10, sample_size: int = 16384
) -> None:
    """Set the codebook to k-means centres of the latents of a sample of the images."""
    size = vqgan.config.codebook_size
    per_image = vqgan.config.grid_size**2
    chosen = torch.randperm(len(images), generator=generator)[: max(1, sample_size // per_image)]
    latents = torch.cat([_flatten(vqgan.encode_latents(images[part])) for part in chosen.split(256)])
    centres = latents[torch.randint(len(latents), (size,), generator=generator)].clone()
    for _ in range(iterations):
        nearest = torch.cdist(latents, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centres)
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = latents[torch.randint(len(latents), (len(empty),), generator=generator)]
    vqgan.codebook.weight.copy_(centres)


@torch.no_grad()
def revive_unused(vqgan: VQGAN, used: Tensor, latents: Tensor, generator: torch.Generator) -> None:
    """Move unused entries to random latents of the batch (B, Z, h, w)."""
    unused = (~used).nonzero()[:, 0]
    flat = _flatten(latents)
    vqgan.codebook.weight[unused] = flat[torch.randint(len(flat), (len(unused),), generator=generator)]


def _flatten(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def code_usage(codes: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codebook that occurs in `codes`, and perplexity = exp(entropy of their distribution) in [1, V]."""
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    probs = counts / counts.sum()
    entropy = -(probs * probs.clamp_min(1e-300).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
