"""Feature extractors behind one small interface: 8-bit images in, named float32 outputs out.

"inception" is the network of published FIDs, "inception_clean" the same with clean-fid's resizing, "classifier" a small network
trained on a dataset's own labels, "dinov2" and "clip" are image encoders. Others join through register_extractor. A built-in
network is imported when the first one is loaded.

Outputs: "features" (B, F) always; "spatial" (B, S) and "logits" (B, K) of networks that have them.
Shape legend: B images, H x W pixels, F features, S spatial features, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class FeatureExtractor(Protocol):
    """outputs: name -> width; "features" is always among them.

    __call__: uint8 (B, 3, H, W) -> output name -> float32 (B, width), on the same device; each image is processed independently. An
    extractor with the attribute `takes_float = True` also takes float32 images in 0..255 that were not rounded, as those of this
    package do.

    An extractor with the attribute `is_thread_safe = True`, as those of this package, may be called by several threads at once: it
    stores nothing of a call on itself, nor in hooks of its layers. All others are called by one thread.
    """

    outputs: Mapping[str, int]

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...

    def to(self, device: str) -> FeatureExtractor: ...


ExtractorFactory = Callable[[Path], FeatureExtractor]


def _built_in(module: str, name: str) -> ExtractorFactory:
    return lambda path: getattr(import_module(f"enat.metrics.{module}"), name).load(path)


_FACTORIES: dict[str, ExtractorFactory] = {
    "classifier": _built_in("classifier", "ClassifierExtractor"),
    "inception": _built_in("inception", "InceptionExtractor"),
    "inception_clean": _built_in("inception", "CleanInceptionExtractor"),
    "dinov2": _built_in("image_encoders", "ImageEncoder"),
    "clip": _built_in("image_encoders", "ImageEncoder"),
}
BUILT_IN = tuple(_FACTORIES)
WIDTHS = {"classifier": 64, "inception": 2048, "inception_clean": 2048, "dinov2": 1024, "clip": 768}  # of the usual weights
OF_INCEPTION = ("inception", "inception_clean")  # with the same weights


def register_extractor(kind: str, factory: ExtractorFactory) -> None:
    """Register a kind of extractor under the name that configs use.

    `factory`: path of a safetensors file with the weights that the config names (empty if it names none) -> the extractor on the
    CPU, ready to be called. It is sent to workers, so it must be a function or class of a module that they can import. Raises
    ValueError for a name that is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", kind):
        raise ValueError(f"the name {kind!r} of a feature extractor must consist of lower-case letters, digits, '_' and '-'")
    if kind in _FACTORIES:
        raise ValueError(f"a feature extractor named {kind!r} already exists; choose another name")
    _FACTORIES[kind] = factory


def extractor_macs(kind: str, resolution: int) -> float:
    """MACs of one image. Image encoders count as ViT-L/14 at 224 pixels; kinds that were registered as 0: theirs are not known."""
    if kind == "classifier":
        return 3 * 9 * 32 * resolution**2 + 9 * 32 * 64 * (resolution // 2) ** 2 + 9 * 64 * 64 * (resolution // 4) ** 2 + 1024 * 64
    return {"inception": 5.7e9, "inception_clean": 5.7e9, "dinov2": 81e9, "clip": 81e9}.get(kind, 0.0)


def extractor_kinds() -> tuple[str, ...]:
    return tuple(_FACTORIES)


def extractor_factory(kind: str) -> ExtractorFactory:
    """Raises ValueError for an unknown kind."""
    if kind not in _FACTORIES:
        raise ValueError(f"unknown feature extractor {kind!r}; choose one of {', '.join(_FACTORIES)}")
    return _FACTORIES[kind]


def load_extractor(kind: str, path: Path) -> FeatureExtractor:
    """An extractor from its file of weights. Raises ValueError for an unknown kind and for the file of another kind."""
    return extractor_factory(kind)(path)
