"""What making one image cost, of samples that were generated here: MACs, counted from the architecture and the sampler."""

from __future__ import annotations

from enat.config import ENATConfig
from enat.cost import Cost, generation_cost
from enat.sampler import SamplerConfig
from enat.tokenizer import VQGANConfig
from pipelines.artifacts import Manifest
from pipelines.samples import num_masked_of


def image_cost(samples: Manifest, model: Manifest, tokenizer: Manifest) -> Cost:
    architecture, sampler = ENATConfig(**model.summary["model"]), SamplerConfig(**samples.summary["sampler"])
    num_given = num_given_of(samples, architecture)
    return generation_cost(architecture, sampler, VQGANConfig(**tokenizer.summary["config"]), num_given=num_given)


def num_given_of(samples: Manifest, architecture: ENATConfig) -> int:
    """Tokens that a sample began with: those of a real image that its mask ratio left, or none."""
    mask_ratio = samples.summary["mask_ratio"]
    return 0 if mask_ratio is None else architecture.num_tokens - num_masked_of(mask_ratio, architecture.num_tokens)
