"""Generated samples: codes per sample index in Parquet. Images are decoded from them when they are wanted.

Columns: `index` int64, `label` int32, `seed` int64, `codes` fixed_size_list<uint16>[L]; file `part-00042.parquet` holds the
sample indices 42 * shard_size and up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts import ArtifactStore, Manifest


@dataclass(frozen=True)
class Samples:
    """index int64 (R,), labels int64 (R,), codes int64 (R, L)."""

    index: np.ndarray
    labels: np.ndarray
    codes: np.ndarray


def sample_seed(run_seed: int, index: int) -> int:
    """The seed of one sample, in [0, 2**63): a hash, so that neighbouring indices and runs share nothing."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{index}".encode(), digest_size=8).digest()) >> 1


def sample_label(index: int, num_classes: int) -> int:
    """Classes in turn, so that any num_samples divisible by num_classes is balanced, and so is every prefix nearly.

    The label of an unconditional model, which has no classes, is 0.
    """
    return index % max(1, num_classes)


def write_samples(path: Path, index: np.ndarray, labels: np.ndarray, seeds: np.ndarray, codes: np.ndarray) -> None:
    """index, labels, seeds: integers (R,).   codes: integers (R, L)."""
    columns = {
        "index": pa.array(index, pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "seed": pa.array(seeds, pa.int64()),
        "codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).ravel()), codes.shape[1]),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True)


def read_codes(store: ArtifactStore, manifest: Manifest, start: int = 0, stop: int | None = None) -> Samples:
    """Samples with start <= index < stop, in order of index."""
    size = int(manifest.summary["shard_size"])
    stop = int(manifest.summary["num_samples"]) if stop is None else stop
    tables = []
    for part in range(start // size, -(-stop // size)):
        path = store.fetch(manifest, f"part-{part:05d}.parquet")
        tables.append(pq.read_table(path, page_checksum_verification=True))
    table = pa.concat_tables(tables).combine_chunks().slice(start - start // size * size, stop - start)
    num_codes = table.schema.field("codes").type.list_size
    codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, num_codes)
    return Samples(table["index"].to_numpy(), table["label"].to_numpy().astype(np.int64), codes.astype(np.int64))
