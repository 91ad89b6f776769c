"""Networks whose weights are drawn, always the same ones, where published weights cannot be had."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def randomized(network: Network, std: float = 0.2, seed: int = 0) -> Network:
    """Every parameter from N(0, std): as it is initialised, a model would give all classes the same logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std, generator=generator)
    return network.eval()


def inception_state() -> dict[str, Tensor]:
    """A state dict for torch-fidelity's InceptionV3, of weights that keep activations near 1 and tell images apart."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:  # the class would fetch the published weights
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network: Any = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.2, generator=generator)
                module.weight -= module.weight.mean(dim=1, keepdim=True)  # else all images get about the same logits
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return dict(network.state_dict())
