"""The token map: a dataset as codes in Parquet, one row per image.

Shards `part-00000.parquet`, ... hold the rows in the dataset's order, `quarantine.parquet` lists the images that could not be read.
Columns: `key` string, `codes` and `codes_flipped` fixed_size_list<uint16>[L], `label` int32 (-1 for none), `source_sha256` binary,
the digest of the image's bytes. A dataset with captions also has `captions` list<string> and `first_caption` int64, the number of
the row's first caption among all captions of the dataset, which locates their features (captions.py). The Parquet key-value
metadata `enat` contains resolution, grid, codebook and tokenizer.

Shape legend: R rows, L = grid_size**2 codes, B images of a global batch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage import cache
from pipelines.storage.base import StorageError, canonical_json, file_digest
from pipelines.workflow.summary import Summary

_log = logging.getLogger(__name__)

FORMAT_VERSION = 3  # before 3, shards held the name of the dataset, which is part of no key
_NAMED = 2  # the last version with a name
QUARANTINE = "quarantine.parquet"
QUARANTINE_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string())])
_METADATA_KEY = b"enat"
_FETCHES = 8  # shards that are fetched at once
_LAYOUT = 1  # version of the arrays in the cache
_DIGESTS = "sha256.json"
_CAPTIONS = pa.list_(pa.field("element", pa.string()))  # Parquet's name of items; pyarrow's "item" would read back as "element"


@dataclass(frozen=True, kw_only=True)
class TokenMapInfo:
    """Description of a token map, in the manifest's summary and, without the dataset's name, in the metadata of every shard."""

    dataset: str
    resolution: int
    grid_size: int
    codebook_size: int
    num_classes: int
    tokenizer_digest: str
    num_captions: int = 0
    dtype: str = "float32"
    crop: str = "adm-center"
    format_version: int = FORMAT_VERSION

    def require(self, who: str, *, tokenizer_digest: str, grid_size: int, codebook_size: int) -> None:
        """Raise ValueError if the codes do not fit `who`: a model or stage made for this tokenizer, grid and codebook."""
        expected = {"tokenizer": tokenizer_digest[:12], "grid": grid_size, "codebook": codebook_size}
        own = {"tokenizer": self.tokenizer_digest[:12], "grid": self.grid_size, "codebook": self.codebook_size}
        if differing := [name for name in own if own[name] != expected[name]]:
            sides = [", ".join(f"{name} {side[name]}" for name in differing) for side in (own, expected)]
            raise ValueError(f"the token map of {self.dataset} ({self.resolution} px) has {sides[0]}, but {who} expects {sides[1]}")


@dataclass(frozen=True, kw_only=True)
class TokenMapSummary(Summary):
    """rows: images with codes.   quarantined: images that could not be read, and the most frequent reasons with their counts."""

    info: TokenMapInfo
    rows: int
    class_names: tuple[str, ...]
    quarantined: int = 0
    quarantine_reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class TokenRows:
    """Rows of a shard. codes, codes_flipped: integers (R, L) in [0, codebook_size); the other fields have R items."""

    codes: np.ndarray
    codes_flipped: np.ndarray
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    source_sha256: list[bytes] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    first_captions: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def concatenate(cls, pieces: Sequence[TokenRows]) -> TokenRows:
        joined: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            values = [getattr(piece, name) for piece in pieces]
            joined[name] = np.concatenate(values) if name.startswith("codes") else [item for some in values for item in some]
        return cls(**joined)


def schema(info: TokenMapInfo) -> pa.Schema:
    described = dataclasses.asdict(info)
    if info.format_version > _NAMED:
        del described["dataset"]
    codes = pa.list_(pa.field("element", pa.uint16()), info.grid_size**2)
    captions = [("captions", _CAPTIONS), ("first_caption", pa.int64())] if info.num_captions else []
    return pa.schema(
        [
            ("key", pa.string()),
            ("codes", codes),
            ("codes_flipped", codes),
            ("label", pa.int32()),
            ("source_sha256", pa.binary(32)),
            *captions,
        ],
        metadata={_METADATA_KEY: json.dumps(described, sort_keys=True)},
    )


def write_shard(path: Path, info: TokenMapInfo, rows: TokenRows) -> None:
    """Write one shard."""
    assert info.codebook_size <= 1 << 16
    columns = [
        pa.array(rows.keys, pa.string()),
        _code_column(rows.codes),
        _code_column(rows.codes_flipped),
        pa.array(rows.labels, pa.int32()),
        pa.array(rows.source_sha256, pa.binary(32)),
    ]
    if info.num_captions:
        columns += [pa.array(rows.captions, _CAPTIONS), pa.array(rows.first_captions, pa.int64())]
    pq.write_table(pa.table(columns, schema=schema(info)), path, compression="zstd", write_page_checksum=True)


def write_quarantine(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write the quarantine. `rows`: (key, reason)."""
    columns = [pa.array([row[column] for row in rows], pa.string()) for column in (0, 1)]
    pq.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA), path, compression="zstd", write_page_checksum=True)


def _code_column(codes: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).ravel()), codes.shape[1])


@dataclass(frozen=True)
class BatchRows:
    """Rows of a global step, int64 (B,); whether each is flipped, bool (B,); numbers of captions, int64 (B,), -1 for none."""

    rows: np.ndarray
    flipped: np.ndarray
    captions: np.ndarray


class TokenMap:
    """A token map in the memory of this process or of the node.

    codes: uint16 (R, 2, L), as stored and flipped.   labels: int32 (R,).   info: TokenMapInfo.
    captions: int64 (R, 2), number of the first caption and number of captions.
    """

    def __init__(self, info: TokenMapInfo, codes: np.ndarray, labels: np.ndarray, captions: np.ndarray | None = None) -> None:
        self.info, self.codes, self.labels = info, codes, labels
        self.captions = np.zeros((len(labels), 2), np.int64) if captions is None else captions

    @classmethod
    def open(cls, store: ArtifactStore, manifest: Manifest) -> TokenMap:
        """Read all shards and check each against its digest, schema and metadata. Raises ValueError for a shard that differs."""
        info, shapes = _shapes(manifest)
        token_map = cls(info, **{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})
        token_map._read(store, manifest)
        return token_map

    @classmethod
    def open_shared(cls, store: ArtifactStore, manifest: Manifest) -> TokenMap:
        """Open the map as memory-mapped files in this machine's cache, so that a node reads and holds it once for all its workers.

        Falls back to the memory of this process if the cache cannot be used.
        """
        info, shapes = _shapes(manifest)
        if not all(math.prod(shape) for shape, _ in shapes.values()):
            return cls.open(store, manifest)  # an empty file cannot be mapped

        def fill(folder: Path) -> None:
            arrays = {
                name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
                for name, (shape, dtype) in shapes.items()
            }
            cls(info, **arrays)._read(store, manifest)
            for array in arrays.values():
                array.flush()
            digests = {f"{name}.npy": file_digest(folder / f"{name}.npy") for name in arrays}
            (folder / _DIGESTS).write_bytes(canonical_json(digests))

        name = f"token-map-{manifest.digest[:32]}-{_LAYOUT}"
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        try:
            folder = cache.fetch_folder(name, size, fill, _is_whole)
            arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in shapes}
        except (StorageError, OSError) as error:
            _log.warning("the token map is loaded into the memory of each worker: %s", error)
            return cls.open(store, manifest)
        return cls(info, **arrays)

    def _read(self, store: ArtifactStore, manifest: Manifest) -> None:
        info, rows = self.info, len(self)
        names = [record.name for record in manifest.files if record.name.startswith("part-")]
        with ThreadPoolExecutor(_FETCHES) as pool:  # buckets answer slowly, and checking digests takes CPU time
            paths = list(pool.map(lambda name: store.fetch(manifest, name), names))
        start = 0
        for path in paths:
            table = _read_shard(path, info)
            here = slice(start, start + len(table))
            start = here.stop
            if start > rows:
                continue  # counts all rows for the message
            for side, name in enumerate(("codes", "codes_flipped")):
                self.codes[here, side] = _code_values(table[name], info.grid_size**2)
            self.labels[here] = table["label"].to_numpy()
            if info.num_captions:
                self.captions[here, 0] = table["first_caption"].to_numpy()
                self.captions[here, 1] = pc.list_value_length(table["captions"]).to_numpy()
        if start != rows:
            raise ValueError(f"the shards of token map {manifest.key[:12]} hold {start} rows, but its manifest states {rows}")

    def __len__(self) -> int:
        return len(self.labels)

    def batch_rows(self, seed: int, step: int, batch_size: int) -> BatchRows:
        """Draw the rows, flips and captions of a global step.

        Steps walk through the permutations of consecutive epochs without a gap: every image occurs once per epoch at any batch
        size, and a step depends only on (seed, step, batch_size). Flips and captions are drawn for each row and epoch.
        """
        positions = step * batch_size + np.arange(batch_size)
        epochs, offsets = np.divmod(positions, len(self))
        rows, flipped, draws = np.empty(batch_size, np.int64), np.empty(batch_size, bool), np.empty(batch_size)
        for epoch in np.unique(epochs):
            permutation, flips, caption_draws = _epoch(seed, int(epoch), len(self))
            here = epochs == epoch
            rows[here] = permutation[offsets[here]]
            flipped[here] = flips[rows[here]]
            draws[here] = caption_draws[rows[here]]
        first, count = self.captions[rows].T
        return BatchRows(rows, flipped, np.where(count > 0, first + (draws * count).astype(np.int64), -1))

    def take(self, rows: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes int64 (B, L) and labels int64 (B,) of rows. Rows without a label get the null label, num_classes."""
        labels = self.labels[rows].astype(np.int64)
        return self.codes[rows, flipped.astype(np.intp)].astype(np.int64), np.where(labels < 0, self.info.num_classes, labels)


def _shapes(manifest: Manifest) -> tuple[TokenMapInfo, dict[str, tuple[tuple[int, ...], type]]]:
    """The info of a map, and shape and dtype of each of its arrays."""
    summary = TokenMapSummary.read(manifest)
    info, rows = summary.info, summary.rows
    return info, {
        "codes": ((rows, 2, info.grid_size**2), np.uint16),
        "labels": ((rows,), np.int32),
        "captions": ((rows, 2), np.int64),
    }


def _is_whole(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / _DIGESTS).read_bytes())
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=2)  # a batch spans at most two epochs unless the map is smaller than a batch
def _epoch(seed: int, epoch: int, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An epoch's permutation, int64 (R,), and per row: whether it is flipped, bool (R,), and a draw from [0, 1), float64 (R,)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_rows), rng.random(num_rows) < 0.5, rng.random(num_rows)


def _read_shard(path: Path, info: TokenMapInfo) -> pa.Table:
    columns = ["codes", "codes_flipped", "label", *(["captions", "first_caption"] if info.num_captions else [])]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema(info), check_metadata=True):
                raise ValueError(f"{path} is not a shard of this token map: its schema or metadata differs from the manifest's")
            return file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_columns(store: ArtifactStore, manifest: Manifest, names: Sequence[str]) -> pa.Table:
    """Columns of all rows."""
    parts = [record.name for record in manifest.files if record.name.startswith("part-")]
    tables = [pq.read_table(store.fetch(manifest, name), columns=[*names], page_checksum_verification=True) for name in parts]
    return pa.concat_tables(tables).combine_chunks()


def read_codes(store: ArtifactStore, manifest: Manifest, rows: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Keys, and codes uint16 (R, L), of rows given in ascending order. Reads only the shards that hold them."""
    keys, codes, start, remaining = [], [], 0, list(map(int, rows))
    num_codes = TokenMapSummary.read(manifest).info.grid_size ** 2
    for record in manifest.files:
        if not record.name.startswith("part-") or not remaining:
            continue
        path = store.fetch(manifest, record.name)
        stop = start + pq.read_metadata(path).num_rows
        here = [row - start for row in remaining if row < stop]
        if here:
            table = pq.read_table(path, columns=["key", "codes"]).take(here)
            keys += table["key"].to_pylist()
            codes.append(_code_values(table["codes"], num_codes))
        start, remaining = stop, remaining[len(here) :]
    return keys, np.concatenate(codes)


def _code_values(column: pa.ChunkedArray, num_codes: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, num_codes)
