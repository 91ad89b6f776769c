"""Weights in and out: safetensors with the architecture in the header, and adapters for published state dicts.

save_weights, load_enat, load_vqgan            our own files
open_enat, open_vqgan                          a file that is ours or published
load_published_enat, load_published_vqgan      published state dicts

How files are read, and tensors checked, is in enat/files/weights.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from enat.blocks import MLP
from enat.config import ENATConfig
from enat.files.weights import check_names, load_strictly, read_state_dict, shapes_of, unwrapped
from enat.model import ENAT
from enat.tokenizer import VQGAN, VQGANConfig

OwnT = TypeVar("OwnT", ENAT, VQGAN)

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
    # One entry only: safetensors writes several in an order that changes from run to run, and equal weights must give equal bytes.
    config = {"architecture": module.config.architecture, "config": dataclasses.asdict(module.config)}
    header = {"enat": json.dumps(config, sort_keys=True)}
    state = module.state_dict() if tensors is None else tensors
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, str(path), metadata=header)


def load_enat(path: str | Path) -> ENAT:
    """An ENAT in eval mode from a file of save_weights. Raises ValueError for a file of another architecture or a damaged one.

    Config fields that the file does not contain get their defaults: they were added after the file was written.
    """
    return _load(path, ENAT, ENATConfig)


def load_vqgan(path: str | Path) -> VQGAN:
    """A VQGAN in eval mode from a file of save_weights. Raises ValueError as load_enat does."""
    return _load(path, VQGAN, VQGANConfig)


def _load(path: str | Path, module_class: Callable[[Any], OwnT], config_class: type[ENATConfig | VQGANConfig]) -> OwnT:
    architecture = config_class.architecture
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
    shapes = shapes_of({published: model.state_dict()[own] for published, own in names.items()} | unused)
    shapes["mlm_layer.bias"] = (1, 1, config.codebook_size + 1)
    state_dict = unwrapped(state_dict, shapes, "the published ENAT")
    check_names(shapes, shapes_of(state_dict), "the published ENAT")
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
    shapes = shapes_of({published: vqgan.state_dict()[own] for published, own in names.items()})
    state_dict = unwrapped(state_dict, shapes, "the published VQGAN")
    check_names(shapes, shapes_of(state_dict), "the published VQGAN")
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
