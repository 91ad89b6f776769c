"""Generated samples: the codes of each sample in Parquet, and the seed, label, caption or row of each.

Images are decoded from the codes on demand. Columns: `index` int64, `label` int32 (-1 if the sample has a caption), `seed` int64,
`codes` fixed_size_list<uint16>[L]. Samples of a text-conditional model also have `caption` int64, the number of the caption in the
dataset. Samples that began with codes of a token map also have `row` int64, their row. Shard `part-00042.parquet` begins with
sample 42 * shard_size.

Replicates are independent sets of N samples with the same conditions in the same order. Replicate k has the samples k * N to
(k + 1) * N - 1 of the run, in shards of its own, so the first replicate is the same for any number of replicates.

Shape legend: N samples, R samples of a range, L codes of an image, C captions of a dataset, I its images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from enat.config import ENATConfig
from enat.cost import Cost, generation_cost, mean_cost, with_decoder
from enat.sampler_config import SamplerConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.summary import Summary

EACH_CLASS = "each class in turn"
NONE = -1  # in place of a label, caption or row that a sample does not have
_MAX_CODES = 1 << 16
_CAPTION_STREAM, _ROW_STREAM, _MASK_STREAM = 1, 2, 3  # independent draws from one seed


@dataclass(frozen=True, kw_only=True)
class MeasuredPasses:
    """Means over samples whose passes depend on what is sampled, as with sampler.entropy_bound.

    num_masked: tokens in the input of each step, 0 in a step that a sample did not need.   cost: without the tokenizer's decoder.
    """

    num_passes: float
    num_masked: tuple[float, ...]
    cost: Cost

    @classmethod
    def of(
        cls,
        num_masked: np.ndarray,
        architecture: ENATConfig,
        sampler: SamplerConfig,
        num_given: int,
        guide: ENATConfig | None = None,
    ) -> MeasuredPasses:
        """`num_masked`: integers (R, steps).   `guide`: architecture of another model that guides."""
        rows, counts = np.unique(num_masked, axis=0, return_counts=True)
        settings: dict[str, Any] = {"num_given": num_given, "guide": guide}
        costs = [generation_cost(architecture, sampler, num_masked=row, **settings) for row in rows.tolist()]
        means = num_masked.mean(axis=0).tolist()
        return cls(
            num_passes=float((num_masked > 0).sum(axis=1).mean()), num_masked=tuple(means), cost=mean_cost(costs, counts.tolist())
        )

    @classmethod
    def merged(cls, parts: Sequence[MeasuredPasses], sizes: Sequence[int]) -> MeasuredPasses:
        """The means of all parts. `sizes`: samples of each."""
        return cls(
            num_passes=float(np.average([part.num_passes for part in parts], weights=sizes)),
            num_masked=tuple(np.average([part.num_masked for part in parts], axis=0, weights=sizes).tolist()),
            cost=mean_cost([part.cost for part in parts], sizes),
        )


@dataclass(frozen=True, kw_only=True)
class SamplesSummary(Summary):
    """How samples were made. num_classes: of the model.   labels: how labels were chosen, in words.   device: names of devices.

    mask_ratio: share of the codes of a token map that was masked to begin with; None for samples that began with nothing.
    batch_size: images that the model computed together.   num_samples: of one replicate.
    train_steps: of the weights, None for the last step of the training.   ema_length: of their average, None for the usual one.
    guide_steps: of the earlier weights that guide, None for the null condition.
    measured: passes of samples that each take their own number; None where the sampler determines it, and before they are made.
    """

    num_samples: int
    replicates: int = 1
    train_steps: int | None = None
    ema_length: float | None = None
    guide_steps: int | None = None
    shard_size: int
    num_classes: int
    labels: str
    sampler: SamplerConfig
    device: str
    mask_ratio: float | None = None
    precision: str = "fp32"
    batch_size: int
    measured: MeasuredPasses | None = None

    @property
    def has_each_class_in_turn(self) -> bool:
        return self.labels == EACH_CLASS


@dataclass(frozen=True)
class Samples:
    """index, labels, seeds, captions, rows: int64 (R,), NONE for samples without one.   codes: int64 (R, L)."""

    index: np.ndarray
    labels: np.ndarray
    codes: np.ndarray
    seeds: np.ndarray
    captions: np.ndarray
    rows: np.ndarray

    def rows_where(self, is_chosen: np.ndarray) -> Samples:
        """Select samples by a mask, bool (R,)."""
        return Samples(**{name: values[is_chosen] for name, values in vars(self).items()})


@dataclass(frozen=True)
class SamplePlan:
    """The condition of every sample of a run.

    labels, captions, rows: int64 (N,), NONE for samples without one.   start: initial codes, integers (N, L), of which some will be
    masked; None if all tokens begin masked.
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
    """The seed of one sample, in [0, 2**63). It is a hash, so neighbouring indices and runs have unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{index}".encode(), digest_size=8).digest()) >> 1


def sample_label(index: int, num_classes: int, labels: Sequence[int] = ()) -> int:
    """The label of one sample: classes in turn, which balances every prefix of the samples as far as possible.

    labels: used in turn instead of all classes. An unconditional model, which has no classes, gets label 0.
    """
    return labels[index % len(labels)] if labels else index % max(1, num_classes)


def caption_order(first_captions: np.ndarray, num_captions: int, seed: int) -> np.ndarray:
    """The order in which samples get captions: int64 (C,), every caption once.

    first_captions: int64 (I,), number of each image's first caption. The seed draws an order of the images, and for each image an
    order of its captions. First comes one caption of every image, then a second one of every image, and so on. Hence the first N
    captions belong to N different images, for N up to the number of images with captions.
    """
    counts = np.diff(first_captions, append=num_captions)
    rng = np.random.default_rng([seed, _CAPTION_STREAM])
    image_places, draws = rng.permutation(len(counts)), rng.random(num_captions)
    images = np.repeat(np.arange(len(counts)), counts)
    rounds = np.empty(num_captions, np.int64)
    rounds[np.lexsort((draws, images))] = np.arange(num_captions) - np.repeat(first_captions, counts)
    return np.lexsort((image_places[images], rounds))


def drawn_rows(num_rows: int, num_samples: int, seed: int) -> np.ndarray:
    """Rows of a token map in an order drawn by the seed, int64 (N,). Every row occurs once before any occurs twice."""
    return np.resize(np.random.default_rng([seed, _ROW_STREAM]).permutation(num_rows), num_samples)


def num_masked_of(mask_ratio: float, num_tokens: int) -> int:
    """Number of masked tokens of a sample that begins with codes, at least 1."""
    return max(1, round(mask_ratio * num_tokens))


def masked_positions(seed: int, num_tokens: int, num_masked: int) -> np.ndarray:
    """Positions to mask in one sample, int64 (num_masked,), drawn uniformly by the sample's seed."""
    return np.random.default_rng([seed, _MASK_STREAM]).permutation(num_tokens)[:num_masked]


def shard_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def shard_ranges(num_samples: int, shard_size: int, replicates: int = 1) -> list[range]:
    """The samples of each shard, by their index in the run."""
    return [
        range(first + start, first + min(start + shard_size, num_samples))
        for first in range(0, replicates * num_samples, num_samples)
        for start in range(0, num_samples, shard_size)
    ]


def check_codebook(codebook_size: int) -> None:
    """Raise ValueError if token maps and samples cannot store the codes of such a codebook."""
    if codebook_size > _MAX_CODES:
        raise ValueError(f"codebook_size is {codebook_size}; it must be at most {_MAX_CODES}, because a code is stored in 16 bits")


def write_samples(path: Path, samples: Samples) -> None:
    """Write one shard, with columns for captions and rows only if samples have them. Raises ValueError for codes over 16 bits."""
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


def read_samples(
    store: ArtifactStore, manifest: Manifest, start: int = 0, stop: int | None = None, *, replicate: int = 0
) -> Samples:
    """Read samples start..stop-1 of a replicate in order of index. Only the shards that hold them are fetched.

    Raises ValueError if the artifact has no such samples.
    """
    summary = SamplesSummary.read(manifest)
    size, num_samples = summary.shard_size, summary.num_samples
    stop = num_samples if stop is None else stop
    if not 0 <= start < stop <= num_samples:
        place = f"{manifest.stage}/{manifest.key[:12]}"
        raise ValueError(f"{place} has no samples {start} to {stop - 1}; its samples are numbered 0 to {num_samples - 1}")
    tables = []
    first = replicate * -(-num_samples // size)
    for shard in range(start // size, -(-stop // size)):
        path = store.fetch(manifest, shard_name(first + shard))
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
    """The cost of generating one sample, and the mean of the samples if it depends on them."""
    architecture, made = ModelSummary.read(model).model, SamplesSummary.read(samples)
    if made.measured is not None:
        return with_decoder(made.measured.cost, TokenizerSummary.read(tokenizer).config)
    return with_decoder(samples_cost(made, architecture), TokenizerSummary.read(tokenizer).config)


def samples_cost(made: SamplesSummary, architecture: ENATConfig) -> Cost:
    """Of one sample, without the tokenizer's decoder; where the cost depends on the samples, the upper bound."""
    guide = architecture if made.guide_steps is not None else None
    return generation_cost(architecture, made.sampler, num_given=num_given_of(made, architecture), guide=guide)


def num_given_of(samples: SamplesSummary, architecture: ENATConfig) -> int:
    """Number of tokens that a sample began with: the unmasked codes of a real image, or 0."""
    if samples.mask_ratio is None:
        return 0
    return architecture.num_tokens - num_masked_of(samples.mask_ratio, architecture.num_tokens)
