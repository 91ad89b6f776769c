"""Weights in and out: safetensors with the architecture in the header, and adapters for published state dicts.

save_weights, load_enat, load_vqgan            our own files
load_configured                                a safetensors file whose architecture is given beside it
open_enat, open_vqgan, read_state_dict         a file that is ours or published
load_published_enat, load_published_vqgan      published state dicts
load_strictly                                  a state dict into any module

Nothing here unpickles: torch files are read with weights_only=True.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from enat.blocks import MLP
from enat.config import ENATConfig
from enat.model import ENAT
from enat.tokenizer import VQGAN, VQGANConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)
OwnT = TypeVar("OwnT", ENAT, VQGAN)

_log = logging.getLogger(__name__)
_NAMED_AT_MOST = 6  # names of tensors in a message
_ARCHITECTURES: dict[str, tuple[type[Any], type[Any]]] = {"enat": (ENAT, ENATConfig), "vqgan": (VQGAN, VQGANConfig)}

_PUBLISHED_IN_BLOCK = {
    "attention.query": "attn.q",
    "attention.key_value_conditioning": "attn.kv.A",
    "attention.key_value_own": "attn.kv.B",
    "attention.project": "attn.proj",
    "modulation": "adaLN_modulation.1",
}
_PUBLISHED_OUTSIDE = {
    "token_embedding": "x_embedder.word_embeddings",
    "position_embedding": "x_embedder.position_embeddings",
    "embedding_norm": "x_embedder.LayerNorm",
    "label_embedding": "y_embedder.embedding_table",
    "previous_projection.norm": "prev_proj.norm",
    "previous_projection.mlp.fc1": "prev_proj.mlp.fc1",
    "previous_projection.mlp.fc2": "prev_proj.mlp.fc2",
    "head.norm_in": "norm",
    "head.dense": "mlm_layer.fc",
    "head.norm_out": "mlm_layer.ln",
    "head": "mlm_layer",
}


def save_weights(path: str | Path, module: ENAT | VQGAN, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a safetensors file that holds all that load_enat or load_vqgan needs.

    `tensors`: other values for the module's state dict, such as its EMA.
    """
    architecture = next(name for name, (cls, _) in _ARCHITECTURES.items() if isinstance(module, cls))
    # One entry only: safetensors writes several in an order that changes from run to run, and equal weights must give equal bytes.
    header = {"enat": json.dumps({"architecture": architecture, "config": dataclasses.asdict(module.config)}, sort_keys=True)}
    state = module.state_dict() if tensors is None else tensors
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, str(path), metadata=header)


def load_enat(path: str | Path) -> ENAT:
    """An ENAT in eval mode from a file of save_weights. Raises ValueError for a file of another architecture or a damaged one.

    Config fields that the file does not contain get their defaults: they were added after the file was written.
    """
    return _load(path, "enat")


def load_vqgan(path: str | Path) -> VQGAN:
    """A VQGAN in eval mode from a file of save_weights. Raises ValueError as load_enat does."""
    return _load(path, "vqgan")


def _load(path: str | Path, architecture: str) -> Any:
    module_class, config_class = _ARCHITECTURES[architecture]
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("enat", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file of weights: {error}") from error
    found = header.get("architecture") if isinstance(header, dict) else None
    if found != architecture:
        raise ValueError(f"{path} holds {found or 'no known architecture'}, not the weights of {architecture}")
    try:
        module = module_class(config_class(**header["config"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of a field that is unknown, or of a value that fits none
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # torch appends its own stack
        raise ValueError(f"{path} describes its {architecture} with fields that cannot be used ({reason})") from error
    return load_strictly(module, tensors, source=str(path)).eval()


def load_configured(path: Path, config: ENATConfig | VQGANConfig) -> Any:
    """The ENAT or VQGAN of a config in eval mode, from a safetensors file of its tensors.

    Names and shapes are compared before memory is taken: a config from elsewhere may describe anything. Nothing is drawn from the
    global generator. Raises ValueError for a file that does not fit the config, or that states another one.
    """
    architecture = next(name for name, (_, config_class) in _ARCHITECTURES.items() if isinstance(config, config_class))
    module_class, _ = _ARCHITECTURES[architecture]
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("enat", "null"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file of weights: {error}") from error
    if header is not None:
        _check_header(header, architecture, config, path)
    num_blocks = (
        config.encoder_layers + config.decoder_layers
        if isinstance(config, ENATConfig)
        else config.num_res_blocks * len(config.channel_multipliers)
    )
    if num_blocks > len(shapes):
        raise ValueError(f"{path} has {len(shapes)} tensors, too few for the {num_blocks} blocks of its config")
    try:
        with torch.device("meta"):
            module = module_class(config)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be opened with its config ({reason})") from error
    _check_names(_shapes(module.state_dict()), shapes, str(path))
    return load_strictly(module.to_empty(device="cpu"), load_file(path), source=str(path)).eval()


def _check_header(header: Any, architecture: str, config: Any, path: Path) -> None:
    stated = header.get("config") if isinstance(header, dict) else None
    if not isinstance(stated, dict) or header.get("architecture") != architecture:
        raise ValueError(f"{path} does not hold the weights of {architecture}")
    own = json.loads(json.dumps(dataclasses.asdict(config)))
    if other := [name for name, value in stated.items() if name not in own or own[name] != value]:
        raise ValueError(f"{path} was written with another {', '.join(other[:_NAMED_AT_MOST])} than its config states")


def open_vqgan(path: Path, config: VQGANConfig) -> VQGAN:
    """A tokenizer in eval mode, from a published file or one of save_weights. Raises ValueError if it does not match `config`."""
    return _open(path, config, load_vqgan, load_published_vqgan)


def open_enat(path: Path, config: ENATConfig) -> ENAT:
    """The same for a model."""
    return _open(path, config, load_enat, load_published_enat)


def _open(path: Path, config: Any, load: Callable[[Path], OwnT], load_published: Callable[[Any, Any], OwnT]) -> OwnT:
    try:
        with safe_open(str(path), framework="pt") as file:
            is_own = "enat" in (file.metadata() or {})  # save_weights writes the architecture into the header
    except SafetensorError:
        is_own = False
    if not is_own:
        return load_published(read_state_dict(path), config)
    module = load(path)
    if module.config != config:
        raise ValueError(f"{path} contains {module.config}, but the config is {config}")
    return module


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


def _unwrapped(state_dict: Mapping[str, Tensor], expected: Collection[str], source: str) -> Mapping[str, Tensor]:
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


def load_published_enat(state_dict: Mapping[str, Tensor], config: ENATConfig) -> ENAT:
    """An ENAT in eval mode from a published state dict, checked as in load_strictly; errors contain the published names.

    Only the published architecture can be loaded: self-cross attention with reuse of visible tokens, without text and qk_norm. The
    method never calls the published `prev_embedder`: its shapes are checked and its values are dropped.
    """
    if config.decoder_attention != "self_cross" or not config.reuse:
        raise ValueError("published ENAT weights belong to decoder_attention='self_cross' with reuse=True")
    if config.text_width is not None or config.qk_norm or config.reused_features != "visible":
        raise ValueError("published ENAT weights have neither text_width nor qk_norm, and reused_features must be 'visible'")
    model = ENAT(config)
    names = {_published_enat_name(name, config): name for name in model.state_dict()}
    unused = {f"prev_embedder.{name}": tensor for name, tensor in MLP(config.embed_dim, config.mlp_ratio).state_dict().items()}
    shapes = _shapes({published: model.state_dict()[own] for published, own in names.items()} | unused)
    shapes["mlm_layer.bias"] = (1, 1, config.codebook_size + 1)
    state_dict = _unwrapped(state_dict, shapes, "the published ENAT")
    _check_names(shapes, _shapes(state_dict), "the published ENAT")
    tensors = {own: state_dict[published] for published, own in names.items()}
    return load_strictly(model, {**tensors, "head.bias": tensors["head.bias"].flatten()}).eval()


def load_published_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from a published state dict (encoder.*, decoder.*, quantize.embedding.weight), in eval mode, strict.

    In the layout of MAGE or of open-muse, which differ in names only. Raises ValueError for VQGANs of another architecture (taming-
    transformers, LlamaGen, diffusers) with what they have beside this one, and as load_strictly does.
    """
    if (elsewhere := _foreign_layout(state_dict)) is not None:
        raise ValueError(elsewhere)
    is_of_muse = any(_OF_OPEN_MUSE.search(name) for name in state_dict)
    vqgan = VQGAN(config)
    names = {(_open_muse_name(name) if is_of_muse else _mage_name(name)): name for name in vqgan.state_dict()}
    shapes = _shapes({published: vqgan.state_dict()[own] for published, own in names.items()})
    state_dict = _unwrapped(state_dict, shapes, "the published VQGAN")
    _check_names(shapes, _shapes(state_dict), "the published VQGAN")
    return load_strictly(vqgan, {own: state_dict[published] for published, own in names.items()}).eval()


_OF_OPEN_MUSE = re.compile(r"coder\.(mid\.\d+|up\.\d+\.upsample_conv)\.")
_LAYOUTS = {  # of VQGANs of another architecture: a tensor that only they have
    "LlamaGen": re.compile(r"coder\.conv_blocks\."),
    "diffusers": re.compile(r"coder\.(down|up)_blocks\."),
    "taming-transformers": re.compile(r"coder\.(mid\.attn_1|down\.\d+\.(downsample|attn\.))|(^|\.)(post_)?quant_conv\."),
}
_PARTS = {  # what such a VQGAN has and this one has not
    "attention": re.compile(r"\.attn(_\d+)?\.|attentions\.|mid\.\d+\.(q|k|v|proj_out)\."),
    "convolutions that halve the resolution": re.compile(r"\.downsample(rs\.\d+)?\.conv\."),
    "a projection around the codebook": re.compile(r"(^|\.)(post_)?quant_conv\."),
    "biases in residual blocks": re.compile(r"\.conv[12]\.bias$"),
}


def _mage_name(name: str) -> str:
    """Our name of a tensor of a VQGAN -> its name in the layout of MAGE."""
    return name.replace("codebook.", "quantize.embedding.")


def _open_muse_name(name: str) -> str:
    """The same in the layout of open-muse, in which MaskGIT's VQGAN is published."""
    name = re.sub(r"\.mid\.block_(\d)\.", lambda match: f".mid.{int(match[1]) - 1}.", _mage_name(name))
    return name.replace(".upsample.conv.", ".upsample_conv.")


def _foreign_layout(state_dict: Mapping[str, Tensor]) -> str | None:
    """A sentence about a VQGAN of another architecture, None if it is not known to be one."""
    layout = next((layout for layout, own in _LAYOUTS.items() if any(map(own.search, state_dict))), None)
    if layout is None:
        return None
    parts = [part for part, own in _PARTS.items() if any(map(own.search, state_dict))]
    book = next((tensor for name, tensor in state_dict.items() if name.endswith("quantize.embedding.weight")), None)
    size = f", and a codebook of {book.shape[0]:,} x {book.shape[1]}" if book is not None and book.ndim == 2 else ""
    return (
        f"the weights are a VQGAN in the layout of {layout} with {', '.join(parts) or 'other tensors'}{size}; "
        "only MaskGIT's VQGAN, which is without these parts, can be loaded (in the layout of MAGE or open-muse)"
    )


def _published_enat_name(name: str, config: ENATConfig) -> str:
    """Our name of a tensor -> its published name. The published numbering continues from encoder to decoder blocks."""
    prefix, _, rest = name.partition(".")
    if prefix in ("encoder", "decoder"):
        index, _, rest = rest.partition(".")
        for own, published in _PUBLISHED_IN_BLOCK.items():
            rest = rest.replace(own, published)
        return f"blocks.{int(index) + (config.encoder_layers if prefix == 'decoder' else 0)}.{rest}"
    return f"{_PUBLISHED_OUTSIDE[name.rpartition('.')[0] if name != 'head.bias' else 'head']}.{name.rpartition('.')[2]}"


def load_strictly(module: ModuleT, tensors: Mapping[str, Tensor], source: str = "the state dict") -> ModuleT:
    """Load tensors into a module as float32. A missing, surplus or wrong-shaped tensor raises ValueError with its name.

    So does one of integers, or with a value that is not finite as float32.
    """
    _check_names(_shapes(module.state_dict()), _shapes(tensors), source)
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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
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
