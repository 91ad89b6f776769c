"""The token map: its format on disk, and batches in which every image occurs exactly once per epoch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.token_map import (
    QUARANTINE,
    TokenMap,
    TokenMapInfo,
    TokenRows,
    read_codes,
    schema,
    write_quarantine,
    write_shard,
)
from pipelines.storage.base import StorageError

INFO = TokenMapInfo(dataset="photographs", resolution=16, grid_size=4, codebook_size=512, num_classes=3, tokenizer_digest="ab" * 32)
CAPTIONED = dataclasses.replace(INFO, num_captions=1_000)


def _rows(rows: int, seed: int = 0, info: TokenMapInfo = INFO, first_caption: int = 0) -> TokenRows:
    """Every third row has no captions, the others one to five."""
    rng = np.random.default_rng(seed)
    shape = (rows, info.grid_size**2)
    counts = np.where(np.arange(rows) % 3 == 2, 0, rng.integers(1, 6, rows))
    return TokenRows(
        keys=[f"image-{seed}-{row}" for row in range(rows)],
        codes=rng.integers(0, info.codebook_size, shape),
        codes_flipped=rng.integers(0, info.codebook_size, shape),
        labels=rng.integers(-1, info.num_classes, rows).tolist(),
        source_sha256=[hashlib.sha256(f"{seed}-{row}".encode()).digest() for row in range(rows)],
        captions=[tuple(f"caption {n} of image {seed}-{row}" for n in range(count)) for row, count in enumerate(counts)],
        first_captions=(first_caption + np.cumsum(counts) - counts).tolist(),
    )


def _token_map(num_rows: int, seed: int = 0) -> TokenMap:
    rows = _rows(num_rows, seed)
    codes = np.stack([rows.codes, rows.codes_flipped], axis=1).astype(np.uint16)
    captions = np.array([rows.first_captions, list(map(len, rows.captions))]).T
    return TokenMap(INFO, codes, np.array(rows.labels, np.int32), captions)


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "part-00000.parquet"
    write_shard(path, INFO, _rows(500))
    return path


@pytest.fixture
def commit_to(tmp_path):
    """A token map in a store, of shards with their own infos."""

    def commit(
        store: ArtifactStore,
        *parts: tuple[TokenMapInfo, TokenRows],
        info: TokenMapInfo = INFO,
        num_rows: int | None = None,
        key: str = "k",
    ) -> Manifest:
        records = []
        for number, (part_info, rows) in enumerate(parts):
            source = tmp_path / f"part-{number:05d}.parquet"
            write_shard(source, part_info, rows)
            records.append(store.put_file("token_map", key, source.name, source))
        write_quarantine(tmp_path / QUARANTINE, [("image-x", "it is broken")])
        records.append(store.put_file("token_map", key, QUARANTINE, tmp_path / QUARANTINE))
        total = sum(len(rows) for _, rows in parts) if num_rows is None else num_rows
        summary = summary_of("token_map", info=info, rows=total)
        return store.commit(
            Manifest(stage="token_map", key=key, stage_version=1, config={}, inputs={}, files=tuple(records), summary=summary)
        )

    return commit


@pytest.fixture
def commit(commit_to, local_store):
    return functools.partial(commit_to, local_store)


# Format --------------------------------------------------------------------------------------------------------------------


def test_shard_has_the_documented_columns_metadata_and_values(part, tmp_path):
    codes, found, written, table = (
        pa.list_(pa.field("element", pa.uint16()), 16),
        pq.read_schema(part),
        _rows(500),
        pq.read_table(part),
    )
    columns = {"key": pa.string(), "codes": codes, "codes_flipped": codes, "label": pa.int32(), "source_sha256": pa.binary(32)}
    assert found.remove_metadata() == pa.schema(list(columns.items()))
    assert json.loads(found.metadata[b"enat"]) == {
        "resolution": 16,
        "grid_size": 4,
        "codebook_size": 512,
        "num_classes": 3,
        "tokenizer_digest": "ab" * 32,
        "num_captions": 0,
        "dtype": "float32",
        "crop": "adm-center",
        "format_version": 3,
    }
    assert table["key"].to_pylist() == written.keys
    assert table["label"].to_pylist() == written.labels
    assert table["source_sha256"].to_pylist() == written.source_sha256
    for name in ("codes", "codes_flipped"):
        np.testing.assert_array_equal(np.array(table[name].to_pylist()), getattr(written, name))
    row_group = pq.ParquetFile(part).metadata.row_group(0)
    assert {row_group.column(index).compression for index in range(5)} == {"ZSTD"}
    write_shard(tmp_path / "again.parquet", INFO, _rows(500))
    assert (tmp_path / "again.parquet").read_bytes() == part.read_bytes(), "equal rows give equal bytes"


def test_shard_of_a_dataset_with_captions_has_them_and_the_number_of_the_first(tmp_path):
    rows = _rows(20, first_caption=70)
    write_shard(tmp_path / "part.parquet", CAPTIONED, rows)
    table = pq.read_table(tmp_path / "part.parquet")
    assert (
        table.schema.field("captions").type == pa.list_(pa.field("element", pa.string()))
        and table.schema.field("first_caption").type == pa.int64()
    )
    assert table["captions"].to_pylist() == [list(captions) for captions in rows.captions] and () in rows.captions
    assert table["first_caption"].to_pylist() == rows.first_captions and rows.first_captions[0] == 70


def test_flipped_bit_in_a_page_is_an_error_and_never_another_code(part):
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


def test_largest_code_of_the_largest_codebook_fits(tmp_path):
    info = dataclasses.replace(INFO, codebook_size=1 << 16)
    write_shard(tmp_path / "shard.parquet", info, dataclasses.replace(_rows(2), codes=np.full((2, 16), 65535)))
    assert pq.read_table(tmp_path / "shard.parquet")["codes"].to_pylist() == [[65535] * 16] * 2


def test_shard_may_have_no_rows_and_a_quarantine_holds_keys_and_reasons(tmp_path):
    write_shard(tmp_path / "shard.parquet", INFO, _rows(0))
    assert pq.read_table(tmp_path / "shard.parquet").num_rows == 0
    assert pq.read_schema(tmp_path / "shard.parquet").equals(schema(INFO), check_metadata=True)
    for rows in ([], [("a.jpg", "it is broken"), ("b.jpg", "it is animated (3 frames)")]):
        write_quarantine(tmp_path / QUARANTINE, rows)
        table = pq.read_table(tmp_path / QUARANTINE)
        assert table.schema.names == ["key", "reason"]
        assert [(row["key"], row["reason"]) for row in table.to_pylist()] == rows


# In memory -----------------------------------------------------------------------------------------------------------------


def test_opened_map_holds_the_rows_of_its_parts_in_order(commit, local_store):
    pieces = [_rows(3, seed=1), _rows(0, seed=2), _rows(5, seed=3)]
    token_map = TokenMap.open(local_store, commit(*[(INFO, piece) for piece in pieces]))
    assert token_map.info == INFO and len(token_map) == 8
    for index, name in enumerate(("codes", "codes_flipped")):
        np.testing.assert_array_equal(token_map.codes[:, index], np.concatenate([getattr(piece, name) for piece in pieces]))
    assert token_map.labels.tolist() == [label for piece in pieces for label in piece.labels]


def test_the_name_of_the_dataset_is_in_shards_of_older_maps_only(commit, local_store):
    """It can be corrected, so equal images must give equal shards whatever they are called."""
    older, renamed = (dataclasses.replace(INFO, **values) for values in ({"format_version": 2}, {"dataset": "pictures"}))
    made = {info: commit((info, _rows(5)), info=info, key=f"k{number}") for number, info in enumerate((INFO, older, renamed))}
    digests = {info: [record.sha256 for record in manifest.files] for info, manifest in made.items()}
    assert digests[renamed] == digests[INFO] != digests[older]
    assert TokenMap.open(local_store, made[older]).info == older
    with pytest.raises(ValueError, match=r"part-00000\.parquet is not a shard of this token map"):
        TokenMap.open(local_store, commit((older, _rows(5)), info=dataclasses.replace(older, dataset="pictures"), key="another"))


def test_opened_map_has_the_captions_of_its_rows(commit, local_store):
    pieces = [_rows(4, seed=1, info=CAPTIONED), _rows(5, seed=2, info=CAPTIONED, first_caption=50)]
    whole = TokenRows.concatenate(pieces)
    for name in ("keys", "labels", "source_sha256", "captions", "first_captions"):
        assert getattr(whole, name) == [value for piece in pieces for value in getattr(piece, name)]
    token_map = TokenMap.open(local_store, commit(*[(CAPTIONED, piece) for piece in pieces], info=CAPTIONED))
    assert token_map.captions.tolist() == [list(pair) for pair in zip(whole.first_captions, map(len, whole.captions), strict=True)]
    assert () in whole.captions


def test_shards_of_another_map_or_with_more_or_fewer_rows_are_refused(commit, local_store):
    others = [{"tokenizer_digest": "cd" * 32}, {"codebook_size": 256}, {"crop": "random"}]
    for other in [*others, {"resolution": 32}, {"dtype": "bfloat16"}, {"num_captions": 1_000}, {"grid_size": 2}]:
        info = dataclasses.replace(INFO, **other)
        manifest = commit((INFO, _rows(3)), (info, _rows(3, seed=1, info=info)), key=next(iter(other)))
        with pytest.raises(ValueError, match=r"part-00001\.parquet is not a shard of this token map"):
            TokenMap.open(local_store, manifest)
    for num_rows in (7, 9):
        manifest = commit((INFO, _rows(3)), (INFO, _rows(5, seed=1)), num_rows=num_rows, key=f"k{num_rows}")
        with pytest.raises(ValueError, match=rf"token map k\d hold 8 rows, but its manifest states {num_rows}"):
            TokenMap.open(local_store, manifest)


def _damage_a_page(path: Path) -> None:
    """One bit of the codes; behind page headers, in compressed bytes."""
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)


def test_damaged_page_is_refused_by_name(commit, local_store, tmp_path):
    """Once by the digest in the manifest; and where the damage was there before the digest was taken, by the page's checksum."""
    manifest = commit((INFO, _rows(300)))
    part = tmp_path / "part-00000.parquet"
    _damage_a_page(part)
    damaged = local_store.put_file("token_map", "damaged", part.name, part)
    with pytest.raises(ValueError, match=r"part-00000\.parquet is damaged"):
        TokenMap.open(local_store, dataclasses.replace(manifest, key="damaged", files=(damaged,)))
    _damage_a_page(Path(local_store.uri) / "token_map" / "k" / part.name)
    with pytest.raises(StorageError, match=r"part-00000\.parquet was changed after it was made"):
        TokenMap.open(local_store, manifest)


# A map that a node's workers share -----------------------------------------------------------------------------------------------


DRAWN = (np.array([0, 3, 9, 4]), np.array([True, False, True, False]))  # rows, and which of them are flipped


def _same(one: TokenMap, other: TokenMap) -> bool:
    return one.info == other.info and all(
        np.array_equal(getattr(one, name), getattr(other, name)) and getattr(one, name).dtype == getattr(other, name).dtype
        for name in ("codes", "labels", "captions")
    )


def _cached(folder: Path) -> Path:
    (found,) = (folder / "downloads").glob("token-map-*")
    return found


def test_shared_map_is_read_once_and_mapped_from_then_on(commit, local_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    info = dataclasses.replace(INFO, num_captions=3)
    rows = _rows(5)
    rows.captions, rows.first_captions = [("a", "b"), (), ("c",), (), ()], [0, 2, 2, 3, 3]
    manifest = commit((info, rows), (info, rows), info=info)
    plain = TokenMap.open(local_store, manifest)
    assert plain.captions.any() and _same(plain, TokenMap.open_shared(local_store, manifest))
    for part in (Path(local_store.uri) / "token_map" / "k").glob("part-*"):
        part.unlink()
    again = TokenMap.open_shared(local_store, manifest)
    assert _same(plain, again) and not again.codes.flags.writeable
    mapped = again.codes
    while mapped.base is not None and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    assert isinstance(mapped, np.memmap), "pages of the file, which all processes share"
    for one, other in zip(plain.take(*DRAWN), again.take(*DRAWN), strict=True):
        np.testing.assert_array_equal(one, other)


def test_damaged_shared_map_is_read_again(commit, local_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    manifest = commit((INFO, _rows(5)))
    plain = TokenMap.open(local_store, manifest)
    assert len(TokenMap.open_shared(local_store, manifest)) == 5
    for name in ("codes.npy", "labels.npy", "sha256.json"):
        for content in (b"damaged", None):
            path = _cached(tmp_path / "cache") / name
            path.unlink() if content is None else path.write_bytes(path.read_bytes()[:-2] + content[:2])
            assert _same(plain, TokenMap.open_shared(local_store, manifest))


def test_damaged_shard_is_refused_for_a_shared_map_and_leaves_nothing_in_the_cache(commit, local_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    manifest = commit((INFO, _rows(300)))
    _damage_a_page(Path(local_store.uri) / "token_map" / "k" / "part-00000.parquet")
    with pytest.raises(StorageError, match=r"part-00000\.parquet was changed after it was made"):
        TokenMap.open_shared(local_store, manifest)
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_without_a_cache_every_worker_loads_the_map_and_warns(commit, local_store, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file" / "cache"))
    manifest = commit((INFO, _rows(5)))
    assert _same(TokenMap.open(local_store, manifest), TokenMap.open_shared(local_store, manifest))
    assert "the token map is loaded into the memory of each worker" in caplog.text


def test_shared_map_may_have_no_rows(commit, local_store):
    assert len(TokenMap.open_shared(local_store, commit((INFO, _rows(0))))) == 0


def test_codes_of_some_rows_are_read_from_the_shards_that_hold_them(commit, local_store):
    pieces = [_rows(3, seed=1), _rows(0, seed=2), _rows(5, seed=3)]
    whole, manifest = TokenRows.concatenate(pieces), commit(*[(INFO, piece) for piece in pieces])
    for wanted in ([0], [2, 3], [0, 4, 7], [3, 4, 5, 6, 7], list(range(8))):
        keys, codes = read_codes(local_store, manifest, wanted)
        assert keys == [whole.keys[row] for row in wanted] and codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, whole.codes[wanted])


_FITS = {"tokenizer_digest": INFO.tokenizer_digest, "grid_size": 4, "codebook_size": 512}


def test_map_that_does_not_fit_is_refused_naming_both_sides():
    INFO.require("the model", **_FITS)  # raises nothing
    for changed, own, expected in (
        ({"tokenizer_digest": "cd" * 32}, "tokenizer abababababab", "tokenizer cdcdcdcdcdcd"),
        ({"grid_size": 16}, "grid 4", "grid 16"),
        ({"codebook_size": 1024}, "codebook 512", "codebook 1024"),
        ({"grid_size": 16, "codebook_size": 1024}, "grid 4, codebook 512", "grid 16, codebook 1024"),
    ):
        sentence = rf"^the token map of photographs \(16 px\) has {own}, but the model expects {expected}$"
        with pytest.raises(ValueError, match=sentence):
            INFO.require("the model", **{**_FITS, **changed})


def test_take_gives_a_copy_of_stored_or_flipped_codes_and_of_labels():
    """A row without a label gets the null label. Training writes into the copy."""
    token_map = _token_map(40)
    rows, flipped = np.arange(40)[::-1], np.arange(40) % 3 == 0
    for _ in range(2):
        codes, labels = token_map.take(rows, flipped)
        assert codes.dtype == np.int64 and labels.dtype == np.int64
        expected = [token_map.codes[row, int(is_flipped)] for row, is_flipped in zip(rows, flipped, strict=True)]
        np.testing.assert_array_equal(codes, expected)
        assert labels.tolist() == [INFO.num_classes if label == -1 else label for label in token_map.labels[rows].tolist()]
        assert set(labels.tolist()) == {0, 1, 2, 3}
        labels[:] = codes[:] = 99


# Batches -------------------------------------------------------------------------------------------------------------------

_ROWS, _BATCHES, _SEEDS = st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31)


FIELDS = ("rows", "flipped", "captions")


def _stream(token_map: TokenMap, seed: int, batch_size: int, length: int) -> tuple[np.ndarray, ...]:
    """What the first steps of batch_size see: rows, flips, captions."""
    batches = [token_map.batch_rows(seed, step, batch_size) for step in range(-(-length // batch_size))]
    return tuple(np.concatenate([getattr(batch, name) for batch in batches])[:length] for name in FIELDS)


@given(num_rows=_ROWS, batch_sizes=st.tuples(_BATCHES, _BATCHES), seed=_SEEDS)
def test_every_row_occurs_once_per_epoch_in_an_order_that_batch_sizes_do_not_change(num_rows, batch_sizes, seed):
    one, other = (_stream(_token_map(num_rows), seed, batch_size, 3 * num_rows) for batch_size in batch_sizes)
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(np.sort(one[0].reshape(3, num_rows), axis=1), np.tile(np.arange(num_rows), (3, 1)))


@given(num_rows=_ROWS, batch_size=_BATCHES, steps=st.lists(st.integers(0, 1000), min_size=1, max_size=5), seed=_SEEDS)
def test_rows_of_a_step_do_not_depend_on_the_steps_before(num_rows, batch_size, steps, seed):
    """A resumed run sees the same rows as an uninterrupted one."""
    token_map = _token_map(num_rows)
    expected = [_token_map(num_rows).batch_rows(seed, step, batch_size) for step in steps]
    for step, before in reversed(list(zip(steps, expected, strict=True))):
        again = token_map.batch_rows(seed, step, batch_size)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(again, name), getattr(before, name))


@given(num_rows=_ROWS, batch_size=_BATCHES, step=st.integers(0, 1000), seed=_SEEDS)
def test_caption_is_one_of_its_row_own_and_minus_one_where_it_has_none(num_rows, batch_size, step, seed):
    token_map = _token_map(num_rows)
    batch = token_map.batch_rows(seed, step, batch_size)
    first, count = token_map.captions[batch.rows].T
    is_captioned = count > 0
    assert (batch.captions[~is_captioned] == -1).all()
    assert (first <= batch.captions)[is_captioned].all() and (batch.captions < first + count)[is_captioned].all()


def test_seeds_and_epochs_draw_other_orders_and_flip_other_halves():
    token_map = _token_map(4000)
    batches = [token_map.batch_rows(seed, epoch, 4000) for seed in range(3) for epoch in range(3)]
    assert len({batch.rows.tobytes() for batch in batches}) == 9
    flips = [batch.flipped[np.argsort(batch.rows)] for batch in batches]
    assert all(abs(some.mean() - 0.5) < 0.05 for some in flips)  # six standard deviations
    assert all(abs((one == other).mean() - 0.5) < 0.05 for one, other in itertools.pairwise(flips))


def test_row_captions_are_drawn_uniformly_and_again_each_epoch():
    """Six standard deviations of a share over 8,000 draws."""
    num_rows, count, epochs = 2_000, 5, 4
    captions = np.stack([count * np.arange(num_rows), np.full(num_rows, count)], axis=1)
    token_map = TokenMap(INFO, np.zeros((num_rows, 2, 16), np.uint16), np.zeros(num_rows, np.int32), captions)
    drawn = []
    for epoch in range(epochs):
        batch = token_map.batch_rows(3, epoch, num_rows)
        drawn.append((batch.captions - count * batch.rows)[np.argsort(batch.rows)])
    shares = np.bincount(np.concatenate(drawn), minlength=count) / (num_rows * epochs)
    np.testing.assert_allclose(shares, 1 / count, atol=6 * np.sqrt(0.2 * 0.8 / (num_rows * epochs)))
    for one, other in itertools.pairwise(drawn):
        assert abs((one == other).mean() - 1 / count) < 6 * np.sqrt(0.2 * 0.8 / num_rows)
    flipped = token_map.batch_rows(3, 0, num_rows)
    halves = [(flipped.captions - count * flipped.rows)[flipped.flipped == side].mean() for side in (False, True)]
    assert abs(halves[0] - halves[1]) < 6 * np.sqrt(2 * 2 / (num_rows / 2)), "which caption says nothing of the flip"
