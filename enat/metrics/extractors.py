"""Feature extractors behind one small interface: images of 8 bits in, named float32 outputs out.

"inception" is torch-fidelity's InceptionV3, the network of published FIDs. "classifier" is a small network trained on a
dataset's own labels, for images that ImageNet features say little about. "dinov2" and "clip" are image encoders of transformers
(enat/image_encoders.py). Others join through register_extractor.

Outputs: "features" (B, F) always; "spatial" (B, S) and "logits" (B, K) of networks that have them.
Shape legend: B images, H x W pixels, F features, S spatial features, K classes.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from enat.images import to_float
from enat.metrics.image_encoders import ImageEncoder


class FeatureExtractor(Protocol):
    """outputs: name -> width; "features" is always among them.

    __call__: uint8 (B, 3, H, W) -> output name -> float32 (B, width), on the same device; each image seen alone. One with an
    attribute `takes_float = True` also takes float32 images in 0..255 that were not rounded, as those of this module do.

    An extractor with an attribute `is_thread_safe = True` may be called by several threads at once, as those of this module may:
    it keeps nothing of a call on itself, also not in hooks of its layers. All others are called by one thread.
    """

    outputs: Mapping[str, int]

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...

    def to(self, device: str) -> FeatureExtractor: ...


ExtractorFactory = Callable[[Path], FeatureExtractor]


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
        # Averaged, never enlarged: a 4 x 4 grid keeps where strokes are for any image of 16 pixels and more.
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


_INCEPTION_LAYERS = ["2048", "logits_unbiased"]


class InceptionExtractor(nn.Module):
    """torch-fidelity's InceptionV3 of the original FID, with the outputs of ADM's evaluation.

    "features" 2048, after the last pooling. "logits" 1008, without the bias, as the Inception Score takes them.
    "spatial" 2023, of ADM's sFID: the first 7 channels at 17 x 17 positions of what the original graph calls "mixed_6/conv".
    The graph counts its blocks from "mixed" (Mixed_5b), so mixed_6 is Mixed_6d, and its first convolution is the 1x1 branch,
    taken behind the ReLU. Values are in the order row, column, channel, as ADM's reference statistics (mu_s, sigma_s) have them.

    weights: a state dict of torch-fidelity's network.
    """

    is_thread_safe = takes_float = True
    outputs: Mapping[str, int] = {"features": 2048, "spatial": 17 * 17 * 7, "logits": 1008}

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity opens its file with weights_only=False, so it gets one that was written here.
            path = str(Path(folder) / "inception.pth")
            torch.save(dict(weights), path)
            try:
                self.network = FeatureExtractorInceptionV3("inception", _INCEPTION_LAYERS, feature_extractor_weights_path=path)
            except RuntimeError as error:  # what load_state_dict raises: several lines of names
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"the weights are not those of torch-fidelity's InceptionV3 ({reason})") from error
        # Hooks for all calls, and a place for each thread: a hook that lasts for a call would also see the images of others.
        self._tap = threading.local()
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.network.Conv2d_1a_3x3.register_forward_pre_hook(self._put_unrounded)

    def _keep(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._tap.output = output

    def _put_unrounded(self, _: nn.Module, pixels: tuple[Tensor]) -> tuple[Tensor]:
        """torch-fidelity's network takes uint8 alone. Images that were not rounded are resized as it does, and take the place of
        what it made of rounded ones."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        images = self._tap.__dict__.pop("unrounded", None)
        if images is None:
            return pixels
        side = self.network.INPUT_IMAGE_SIZE
        return ((interpolate_bilinear_2d_like_tensorflow1x(images, size=(side, side), align_corners=False) - 128) / 128,)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8:
            self._tap.unrounded = images.to(torch.float32)
            images = images.to(torch.uint8)
        features, logits = self.network(images)
        spatial = self._tap.output[:, :7].permute(0, 2, 3, 1).flatten(1).float()
        del self._tap.output  # it would be held until the thread's next call
        return {"features": features, "spatial": spatial, "logits": logits}

    def save(self, path: Path) -> None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}, path)


def published_inception_weights() -> dict[str, Tensor]:
    """The weights that torch-fidelity publishes, fetched on first use into torch's hub cache.

    torch-fidelity's own download checks no hash and unpickles what comes; this one checks the hash that the file's name holds and
    takes tensors only. Raises ValueError where they cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"InceptionV3's published weights cannot be fetched ({error}); name a file of them") from error
    return weights


_FACTORIES: dict[str, ExtractorFactory] = {
    "classifier": ClassifierExtractor.load,
    "inception": lambda path: InceptionExtractor(load_file(path)),
    "dinov2": ImageEncoder.load,
    "clip": ImageEncoder.load,
}
BUILT_IN = tuple(_FACTORIES)


def register_extractor(kind: str, factory: ExtractorFactory) -> None:
    """Make a kind of extractor known to configs under its name.

    factory: path of a safetensors file with the weights that the config names (empty where it names none) -> the extractor on the
    CPU, ready to be called. It is sent to workers, so it is a function or class of a module that they can import, too. Raises
    ValueError for a name that is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", kind):
        raise ValueError(f"the name {kind!r} of a feature extractor must be lower-case letters, digits, '_' and '-'")
    if kind in _FACTORIES:
        raise ValueError(f"a feature extractor is called {kind!r} already; choose another name")
    _FACTORIES[kind] = factory


def extractor_kinds() -> tuple[str, ...]:
    return tuple(_FACTORIES)


def extractor_factory(kind: str) -> ExtractorFactory:
    """Raises ValueError for a kind that is not known."""
    if kind not in _FACTORIES:
        raise ValueError(f"no feature extractor is called {kind!r}; choose one of {', '.join(_FACTORIES)}")
    return _FACTORIES[kind]


def load_extractor(kind: str, path: Path) -> FeatureExtractor:
    """An extractor from the file that the reference stage kept. Raises ValueError for an unknown kind or another kind's file."""
    return extractor_factory(kind)(path)
