"""ENAT: the method, without the machinery that runs it.

config, blocks, model                    ENAT and the models it is compared with
masking, loss                            which codes are masked in training, and the objective
schedule, sampler_config, sampler        parallel decoding in a few steps
cost                                     MACs of training and generation
tokenizer, tokenizer_training            the VQGAN, and a recipe for small images
text                                     CLIP's text model
checkpoint                               weights in and out, ours and published ones
images                                   decoding, cropping and encoding pixels
metrics/                                 feature extractors and scores
"""

from enat.config import ENATConfig
from enat.cost import Cost, generation_cost
from enat.model import ENAT, ENATOutput, TextCondition
from enat.sampler import sample
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN, VQGANConfig

__all__ = [
    "ENAT",
    "VQGAN",
    "Cost",
    "ENATConfig",
    "ENATOutput",
    "SamplerConfig",
    "TextCondition",
    "VQGANConfig",
    "generation_cost",
    "sample",
]
