"""Conditions of samples, and their files on disk."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from material.summaries import summary_of
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.data.samples import (
    NONE,
    Samples,
    caption_order,
    drawn_rows,
    masked_positions,
    read_samples,
    sample_label,
    sample_seed,
    shard_name,
    write_samples,
)


def test_seeds_of_neighbouring_samples_and_runs_share_nothing():
    seeds = [sample_seed(run, index) for run in range(20) for index in range(500)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.03  # six standard deviations


def test_labels_are_all_classes_in_turn_or_the_given_ones():
    labels = [sample_label(index, 1000) for index in range(50_000)]
    assert np.bincount(labels).tolist() == [50] * 1000 and labels[:3] == [0, 1, 2]
    assert [sample_label(index, 10, (7, 7, 1)) for index in range(7)] == [7, 7, 1, 7, 7, 1, 7]


# Captions ------------------------------------------------------------------------------------------------------------------


def plain_rounds(counts: list[int], order: np.ndarray) -> list[list[int]]:
    """Images in the order of their captions, a round at a time: round r has the images with more than r captions."""
    image_of = [image for image, count in enumerate(counts) for _ in range(count)]
    images = [image_of[caption] for caption in order]
    rounds, position = [], 0
    for number in range(max(counts, default=0)):
        size = sum(count > number for count in counts)
        rounds.append(images[position : position + size])
        position += size
    return rounds


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 2**63 - 1))
def test_captions_come_one_of_each_image_before_a_second_of_any(counts, seed):
    first = np.cumsum([0, *counts[:-1]])
    order = caption_order(first, sum(counts), seed)
    assert sorted(order.tolist()) == list(range(sum(counts))), "each caption once"
    rounds = plain_rounds(counts, order)
    for number, images in enumerate(rounds):
        assert sorted(images) == [image for image, count in enumerate(counts) if count > number]
    for images in rounds[1:]:
        assert images == [image for image in rounds[0] if image in set(images)], "images keep their order"
    np.testing.assert_array_equal(order, caption_order(first, sum(counts), seed))


def test_which_caption_of_an_image_comes_first_is_drawn_evenly_and_by_the_seed():
    first = np.arange(0, 5000, 5)
    chosen = caption_order(first, 5000, seed=1)[:1000]
    counts = np.bincount(chosen % 5)
    assert abs(counts - 200).max() < 6 * (1000 * 0.2 * 0.8) ** 0.5
    assert (caption_order(first, 5000, seed=2)[:1000] != chosen).mean() > 0.9
    assert sorted(chosen // 5) == list(range(1000)) != (chosen // 5).tolist(), "all images, in a drawn order"


# Rows and masks ------------------------------------------------------------------------------------------------------------


def test_every_row_is_drawn_once_before_any_is_drawn_twice():
    rows = drawn_rows(10, 25, seed=4)
    assert sorted(rows[:10]) == list(range(10)) and rows[10:20].tolist() == rows[:10].tolist() and len(rows) == 25
    assert (
        drawn_rows(10, 5, seed=4).tolist() == rows[:5].tolist()
        and drawn_rows(1000, 9, 5).tolist() != drawn_rows(1000, 9, 6).tolist()
    )


def test_masked_positions_are_even_and_each_sample_own():
    positions = [masked_positions(seed, 16, 4) for seed in range(4000)]
    assert all(len(set(some.tolist())) == 4 for some in positions)
    counts = np.bincount(np.concatenate(positions), minlength=16)
    assert abs(counts - 1000).max() < 6 * (4000 * 0.25 * 0.75) ** 0.5
    assert len({tuple(sorted(some)) for some in positions}) > 1000  # of 1,820


# Files ---------------------------------------------------------------------------------------------------------------------


def make_samples(start: int, count: int, captions: bool = False) -> Samples:
    rng = np.random.default_rng(start)
    none = np.full(count, NONE)
    return Samples(
        index=np.arange(start, start + count),
        labels=none if captions else rng.integers(0, 9, count),
        codes=rng.integers(0, 65536, (count, 4)),
        seeds=rng.integers(0, 2**63 - 1, count),
        captions=rng.integers(0, 2**40, count) if captions else none,
        rows=none,
    )


def test_codes_beyond_16_bits_are_refused_and_not_wrapped(tmp_path):
    part = make_samples(0, 3)
    part.codes[1, 2] = 65_536
    with pytest.raises(ValueError, match="a code is stored in 16 bits"):
        write_samples(tmp_path / "part", part)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("captions", [False, True])
def test_samples_are_read_as_they_were_written(local_store, tmp_path, captions):
    parts = [make_samples(0, 8, captions), make_samples(8, 8, captions), make_samples(16, 3, captions)]
    records: list[FileRecord] = []
    for number, part in enumerate(parts):
        write_samples(tmp_path / "part", part)
        records.append(local_store.put_file("generate", "k", shard_name(number), tmp_path / "part"))
    summary = summary_of("generate", num_samples=19, shard_size=8)
    manifest = Manifest(stage="generate", key="k", stage_version=1, config={}, inputs={}, files=tuple(records), summary=summary)
    for start, stop in ((0, 19), (3, 4), (6, 18)):
        read = read_samples(local_store, manifest, start, stop)
        for name in ("index", "labels", "codes", "seeds", "captions", "rows"):
            whole = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(getattr(read, name), whole[start:stop], name)
            assert getattr(read, name).dtype == np.int64
    columns = pq.read_schema(local_store.fetch(manifest, shard_name(0)))
    assert columns.names == ["index", "label", "seed", "codes", *(["caption"] if captions else [])]
    assert columns.field("codes").type.value_type == "uint16", "50,000 samples of 256 codes are 25 MB"
