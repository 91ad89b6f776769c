"""ENAT: the method, without the machinery that runs it.

config                                   architectures, and settings of training (imports no torch)
blocks, model                            ENAT and the models it is compared with
masking, loss                            which codes are masked in training, and the objective
schedule, sampler_config, sampler, predictor   parallel decoding in a few steps (the first two import no torch)
cost                                     MACs of training and generation (imports no torch)
passes                                   passes of fixed composition, in which a sample depends on no other
pipeline, hub                            a model as a folder or repository, and images in one call (hub imports no torch)
cuda_graph                               the loop of the sampler as one CUDA graph
peak                                     FLOP/s of a device in matrix products
precision                                number formats of encoders, decoders and extractors
tokenizer, tokenizer_training            the VQGAN, and a recipe for small images
text                                     CLIP's text model
checkpoint, averages                     weights in and out, ours and published ones; averages of them over the training
images                                   decoding, cropping and encoding pixels (imports no torch)
metrics/                                 feature extractors and scores

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
    from enat.sampler import sample as sample
    from enat.sampler_config import SamplerConfig as SamplerConfig
    from enat.tokenizer import VQGAN as VQGAN

_MODULES = {
    "config": ("ENATConfig", "VQGANConfig"),
    "cost": ("Cost", "generation_cost"),
    "model": ("ENAT", "ENATOutput", "TextCondition"),
    "pipeline": ("ENATPipeline",),
    "sampler": ("sample",),
    "sampler_config": ("SamplerConfig",),
    "tokenizer": ("VQGAN",),
}
_MODULE_OF = {name: f"enat.{module}" for module, names in _MODULES.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
