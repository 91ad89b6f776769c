"""Caption features on disk: the text encoder's output for every caption of a dataset.

The captions of a dataset are numbered 0..N-1. Each file `captions-00000.safetensors`, ... holds captions_per_file of them, the last
file holds the rest. `empty.safetensors` holds the empty caption, whose index is -1. Tensors: `hidden` float16 (R, T, W), `pooled`
float16 (R, W), `num_tokens` int16 (R,). The empty caption has no axis R and no num_tokens. The header's entry `enat` is JSON: index
of the first caption, digest of the encoder, version of the format.

Shape legend: N captions, R captions of a file, T positions, W width, B captions of a batch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.workflow.summary import Summary

if TYPE_CHECKING:
    from torch import Tensor

    from enat.text import TextFeatures


FORMAT_VERSION = 1
EMPTY = "empty.safetensors"
EMPTY_INDEX = -1
MAX_OPEN_FILES = 64
_HEADER = "enat"
_DTYPES = {"hidden": "F16", "pooled": "F16", "num_tokens": "I16"}


@dataclass(frozen=True, kw_only=True)
class CaptionFeaturesInfo:
    """Description of caption features, stored in the manifest's summary under `info`."""

    num_captions: int
    captions_per_file: int
    num_positions: int
    width: int
    encoder_digest: str
    format_version: int = FORMAT_VERSION

    @property
    def num_files(self) -> int:
        """Number of files, not counting that of the empty caption."""
        return -(-self.num_captions // self.captions_per_file)

    def captions_from(self, start: int) -> int:
        """R: number of captions in the file whose first caption is start."""
        return min(self.captions_per_file, self.num_captions - start)


@dataclass(frozen=True, kw_only=True)
class CaptionsSummary(Summary):
    """dataset_digest: of the dataset's index, whose captions these are."""

    info: CaptionFeaturesInfo
    dataset_digest: str


def captions_name(number: int) -> str:
    """Name of the file that begins with caption number * captions_per_file."""
    return f"captions-{number:05d}.safetensors"


def write_captions(path: Path, info: CaptionFeaturesInfo, start: int, features: TextFeatures) -> None:
    """Write the file whose first caption is start. `features`: of all its captions, R = info.captions_from(start)."""
    assert start in range(0, info.num_captions, info.captions_per_file), (start, info)
    _write(path, info, start, {"hidden": features.hidden, "pooled": features.pooled, "num_tokens": features.num_tokens.short()})


def write_empty(path: Path, info: CaptionFeaturesInfo, features: TextFeatures) -> None:
    """Write the file of the empty caption. `features`: of that one caption."""
    (hidden,), (pooled,) = features.hidden, features.pooled
    _write(path, info, EMPTY_INDEX, {"hidden": hidden, "pooled": pooled})


def _write(path: Path, info: CaptionFeaturesInfo, start: int, tensors: Mapping[str, Tensor]) -> None:
    arrays, shapes = {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}, _shapes(info, start)
    assert {name: array.shape for name, array in arrays.items()} == shapes, shapes
    assert arrays["hidden"].dtype == arrays["pooled"].dtype == np.float16
    # One entry only: safetensors writes several entries in an order that varies, and equal features must give equal bytes.
    save_file(arrays, path, metadata={_HEADER: json.dumps(_header(info, start), sort_keys=True)})


def _header(info: CaptionFeaturesInfo, start: int) -> dict[str, Any]:
    return {"start": start, "encoder_digest": info.encoder_digest, "format_version": info.format_version}


def _shapes(info: CaptionFeaturesInfo, start: int) -> dict[str, tuple[int, ...]]:
    if start == EMPTY_INDEX:
        return {"hidden": (info.num_positions, info.width), "pooled": (info.width,)}
    rows = info.captions_from(start)
    return {"hidden": (rows, info.num_positions, info.width), "pooled": (rows, info.width), "num_tokens": (rows,)}


class CaptionFeatures:
    """Caption features of an artifact. A file is memory-mapped at its first use; at most MAX_OPEN_FILES are open at a time.

    info: CaptionFeaturesInfo.
    """

    def __init__(self, info: CaptionFeaturesInfo, store: ArtifactStore, manifest: Manifest) -> None:
        self.info, self._store, self._manifest = info, store, manifest
        self._opened: OrderedDict[str, Any] = OrderedDict()  # file name -> safetensors handle, most recently used last
        self._empty: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(cls, store: ArtifactStore, manifest: Manifest) -> CaptionFeatures:
        """Open the features without reading a file.

        Raises ValueError if the manifest describes something else or another format version, or if it lacks files.
        """
        place = f"artifact {manifest.stage}/{manifest.key[:12]}"
        info = CaptionsSummary.read(manifest).info
        if info.format_version != FORMAT_VERSION:
            raise ValueError(f"{place} has caption features of format {info.format_version}; only {FORMAT_VERSION} can be read")
        listed = {record.name for record in manifest.files}
        missing = sorted({EMPTY, *map(captions_name, range(info.num_files))} - listed)
        if missing:
            raise ValueError(f"{place} lacks {len(missing)} files of caption features, including {missing[0]}")
        return cls(info, store, manifest)

    def __len__(self) -> int:
        return self.info.num_captions

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden float16 (B, T, W) and pooled float16 (B, W). `indices`: int64 (B,); -1 is the empty caption.

        Raises ValueError if an index is out of range, or if a file does not match the manifest.
        """
        indices = np.asarray(indices)
        wrong = indices[(indices < EMPTY_INDEX) | (indices >= len(self))]
        if len(wrong):
            raise ValueError(
                f"caption {wrong[0]} does not exist; captions are numbered 0..{len(self) - 1}, -1 is the empty caption"
            )
        hidden = np.empty((len(indices), self.info.num_positions, self.info.width), np.float16)
        pooled = np.empty((len(indices), self.info.width), np.float16)
        is_empty = indices == EMPTY_INDEX
        if is_empty.any():
            hidden[is_empty], pooled[is_empty] = self._empty_caption()
        numbers, rows = np.divmod(indices, self.info.captions_per_file)
        for number in np.unique(numbers[~is_empty]).tolist():
            file = self._file(captions_name(number), number * self.info.captions_per_file)
            hidden_slice, pooled_slice = file.get_slice("hidden"), file.get_slice("pooled")
            for place in np.flatnonzero(~is_empty & (numbers == number)):
                row = int(rows[place])
                hidden[place], pooled[place] = hidden_slice[row], pooled_slice[row]
        return hidden, pooled

    def _empty_caption(self) -> tuple[np.ndarray, np.ndarray]:
        """Hidden and pooled features, kept in memory because every batch needs them."""
        if self._empty is None:
            file = self._file(EMPTY, EMPTY_INDEX)
            self._empty = file.get_tensor("hidden"), file.get_tensor("pooled")
        return self._empty

    def _file(self, name: str, start: int) -> Any:
        """The handle of a file, opened if necessary."""
        if name not in self._opened:
            self._opened[name] = _open_checked(self._store.fetch(self._manifest, name), self.info, start)
        self._opened.move_to_end(name)
        if len(self._opened) > MAX_OPEN_FILES:
            self._opened.popitem(last=False)
        return self._opened[name]


def _open_checked(path: Path, info: CaptionFeaturesInfo, start: int) -> Any:
    """Map a file and check its header and tensors against the manifest's info. Returns the safetensors handle."""
    try:
        file = safe_open(str(path), framework="np")
        header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable file of caption features: {error}") from error
    if header != (expected := _header(info, start)):
        raise ValueError(f"{path} does not belong to these caption features: its header is {header}, expected {expected}")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    found = {name: (tensor.get_dtype(), *tensor.get_shape()) for name, tensor in slices.items()}
    shapes = {name: (_DTYPES[name], *shape) for name, shape in _shapes(info, start).items()}
    if found != shapes:
        raise ValueError(f"{path} does not belong to these caption features: its tensors are {found}, expected {shapes}")
    return file
