"""Image encoders of transformers as feature extractors: DINOv2 (class token) and CLIP (projected image embedding).

Images are resized to the encoder's size as in torch-fidelity, with TensorFlow 1's bilinear resizing. Weights are read from a folder
in the hub's format, safetensors only. torch-fidelity's own loaders are not used: for DINOv2 they execute code of a main branch, and
for CLIP TorchScript, which is code as well. The published code of DINOv2 resamples positions differently from transformers; this
module follows the published code.

Shape legend: B images, H x W pixels, F features, L patches of an image, D width of embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from enat.files.weights import check_finite

# Mean and standard deviation of RGB in [0, 1] that each was trained with.
_NORMALIZATION = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_DINOV2_SIDE = 224  # of its evaluation; its positions belong to a larger grid, 37 x 37
_DINOV2_OFFSET = 0.1  # patches; interpolate_offset of the published code
_HEADER = "image_encoder"


class ImageEncoder(nn.Module):
    """kind: "dinov2" or "clip".   model: transformers' Dinov2Model or CLIPVisionModelWithProjection."""

    is_thread_safe = True  # transformers collects intermediate outputs in context variables
    takes_float = True
    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, model: Any) -> None:
        super().__init__()
        self.kind = kind
        self.model = model.eval().requires_grad_(False)
        if kind == "dinov2":
            self.model.embeddings.interpolate_pos_encoding = self._positions
        self.side = _DINOV2_SIDE if kind == "dinov2" else model.config.image_size
        self.outputs: Mapping[str, int] = {
            "features": model.config.hidden_size if kind == "dinov2" else model.config.projection_dim
        }
        mean, std = _NORMALIZATION[kind]
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W), or float32 in 0..255 -> "features" float32 (B, F)"""
        output = self.model(pixel_values=(self.resize(images) - self.mean) / self.std)
        return {"features": (output.pooler_output if self.kind == "dinov2" else output.image_embeds).float()}

    def resize(self, images: Tensor) -> Tensor:
        """To float32 (B, 3, side, side), in 0..255."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        side = self.side
        resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(side, side), align_corners=False)
        return resized

    def _positions(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + L, D) for embeddings (B, 1 + L, D), resampled as in the published code: by a factor slightly
        larger than the ratio of the sizes, which shifts and stretches the grid a little. transformers uses the sizes themselves.
        """
        positions = self.model.embeddings.position_embeddings
        grid_size = math.isqrt(positions.shape[1] - 1)
        if embeddings.shape[1] == positions.shape[1] and height == width:
            return positions
        patch_size = self.model.config.patch_size
        factors = [(side // patch_size + _DINOV2_OFFSET) / grid_size for side in (height, width)]
        grid = positions[:, 1:].reshape(1, grid_size, grid_size, -1).permute(0, 3, 1, 2)
        resampled = F.interpolate(grid.float(), scale_factor=factors, mode="bicubic")
        assert resampled.shape[2] * resampled.shape[3] == embeddings.shape[1] - 1
        return torch.cat([positions[:, :1], resampled.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)

    def save(self, path: Path) -> None:
        header = {_HEADER: json.dumps([self.kind, self.model.config.to_dict()])}
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> ImageEncoder:
        """From a file of save. Raises ValueError for any other file."""
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
        if header is None:
            raise ValueError(f"{path} does not contain an image encoder")
        kind, fields = json.loads(header)
        config_class, model_class = _classes(kind)
        with torch.random.fork_rng(devices=[]):  # transformers' initialisers take no generator
            model = model_class(config_class.from_dict(fields))
        model.load_state_dict(load_file(path))
        return cls(kind, model)


def read_image_encoder(kind: str, folder: Path) -> ImageEncoder:
    """From a folder in the hub's format, such as facebook/dinov2-large: config.json and model.safetensors (or its shards).

    Nothing is unpickled, downloaded or executed. Raises ValueError if the folder does not contain such an encoder with all of its
    weights.
    """
    config_class, model_class = _classes(kind)
    try:
        fields = json.loads((folder / "config.json").read_bytes())
        found = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no {kind}: its config.json cannot be read ({error})") from error
    allowed = {"dinov2": ("dinov2",), "clip": ("clip", "clip_vision_model")}[kind]
    if found not in allowed:
        raise ValueError(f"{folder} holds a model of type {found}, not {' or '.join(allowed)}, which extractor {kind} needs")
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            model, report = model_class.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable weights of {kind} ({' '.join(str(error).split())[:200]})") from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing or report["mismatched_keys"]:  # transformers would initialise them at random
        named = ", ".join(missing[:3] or sorted(str(key[0]) for key in report["mismatched_keys"])[:3])
        raise ValueError(f"{folder} does not hold all weights of {kind}: {named} missing or of another shape")
    check_finite(model.state_dict(), str(folder))
    return ImageEncoder(kind, model)


def _classes(kind: str) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    return (Dinov2Config, Dinov2Model) if kind == "dinov2" else (CLIPVisionConfig, CLIPVisionModelWithProjection)
