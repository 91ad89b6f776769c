"""The token map: a dataset as codes in Parquet, one row per image, and how training reads it.

Files `part-00000.parquet`, ... hold the rows in the dataset's order, `quarantine.parquet` the images that could not be read.
Columns: `key` string, `codes` and `codes_flipped` fixed_size_list<uint16>[L], `label` int32 (-1 none), `source_sha256` binary
of the image's file. The Parquet key-value metadata under `enat` states dataset, resolution, grid, codebook and tokenizer.

Shape legend: R rows, L = grid_size**2 codes, B images of a global batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts import ArtifactStore, Manifest

FORMAT_VERSION = 1
QUARANTINE = "quarantine.parquet"
QUARANTINE_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string())])
_METADATA_KEY = b"enat"


@dataclass(frozen=True, kw_only=True)
class TokenMapInfo:
    """What a token map is made of; stands in every part's metadata and in the manifest's summary."""

    dataset: str
    resolution: int
    grid_size: int
    codebook_size: int
    num_classes: int
    tokenizer_digest: str
    crop: str = "adm-center"
    format_version: int = FORMAT_VERSION


def schema(info: TokenMapInfo) -> pa.Schema:
    codes = pa.list_(pa.field("element", pa.uint16()), info.grid_size**2)
    return pa.schema(
        [
            ("key", pa.string()),
            ("codes", codes),
            ("codes_flipped", codes),
            ("label", pa.int32()),
            ("source_sha256", pa.binary(32)),
        ],
        metadata={_METADATA_KEY: json.dumps(dataclasses.asdict(info), sort_keys=True)},
    )


def write_part(
    path: Path,
    info: TokenMapInfo,
    *,
    keys: Sequence[str],
    codes: np.ndarray,
    codes_flipped: np.ndarray,
    labels: Sequence[int],
    source_sha256: Sequence[bytes],
) -> None:
    """Write one part. codes, codes_flipped: integers (R, L) in [0, codebook_size)."""
    assert info.codebook_size <= 1 << 16
    table = pa.table(
        [
            pa.array(keys, pa.string()),
            _code_column(codes),
            _code_column(codes_flipped),
            pa.array(labels, pa.int32()),
            pa.array(source_sha256, pa.binary(32)),
        ],
        schema=schema(info),
    )
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def write_quarantine(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """rows: (key, reason)."""
    columns = [pa.array([row[column] for row in rows], pa.string()) for column in (0, 1)]
    pq.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA), path, compression="zstd", write_page_checksum=True)


def _code_column(codes: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).ravel()), codes.shape[1])


class TokenMap:
    """A token map in memory.

    codes: uint16 (R, 2, L), as stored and flipped.   labels: int32 (R,).   info: TokenMapInfo.
    """

    def __init__(self, info: TokenMapInfo, codes: np.ndarray, labels: np.ndarray) -> None:
        self.info, self.codes, self.labels = info, codes, labels

    @classmethod
    def open(cls, store: ArtifactStore, manifest: Manifest) -> TokenMap:
        """Read all parts, each checked against its digest, schema and metadata. Raises ValueError for one that does not fit."""
        info = TokenMapInfo(**manifest.summary["info"])
        expected = schema(info)
        codes, labels = [], []
        for record in manifest.files:
            if not record.name.startswith("part-"):
                continue
            path = store.fetch(manifest, record.name)
            table = pq.read_table(path, columns=["codes", "codes_flipped", "label"], page_checksum_verification=True)
            if not pq.read_schema(path).equals(expected, check_metadata=True):
                raise ValueError(f"{path} is not a part of this token map: its schema or metadata differs from the manifest's")
            rows = [_code_values(table[name], info.grid_size**2) for name in ("codes", "codes_flipped")]
            codes.append(np.stack(rows, axis=1))
            labels.append(table["label"].to_numpy())
        return cls(info, np.concatenate(codes), np.concatenate(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def batch_rows(self, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a global step and which of them are flipped: int64 (B,), bool (B,).

        Steps walk through one epoch's permutation after the other without a gap, so every image is seen once an epoch
        whatever the batch size, and a step's rows depend on (seed, step, batch_size) alone.
        """
        positions = step * batch_size + np.arange(batch_size)
        epochs, offsets = np.divmod(positions, len(self))
        rows, flipped = np.empty(batch_size, np.int64), np.empty(batch_size, bool)
        for epoch in np.unique(epochs):
            permutation, flips = _epoch(seed, int(epoch), len(self))
            here = epochs == epoch
            rows[here] = permutation[offsets[here]]
            flipped[here] = flips[rows[here]]
        return rows, flipped

    def take(self, rows: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """codes int64 (B, L) and labels int64 (B,) of rows."""
        return self.codes[rows, flipped.astype(np.intp)].astype(np.int64), self.labels[rows].astype(np.int64)


@lru_cache(maxsize=2)  # a batch spans at most two epochs unless the map is smaller than a batch
def _epoch(seed: int, epoch: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch, int64 (R,), and whether each row is flipped in it, bool (R,)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_rows), rng.random(num_rows) < 0.5


def _code_values(column: pa.ChunkedArray, num_codes: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, num_codes)
