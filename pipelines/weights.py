"""Reading weights that came from outside, without running anything that they bring."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from enat.checkpoint import load_enat, load_published_enat, load_published_vqgan, load_vqgan
from enat.model import ENAT, ENATConfig
from enat.tokenizer import VQGAN, VQGANConfig

ModuleT = TypeVar("ModuleT", ENAT, VQGAN)


def open_vqgan(path: Path, config: VQGANConfig) -> VQGAN:
    """A tokenizer from a published file or one of save_weights, in eval mode. Raises ValueError where it is not of this config."""
    if _is_own(path):
        return _checked(load_vqgan(path), config, path)
    return load_published_vqgan(read_state_dict(path), config)


def open_enat(path: Path, config: ENATConfig) -> ENAT:
    """The same for a generator."""
    if _is_own(path):
        return _checked(load_enat(path), config, path)
    return load_published_enat(read_state_dict(path), config)


def _is_own(path: Path) -> bool:
    """Whether save_weights wrote the file: then its header says what it holds."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return "enat" in (file.metadata() or {})
    except SafetensorError:
        return False


def _checked(module: ModuleT, config: Any, path: Path) -> ModuleT:
    if module.config != config:
        raise ValueError(f"{path} holds {module.config}, but the config says {config}")
    return module


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from .safetensors, or from a torch file without unpickling anything but tensors.

    A torch file may hold the state dict under "state_dict". Raises ValueError for what is no file of weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of a pickle's protocol, also of one that it refuses next
            content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not opened: it is no torch file, or holds more than tensors; save a plain state dict, or safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no readable file of weights: {str(error).splitlines()[0]}") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict; save model.state_dict()")
    return tensors
