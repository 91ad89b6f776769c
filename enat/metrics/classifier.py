"""A small network trained on a dataset's own labels, for images that ImageNet features say little about.

Shape legend: N and B images, H x W pixels, F features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from enat.images import to_float


class ClassifierExtractor(nn.Module):
    """A small convolutional classifier; its features are those before the last layer."""

    is_thread_safe = takes_float = True

    def __init__(self, num_classes: int, num_features: int = 64, width: int = 32) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.width = num_classes, num_features, width
        self.outputs: Mapping[str, int] = {"features": num_features}
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.project = nn.Linear(2 * width * 4 * 4, num_features)
        self.classify = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.features(images)}

    def features(self, images: Tensor) -> Tensor:
        """float (B, F)"""
        x = F.gelu(self.stem(to_float(images) * 2 - 1))
        x = F.gelu(self.down2(F.gelu(self.down1(x))))
        # Averaged, never enlarged: for images of at least 16 pixels a 4 x 4 grid keeps the positions of strokes.
        x = F.adaptive_avg_pool2d(x, 4)
        return F.gelu(self.project(x.flatten(1)))

    def logits(self, images: Tensor) -> Tensor:
        """float (B, num_classes)"""
        return self.classify(self.features(images))

    def save(self, path: Path) -> None:
        header = {"classifier": json.dumps([self.num_classes, self.num_features, self.width])}
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> ClassifierExtractor:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        if "classifier" not in header:
            raise ValueError(f"{path} does not contain a classifier")
        extractor = cls(*json.loads(header["classifier"]))
        extractor.load_state_dict(load_file(path))
        return extractor.eval().requires_grad_(False)


@dataclass(frozen=True)
class ClassifierEpoch:
    epoch: int
    loss: float


def train_classifier(
    extractor: ClassifierExtractor, images: Tensor, labels: Tensor, num_epochs: int, generator: torch.Generator
) -> Iterator[ClassifierEpoch]:
    """Train in place on uint8 images (N, 3, H, W) and labels int64 (N,); yields after each epoch.

    Batches are shifted by up to one pixel in 16.
    """
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=1e-3, weight_decay=1e-2)
    reach = max(1, images.shape[-1] // 16)
    for epoch in range(num_epochs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - epoch / num_epochs)
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for index in order.split(64):
            shifts = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            batch = torch.roll(images[index], shifts, dims=(2, 3))
            loss = F.cross_entropy(extractor.logits(batch), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        yield ClassifierEpoch(epoch + 1, total / len(images))
    extractor.eval()
