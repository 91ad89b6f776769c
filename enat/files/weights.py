"""Files of weights, and tensors into modules, whatever the architecture.

read_state_dict            a safetensors file, or a torch file of which only tensors are unpickled
load_configured            the module of a config, from a safetensors file beside it
load_strictly              a state dict into any module

No code of a file is run: torch files are read with weights_only=True.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from enat.config import ENATConfig, VQGANConfig

ConfigT = TypeVar("ConfigT", ENATConfig, VQGANConfig)
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_log = logging.getLogger(__name__)
_NAMED_AT_MOST = 6  # names of tensors in a message


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors file, or from a torch file of which only tensors are unpickled.

    A torch file may hold the state dict under a name, such as "state_dict" (Lightning), "model" or "ema", beside other values.
    Raises ValueError for any other file, and if several state dicts are in it.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; download or copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about a pickle's protocol before it refuses the pickle
            content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not opened: it is not a torch file, or contains more than tensors; save a plain state dict, or safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is cut or damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable file of weights: {reason}") from error
    found = _state_dicts(content)
    if len(found) != 1:
        advice = f"holds several state dicts ({', '.join(found)}); save the one that is meant" if found else "holds no state dict"
        raise ValueError(f"{path} {advice}: torch.save(model.state_dict(), ...)")
    (name, tensors), *_ = found.items()
    if name not in ("", "state_dict"):  # the usual name
        _log.warning("%s: the weights are read from its entry %r", path, name)
    return tensors


def _state_dicts(content: Any, name: str = "") -> dict[str, dict[str, Tensor]]:
    """The dicts of tensors in a file by their names, such as "ema"; "" is the file itself. Optimizers hold no dict of tensors."""
    if not isinstance(content, dict) or not content:
        return {}
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return {name: content}
    if "state_dict" in content:  # Lightning keeps tensors of callbacks beside it
        content = {"state_dict": content["state_dict"]}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key.lower():
            found |= _state_dicts(value, f"{name}.{key}".lstrip("."))
    return found


def load_configured(path: Path, module_class: Callable[[ConfigT], ModuleT], config: ConfigT) -> ModuleT:
    """The ENAT or VQGAN of a config in eval mode, from a safetensors file of its tensors.

    Names and shapes are compared before memory is taken: a config from elsewhere may describe anything. Nothing is drawn from the
    global generator. Raises ValueError for a file that does not fit the config, or that states another one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("enat", "null"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file of weights: {error}") from error
    if header is not None:
        _check_header(header, config, path)
    if config.num_blocks > len(shapes):
        raise ValueError(f"{path} has {len(shapes)} tensors, too few for the {config.num_blocks} blocks of its config")
    try:
        with torch.device("meta"):
            module = module_class(config)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be opened with its config ({reason})") from error
    check_names(shapes_of(module.state_dict()), shapes, str(path))
    return load_strictly(module.to_empty(device="cpu"), load_file(path), source=str(path)).eval()


def _check_header(header: Any, config: ENATConfig | VQGANConfig, path: Path) -> None:
    stated = header.get("config") if isinstance(header, dict) else None
    if not isinstance(stated, dict) or header.get("architecture") != config.architecture:
        raise ValueError(f"{path} does not hold the weights of {config.architecture}")
    own = json.loads(json.dumps(dataclasses.asdict(config)))
    if other := [name for name, value in stated.items() if name not in own or own[name] != value]:
        raise ValueError(f"{path} was written with another {', '.join(other[:_NAMED_AT_MOST])} than its config states")


def load_strictly(module: ModuleT, tensors: Mapping[str, Tensor], source: str = "the state dict") -> ModuleT:
    """Load tensors into a module as float32. A missing, surplus or wrong-shaped tensor raises ValueError with its name.

    So does one of integers, or with a value that is not finite as float32.
    """
    check_names(shapes_of(module.state_dict()), shapes_of(tensors), source)
    check_finite(tensors, source)
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return module


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError, naming the tensor, if one does not hold floating-point numbers that are finite as float32.

    Except for the counters of batch normalization.
    """
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: tensor {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point weights"
            )
        if not torch.isfinite(tensor.to(torch.float32)).all():
            raise ValueError(
                f"{source}: tensor {name} holds values that are NaN or infinite; the file is damaged or training failed"
            )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    both = sorted(expected.keys() & found.keys())
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "wrong shape": [f"{n} is {found[n]}, expected {expected[n]}" for n in both if found[n] != expected[n]],
    }
    if any(problems.values()):
        listed = ". ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        first = {name.partition(".")[0] for name in found}
        pattern = f"all names begin with {first.pop()}.; " if len(first) == 1 and not both and len(found) > 1 else ""
        raise ValueError(f"{source} does not fit the configured architecture ({pattern}{listed})")


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest:,} more" if rest > 0 else "")


def unwrapped(state_dict: Mapping[str, Tensor], expected: Collection[str], source: str) -> Mapping[str, Tensor]:
    """Without what training adds to names: a prefix of all of them (module., _orig_mod., model.), and tensors of a loss (loss.).

    Only if the names that are left are those expected.
    """
    tensors, removed = {name: tensor for name, tensor in state_dict.items() if not name.startswith("loss.")}, []
    if len(tensors) < len(state_dict):
        removed.append("loss.*")
    while tensors and not tensors.keys() & {*expected}:
        prefix = next(iter(tensors)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in tensors):
            return state_dict
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        removed.append(prefix)
    if not removed or tensors.keys() != {*expected}:
        return state_dict
    _log.warning("%s: %s is removed from the names of its tensors", source, " and ".join(removed))
    return tensors
