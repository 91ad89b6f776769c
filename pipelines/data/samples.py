"""Generated samples: codes per sample index in Parquet, and what every sample is asked for.

Images are decoded from the codes when they are wanted. Columns: `index` int64, `label` int32 (-1 where a caption is asked for),
`seed` int64, `codes` fixed_size_list<uint16>[L]; of a model of captions also `caption` int64, the caption's number in the dataset;
of samples that began with codes of a token map also `row` int64, its row. File `part-00042.parquet` holds the sample indices
42 * shard_size and up.

Shape legend: N samples, R samples of a range, L codes of an image, C captions of a dataset, I its images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from enat.config import ENATConfig, VQGANConfig
from enat.cost import Cost, generation_cost
from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore

NONE = -1  # label of a sample that has a caption, caption or row of one that has none
_MAX_CODES = 1 << 16
_CAPTION_STREAM, _ROW_STREAM, _MASK_STREAM = 1, 2, 3  # draws of one seed that have nothing to do with each other


@dataclass(frozen=True)
class Samples:
    """index, labels, seeds, captions, rows: int64 (R,); captions and rows are -1 where there is none.   codes: int64 (R, L)."""

    index: np.ndarray
    labels: np.ndarray
    codes: np.ndarray
    seeds: np.ndarray
    captions: np.ndarray
    rows: np.ndarray

    def rows_where(self, is_chosen: np.ndarray) -> Samples:
        """Those of them that a bool (R,) marks."""
        return Samples(**{name: values[is_chosen] for name, values in vars(self).items()})


@dataclass(frozen=True)
class SamplePlan:
    """What every sample of a run is asked for.

    labels, captions, rows: int64 (N,), -1 where there is none.   start: integers (N, L) to begin with, some of them to be masked;
    None where every sample begins with nothing.
    """

    labels: np.ndarray
    captions: np.ndarray
    rows: np.ndarray
    start: np.ndarray | None = None

    @classmethod
    def of_labels(cls, labels: np.ndarray) -> SamplePlan:
        return cls(labels, np.full_like(labels, NONE), np.full_like(labels, NONE))

    @classmethod
    def of_captions(cls, captions: np.ndarray) -> SamplePlan:
        return cls(np.full_like(captions, NONE), captions, np.full_like(captions, NONE))


def sample_seed(run_seed: int, index: int) -> int:
    """The seed of one sample, in [0, 2**63): a hash, so that neighbouring indices and runs share nothing."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{index}".encode(), digest_size=8).digest()) >> 1


def sample_label(index: int, num_classes: int, labels: Sequence[int] = ()) -> int:
    """Classes in turn, so that any num_samples divisible by num_classes is balanced, and so is every prefix nearly.

    labels: these in turn in place of all classes. The label of an unconditional model, which has no classes, is 0.
    """
    return labels[index % len(labels)] if labels else index % max(1, num_classes)


def caption_order(first_captions: np.ndarray, num_captions: int, seed: int) -> np.ndarray:
    """The order in which samples are given captions: int64 (C,), every caption once.

    first_captions: int64 (I,), number of each image's first caption. Images come in an order drawn by the seed. First each image's
    one caption, drawn by the seed, then each image's second, and so on: so the first N captions, N up to the number of images that
    have any, are of N different images.
    """
    counts = np.diff(first_captions, append=num_captions)
    rng = np.random.default_rng([seed, _CAPTION_STREAM])
    image_places, draws = rng.permutation(len(counts)), rng.random(num_captions)
    images = np.repeat(np.arange(len(counts)), counts)
    rounds = np.empty(num_captions, np.int64)
    rounds[np.lexsort((draws, images))] = np.arange(num_captions) - np.repeat(first_captions, counts)
    return np.lexsort((image_places[images], rounds))


def drawn_rows(num_rows: int, num_samples: int, seed: int) -> np.ndarray:
    """int64 (N,): rows of a token map in an order drawn by the seed, each once before any comes twice."""
    return np.resize(np.random.default_rng([seed, _ROW_STREAM]).permutation(num_rows), num_samples)


def num_masked_of(mask_ratio: float, num_tokens: int) -> int:
    """Of a sample that begins with codes; one at least, or there would be nothing to make."""
    return max(1, round(mask_ratio * num_tokens))


def masked_positions(seed: int, num_tokens: int, num_masked: int) -> np.ndarray:
    """int64 (num_masked,): positions of one sample, drawn evenly by its own seed."""
    return np.random.default_rng([seed, _MASK_STREAM]).permutation(num_tokens)[:num_masked]


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def check_codebook(codebook_size: int) -> None:
    """Raises ValueError for a codebook with codes that a file of samples cannot hold."""
    if codebook_size > _MAX_CODES:
        raise ValueError(
            f"samples are stored in 16 bits a code, {_MAX_CODES:,} at most, and this model has {codebook_size:,} codes"
        )


def write_samples(path: Path, samples: Samples) -> None:
    """Write one part. Columns of captions and rows only where there are any. Raises ValueError for codes beyond 16 bits."""
    codes = samples.codes
    check_codebook(int(codes.max()) + 1)
    columns = {
        "index": pa.array(samples.index, pa.int64()),
        "label": pa.array(samples.labels, pa.int32()),
        "seed": pa.array(samples.seeds, pa.int64()),
        "codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).ravel()), codes.shape[1]),
    }
    for name, values in (("caption", samples.captions), ("row", samples.rows)):
        if (values != NONE).any():
            columns[name] = pa.array(values, pa.int64())
    pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True)


def read_codes(store: ArtifactStore, manifest: Manifest, start: int = 0, stop: int | None = None) -> Samples:
    """Samples with start <= index < stop, in order of index. Only the parts that hold them are fetched.

    Raises ValueError where the artifact has no such samples.
    """
    size, num_samples = int(manifest.summary["shard_size"]), int(manifest.summary["num_samples"])
    stop = num_samples if stop is None else stop
    if not 0 <= start < stop <= num_samples:
        place = f"{manifest.stage}/{manifest.key[:12]}"
        raise ValueError(f"{place} has no samples {start} to {stop - 1}: they are numbered 0 to {num_samples - 1}")
    tables = []
    for part in range(start // size, -(-stop // size)):
        path = store.fetch(manifest, part_name(part))
        tables.append(pq.read_table(path, page_checksum_verification=True))
    table = pa.concat_tables(tables).combine_chunks().slice(start - start // size * size, stop - start)
    num_codes = table.schema.field("codes").type.list_size
    codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, num_codes)

    def column(name: str) -> np.ndarray:
        if name not in table.column_names:
            return np.full(len(table), NONE, np.int64)
        values: np.ndarray = table[name].to_numpy().astype(np.int64)
        return values

    return Samples(
        index=column("index"),
        labels=column("label"),
        codes=codes.astype(np.int64),
        seeds=column("seed"),
        captions=column("caption"),
        rows=column("row"),
    )


def image_cost(samples: Manifest, model: Manifest, tokenizer: Manifest) -> Cost:
    architecture, sampler = ENATConfig(**model.summary["model"]), SamplerConfig(**samples.summary["sampler"])
    num_given = num_given_of(samples, architecture)
    return generation_cost(architecture, sampler, VQGANConfig(**tokenizer.summary["config"]), num_given=num_given)


def num_given_of(samples: Manifest, architecture: ENATConfig) -> int:
    """Tokens that a sample began with: those of a real image that its mask ratio left, or none."""
    mask_ratio = samples.summary["mask_ratio"]
    return 0 if mask_ratio is None else architecture.num_tokens - num_masked_of(mask_ratio, architecture.num_tokens)
