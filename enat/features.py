"""Feature extractors behind one small interface: uint8 images in, float32 features out.

"inception" is torch-fidelity's InceptionV3, the network of published FIDs. "classifier" is a small network trained on a
dataset's own labels, for images that ImageNet features say little about.

Shape legend: B images, H x W pixels, F features.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from enat.images import to_float

EXTRACTORS = ("classifier", "inception")


class FeatureExtractor(Protocol):
    """num_features: F.   __call__: uint8 (B, 3, H, W) -> float32 (B, F) on the same device."""

    num_features: int

    def __call__(self, images: Tensor) -> Tensor: ...

    def to(self, device: str) -> FeatureExtractor: ...


class ClassifierExtractor(nn.Module):
    """A small convolutional classifier; its features are those before the last layer."""

    def __init__(self, num_classes: int, num_features: int = 64, width: int = 32) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.width = num_classes, num_features, width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.project = nn.Linear(2 * width * 4 * 4, num_features)
        self.classify = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.stem(to_float(images) * 2 - 1))
        x = F.gelu(self.down2(F.gelu(self.down1(x))))
        # Averaged, never enlarged: a 4 x 4 grid keeps where strokes are for any image of 16 pixels and more.
        x = F.adaptive_avg_pool2d(x, 4)
        return F.gelu(self.project(x.flatten(1)))

    def logits(self, images: Tensor) -> Tensor:
        """float (B, num_classes)"""
        return self.classify(self(images))

    def save(self, path: Path) -> None:
        header = {"classifier": json.dumps([self.num_classes, self.num_features, self.width])}
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> ClassifierExtractor:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        if "classifier" not in header:
            raise ValueError(f"{path} holds no classifier")
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


class InceptionExtractor(nn.Module):
    """torch-fidelity's InceptionV3, 2048 features after the last pooling.

    weights: its state dict. None lets torch-fidelity fetch the published weights.
    """

    num_features = 2048

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with tempfile.TemporaryDirectory() as folder:
            path = None
            if weights is not None:
                # torch-fidelity opens its file with weights_only=False, so it gets one that was written here.
                path = str(Path(folder) / "inception.pth")
                torch.save(weights, path)
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def load_extractor(kind: str, path: Path) -> FeatureExtractor:
    """An extractor from the file that the reference stage kept. Raises ValueError for another kind."""
    if kind == "classifier":
        return ClassifierExtractor.load(path)
    if kind == "inception":
        return InceptionExtractor(load_file(path))
    raise ValueError(f"no feature extractor is called {kind!r}; choose one of {', '.join(EXTRACTORS)}")
