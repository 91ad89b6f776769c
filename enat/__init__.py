"""ENAT: the method, without the machinery that runs it.

config, sampler_config   architectures, and settings of training and of sampling (import no torch)
blocks, model            ENAT and the models it is compared with
training/                which codes are masked, the objective, averages of weights, a recipe of a VQGAN
schedule                 schedules of sampling (imports no torch)
sampling/                parallel decoding in a few steps
cost                     MACs of training and generation (imports no torch)
tokenizer, text          the VQGAN; CLIP's text model
images                   decoding, cropping and encoding pixels (imports no torch)
execution/               passes of fixed composition, number formats, the peak of a device
files/                   weights and models as files
checkpoint               our own and published weights of ENATs and VQGANs
pipeline                 a model with its tokenizer: images in one call
metrics/                 feature extractors and scores

The names below are loaded on first use, because importing torch takes over a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enat.config import ENATConfig as ENATConfig
    from enat.config import VQGANConfig as VQGANConfig
    from enat.cost import Cost as Cost
    from enat.cost import generation_cost as generation_cost
    from enat.model import ENAT as ENAT
    from enat.model import ENATOutput as ENATOutput
    from enat.model import TextCondition as TextCondition
    from enat.pipeline import ENATPipeline as ENATPipeline
    from enat.sampler_config import SamplerConfig as SamplerConfig
    from enat.sampling.sampler import sample as sample
    from enat.tokenizer import VQGAN as VQGAN

_MODULES = {
    "config": ("ENATConfig", "VQGANConfig"),
    "cost": ("Cost", "generation_cost"),
    "model": ("ENAT", "ENATOutput", "TextCondition"),
    "pipeline": ("ENATPipeline",),
    "sampler_config": ("SamplerConfig",),
    "sampling.sampler": ("sample",),
    "tokenizer": ("VQGAN",),
}
_MODULE_OF = {name: f"enat.{module}" for module, names in _MODULES.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
