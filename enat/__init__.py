"""ENAT: the method. Models, sampler, tokenizer, objective, metrics and cost, without any of the machinery that runs them."""

from enat.cost import Cost, generation_cost
from enat.model import ENAT, ENATConfig, ENATOutput, TextCondition
from enat.sampler import SamplerConfig, sample
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
