"""The token map: its format on disk, and batches in which every image is seen exactly once an epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts import LocalStore, Manifest
from pipelines.token_map import QUARANTINE, TokenMap, TokenMapInfo, schema, write_part, write_quarantine

INFO = TokenMapInfo(dataset="photographs", resolution=16, grid_size=4, codebook_size=512, num_classes=3, tokenizer_digest="ab" * 32)


def _columns(rows: int, seed: int = 0, info: TokenMapInfo = INFO) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (rows, info.grid_size**2)
    return {
        "keys": [f"image-{seed}-{row}" for row in range(rows)],
        "codes": rng.integers(0, info.codebook_size, shape),
        "codes_flipped": rng.integers(0, info.codebook_size, shape),
        "labels": rng.integers(-1, info.num_classes, rows).tolist(),
        "source_sha256": [hashlib.sha256(f"{seed}-{row}".encode()).digest() for row in range(rows)],
    }


def _token_map(rows: int, seed: int = 0) -> TokenMap:
    columns = _columns(rows, seed)
    codes = np.stack([columns["codes"], columns["codes_flipped"]], axis=1).astype(np.uint16)
    return TokenMap(INFO, codes, np.array(columns["labels"], np.int32))


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / "part-00000.parquet"
    write_part(path, INFO, **_columns(500))
    return path


@pytest.fixture
def commit(local_store: LocalStore, tmp_path: Path) -> Callable[..., Manifest]:
    """A token map in the store, of parts that are made of whatever info they are given."""

    def commit(*parts: tuple[TokenMapInfo, dict[str, Any]]) -> Manifest:
        records = []
        for number, (info, columns) in enumerate(parts):
            source = tmp_path / f"part-{number:05d}.parquet"
            write_part(source, info, **columns)
            records.append(local_store.put_file("token_map", "k", source.name, source))
        write_quarantine(tmp_path / QUARANTINE, [("image-x", "it is broken")])
        records.append(local_store.put_file("token_map", "k", QUARANTINE, tmp_path / QUARANTINE))
        summary = {"info": dataclasses.asdict(INFO)}
        return local_store.commit(
            Manifest(stage="token_map", key="k", stage_version=1, config={}, inputs={}, files=tuple(records), summary=summary)
        )

    return commit


# Format --------------------------------------------------------------------------------------------------------------------


def test_a_part_has_the_documented_columns(part: Path) -> None:
    codes = pa.list_(pa.field("element", pa.uint16()), 16)
    assert pq.read_schema(part).remove_metadata() == pa.schema(
        [
            ("key", pa.string()),
            ("codes", codes),
            ("codes_flipped", codes),
            ("label", pa.int32()),
            ("source_sha256", pa.binary(32)),
        ]
    )


def test_a_part_states_what_it_is_made_of(part: Path) -> None:
    assert json.loads(pq.read_schema(part).metadata[b"enat"]) == {
        "dataset": "photographs",
        "resolution": 16,
        "grid_size": 4,
        "codebook_size": 512,
        "num_classes": 3,
        "tokenizer_digest": "ab" * 32,
        "crop": "adm-center",
        "format_version": 1,
    }


def test_a_part_gives_back_its_values(part: Path) -> None:
    written, table = _columns(500), pq.read_table(part)
    assert table["key"].to_pylist() == written["keys"]
    assert table["label"].to_pylist() == written["labels"]
    assert table["source_sha256"].to_pylist() == written["source_sha256"]
    for name in ("codes", "codes_flipped"):
        np.testing.assert_array_equal(np.array(table[name].to_pylist()), written[name])


def test_the_same_rows_are_the_same_bytes(part: Path, tmp_path: Path) -> None:
    write_part(tmp_path / "again.parquet", INFO, **_columns(500))
    assert (tmp_path / "again.parquet").read_bytes() == part.read_bytes()


def test_a_part_is_compressed(part: Path) -> None:
    row_group = pq.ParquetFile(part).metadata.row_group(0)
    assert {row_group.column(index).compression for index in range(5)} == {"ZSTD"}


def test_a_flipped_bit_in_a_page_is_an_error_and_never_another_code(part: Path) -> None:
    """Page headers have no checksum of their own, so a flip there may pass; it must not change a value."""
    content, whole, row_group = part.read_bytes(), pq.read_table(part), pq.ParquetFile(part).metadata.row_group(0)
    caught = 0
    for column in map(row_group.column, range(5)):
        start = column.dictionary_page_offset or column.data_page_offset
        for position in np.linspace(start, start + column.total_compressed_size - 1, 12, dtype=int).tolist():
            damaged = bytearray(content)
            damaged[position] ^= 1
            part.write_bytes(damaged)
            try:
                table = pq.read_table(part, page_checksum_verification=True)
            except OSError:
                caught += 1
            else:
                assert table.equals(whole)
    assert caught >= 50


def test_the_largest_code_of_the_largest_codebook_fits(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, codebook_size=1 << 16)
    columns = {**_columns(2), "codes": np.full((2, 16), 65535), "codes_flipped": np.zeros((2, 16), int)}
    write_part(tmp_path / "part.parquet", info, **columns)
    assert pq.read_table(tmp_path / "part.parquet")["codes"].to_pylist() == [[65535] * 16] * 2


def test_a_part_of_unreadable_images_alone_has_no_rows_and_the_same_schema(tmp_path: Path) -> None:
    write_part(tmp_path / "part.parquet", INFO, **_columns(0))
    assert pq.read_table(tmp_path / "part.parquet").num_rows == 0
    assert pq.read_schema(tmp_path / "part.parquet").equals(schema(INFO), check_metadata=True)


@pytest.mark.parametrize("rows", [[], [("a.jpg", "it is broken"), ("b.jpg", "it is animated (3 frames)")]])
def test_the_quarantine_holds_keys_and_reasons(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    write_quarantine(tmp_path / QUARANTINE, rows)
    table = pq.read_table(tmp_path / QUARANTINE)
    assert table.schema.names == ["key", "reason"]
    assert [(row["key"], row["reason"]) for row in table.to_pylist()] == rows


# In memory -----------------------------------------------------------------------------------------------------------------


def test_an_opened_map_holds_the_rows_of_its_parts_in_order(commit, local_store: LocalStore) -> None:
    pieces = [_columns(3, seed=1), _columns(0, seed=2), _columns(5, seed=3)]
    token_map = TokenMap.open(local_store, commit(*[(INFO, piece) for piece in pieces]))
    assert token_map.info == INFO and len(token_map) == 8
    for index, name in enumerate(("codes", "codes_flipped")):
        np.testing.assert_array_equal(token_map.codes[:, index], np.concatenate([piece[name] for piece in pieces]))
    assert token_map.labels.tolist() == [label for piece in pieces for label in piece["labels"]]


@pytest.mark.parametrize(
    "other",
    [{"dataset": "other"}, {"tokenizer_digest": "cd" * 32}, {"codebook_size": 256}, {"crop": "random"}, {"resolution": 32}],
)
def test_a_part_of_another_map_is_refused(commit, local_store: LocalStore, other: dict[str, Any]) -> None:
    manifest = commit((INFO, _columns(3)), (dataclasses.replace(INFO, **other), _columns(3, seed=1)))
    with pytest.raises(ValueError, match=r"part-00001\.parquet is not a part of this token map"):
        TokenMap.open(local_store, manifest)


def test_a_part_of_another_grid_is_refused(commit, local_store: LocalStore) -> None:
    info = dataclasses.replace(INFO, grid_size=2)
    manifest = commit((INFO, _columns(3)), (info, _columns(3, info=info)))
    with pytest.raises(ValueError, match=r"part-00001\.parquet is not a part of this token map"):
        TokenMap.open(local_store, manifest)


def test_take_gives_stored_or_flipped_codes_as_asked() -> None:
    token_map = _token_map(6)
    rows, flipped = np.array([5, 0, 5, 2]), np.array([True, False, False, True])
    codes, labels = token_map.take(rows, flipped)
    assert codes.dtype == np.int64 and labels.dtype == np.int64
    expected = [token_map.codes[row, int(is_flipped)] for row, is_flipped in zip(rows, flipped, strict=True)]
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(labels, token_map.labels[rows])


def test_what_take_gives_is_a_copy() -> None:
    """Training writes the null label into it."""
    token_map = _token_map(4)
    before = token_map.labels.copy()
    token_map.take(np.arange(4), np.zeros(4, bool))[1][:] = 99
    np.testing.assert_array_equal(token_map.labels, before)


# Batches -------------------------------------------------------------------------------------------------------------------

_ROWS, _BATCHES, _SEEDS = st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31)


def _stream(token_map: TokenMap, seed: int, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows that steps of batch_size see."""
    batches = [token_map.batch_rows(seed, step, batch_size) for step in range(-(-length // batch_size))]
    return tuple(np.concatenate([batch[index] for batch in batches])[:length] for index in (0, 1))


@given(num_rows=_ROWS, batch_size=_BATCHES, seed=_SEEDS)
def test_every_row_is_seen_exactly_once_an_epoch_whatever_the_batch_size(num_rows: int, batch_size: int, seed: int) -> None:
    epochs = _stream(_token_map(num_rows), seed, batch_size, 3 * num_rows)[0].reshape(3, num_rows)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_rows), (3, 1)))


@given(num_rows=_ROWS, batch_sizes=st.tuples(_BATCHES, _BATCHES), seed=_SEEDS)
def test_rows_and_flips_come_in_one_order_whatever_the_batch_size(num_rows: int, batch_sizes: tuple[int, int], seed: int) -> None:
    one, other = (_stream(_token_map(num_rows), seed, batch_size, 3 * num_rows) for batch_size in batch_sizes)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@given(num_rows=_ROWS, num_groups=st.integers(1, 8), group_size=st.integers(1, 12), step=st.integers(0, 50), seed=_SEEDS)
def test_groups_of_a_step_are_the_step_whatever_their_number(
    num_rows: int, num_groups: int, group_size: int, step: int, seed: int
) -> None:
    token_map = _token_map(num_rows)
    whole = token_map.batch_rows(seed, step, num_groups * group_size)
    groups = [token_map.batch_rows(seed, step * num_groups + group, group_size) for group in range(num_groups)]
    for index in (0, 1):
        np.testing.assert_array_equal(np.concatenate([group[index] for group in groups]), whole[index])


@given(num_rows=_ROWS, batch_size=_BATCHES, steps=st.lists(st.integers(0, 1000), min_size=1, max_size=5), seed=_SEEDS)
def test_the_rows_of_a_step_do_not_depend_on_the_steps_before(num_rows: int, batch_size: int, steps: list[int], seed: int) -> None:
    """So a resumed run sees what an uninterrupted one would have."""
    token_map = _token_map(num_rows)
    expected = [_token_map(num_rows).batch_rows(seed, step, batch_size) for step in steps]
    for step, (rows, flipped) in reversed(list(zip(steps, expected, strict=True))):
        again = token_map.batch_rows(seed, step, batch_size)
        np.testing.assert_array_equal(again[0], rows)
        np.testing.assert_array_equal(again[1], flipped)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    token_map = _token_map(200)
    orders = {token_map.batch_rows(seed, epoch, 200)[0].tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_half_of_the_images_are_flipped_and_others_in_each_epoch() -> None:
    token_map = _token_map(4000)
    flips = []
    for epoch in range(3):
        rows, flipped = token_map.batch_rows(0, epoch, 4000)
        flips.append(flipped[np.argsort(rows)])
        assert abs(flipped.mean() - 0.5) < 0.05  # six standard deviations
    for one, other in ((0, 1), (1, 2)):
        assert abs((flips[one] == flips[other]).mean() - 0.5) < 0.05
