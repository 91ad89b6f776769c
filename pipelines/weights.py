"""Files of weights that came from outside."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def existing_file(path: str, key: str) -> Path:
    """The file that config key `key` names. Raises ValueError where there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{key} is {path}, which is no file")
    return file


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from .safetensors, or from a torch file without unpickling anything but tensors.

    A torch file may hold the state dict under "state_dict". Raises ValueError for what is no file of weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of a pickle's protocol, also of one that it refuses next
            content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not opened: it is no torch file, or holds more than tensors") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no readable file of weights: {str(error).splitlines()[0]}") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict")
    return tensors
