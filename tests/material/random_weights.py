"""Networks whose weights are drawn, always the same ones, where published weights cannot be had."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def randomized(network: Network, std: float = 0.2, seed: int = 0) -> Network:
    """Every parameter from N(0, std): as it is initialised, a model would give all classes the same logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std, generator=generator)
    return network.eval()
