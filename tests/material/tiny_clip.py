"""A CLIP text model of two layers with a tokenizer of its own, written into a folder as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = [("a", "t</w>"), ("c", "at</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("d", "o"), ("do", "g</w>")]


def write_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt in CLIP's order: bytes, bytes that end a word, merges, start, end. Returns the number of ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in _MERGES), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in _MERGES)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return len(pieces)


def tiny_text_config(num_ids: int, **overrides: Any) -> Any:
    """A CLIPTextConfig: T = 77 positions, W = 32."""
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": num_ids, "bos_token_id": num_ids - 2, "eos_token_id": num_ids - 1}
    return CLIPTextConfig(**{**sizes, **tokens, "max_position_embeddings": 77, **overrides})


def randomized(model: Any, seed: int = 0) -> Any:
    """Every parameter gets N(0, 0.2), added to 1 for the scales of norms: as initialised, attention is nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, 0.2, generator=generator).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def make_tiny_clip(folder: Path, *, kind: str = "text", seed: int = 0, **overrides: Any) -> Path:
    """Write tokenizer, config.json and model.safetensors; returns the folder.

    kind: "text" for a CLIPTextModel, "full" for a CLIPModel with an image part, as openai/clip-vit-large-patch14 is.
    overrides: fields of the CLIPTextConfig. Equal arguments write equal bytes.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionConfig

    config = tiny_text_config(write_tokenizer(folder), **overrides)
    with torch.random.fork_rng(devices=[]):
        if kind == "text":
            model = CLIPTextModel(config)
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16, "num_hidden_layers": 1}
            vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
            model = CLIPModel(CLIPConfig(text_config=config.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    randomized(model, seed).save_pretrained(folder)
    return folder
