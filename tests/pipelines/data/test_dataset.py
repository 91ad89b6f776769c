"""A dataset read through its index: any range of rows, and errors for files that have changed."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enat.images import ImageError, center_crop, decode_image, to_array
from material.layouts import KINDS, Row, make_layouts, open_dataset, tar_bytes, write, write_parquet
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.data import dataset as data_dataset
from pipelines.data.dataset import INDEX, Dataset, IndexSummary, write_index
from pipelines.data.sources.base import Entry, Findings
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.storage.base import StorageError
from pipelines.storage.s3 import S3Folder


def _rows(dataset: Dataset, start: int = 0, stop: int = 10**9) -> list[Row]:
    return [Row(row.key, row.data, row.label, row.captions) for row in dataset.read(start, stop)]


# Reading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_range_of_rows_is_a_piece_of_the_whole(layouts, local_store, kind):
    dataset, expected = open_dataset(layouts.config(kind), local_store), layouts.rows(kind)
    assert _rows(dataset) == expected and dataset.num_images == len(expected)
    assert [row.size for row in dataset.read(0, 20)] == [0 if kind == "parquet" else len(row.data) for row in expected]
    for start, stop in ((0, 4), (5, 7), (11, 19), (18, 99), (7, 7), (20, 30)):
        assert _rows(dataset, start, stop) == expected[start:stop]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in KINDS[1::2] else ()) for kind in KINDS])
def test_dataset_in_a_bucket_is_read_with_what_a_worker_is_sent(layouts, local_store, make_bucket, s3_endpoint, kind):
    bucket = make_bucket("sets")
    s3_endpoint.fill(bucket, {name: data for name, data in layouts.contents().items() if name.startswith((kind, "captions"))})
    sent = pickle.dumps(open_dataset(layouts.config(kind, bucket.uri, s3=bucket.config), local_store))
    assert _rows(pickle.loads(sent), 3, 17) == layouts.rows(kind)[3:17]


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_images_that_are_damaged_on_their_way_are_read_again(layouts, layouts_bucket, local_store, s3_endpoint, kind):
    """The first answer for each object or range has a flipped bit, while the dataset is scanned and read."""
    seen: set[str] = set()

    def is_first(environ) -> bool:
        asked, before = environ["PATH_INFO"] + environ.get("HTTP_RANGE", ""), len(seen)
        seen.add(asked)
        return f"/data/sets/{kind}/" in asked and len(seen) > before

    with s3_endpoint.fault("GET", "", flip=True, times=999) as fault:
        fault.matches = is_first
        dataset = open_dataset(layouts.config(kind, layouts_bucket.uri, s3=layouts_bucket.config), local_store)
        rows, damaged = _rows(dataset), 999 - fault.times
        decoded = [pixels for _, pixels in dataset.decode(16, 0, 99)]
    assert rows == layouts.rows(kind) and damaged >= 4
    for row, pixels in zip(layouts.rows(kind), decoded, strict=True):
        np.testing.assert_array_equal(pixels, to_array(center_crop(decode_image(row.data), 16)))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_whose_images_are_not_compared_are_reported(layouts, layouts_bucket, monkeypatch, kind):
    """Parts of objects that come over https: encryption protects them on their way, but not before it begins."""
    monkeypatch.setattr(S3Folder, "is_compared", False)
    source, findings = open_source(layouts.config(kind, layouts_bucket.uri, s3=layouts_bucket.config)), Findings()
    assert all([*source.scan(unit, findings)] for unit in source.units())
    assert findings.names["files whose images cannot be compared with a checksum"] == [*source.units()]


def test_image_is_read_again_before_it_counts_as_unreadable(layouts, layouts_bucket, local_store, s3_endpoint, monkeypatch):
    monkeypatch.setattr(S3Folder, "is_compared", False)
    dataset = open_dataset(layouts.config("tar", layouts_bucket.uri, s3=layouts_bucket.config), local_store)
    ((png, expected),) = dataset.decode(16, 1, 2)
    assert png.data.startswith(b"\x89PNG")
    with s3_endpoint.fault("GET", "/tar/", flip=True) as fault:
        ((again, pixels),) = dataset.decode(16, 1, 2)
    assert fault.times == 0 and again == png
    np.testing.assert_array_equal(pixels, expected)


def test_digits_are_read_by_their_numbers(local_store):
    dataset = open_dataset(DatasetConfig(kind="digits"), local_store)
    whole = _rows(dataset)
    assert len(whole) == dataset.num_images == 1797 and dataset.class_names == tuple("0123456789")
    assert _rows(dataset, 500, 503) == whole[500:503] and _rows(dataset, 1790, 1900) == whole[1790:]


def test_caption_has_its_number_among_all(layouts, local_store):
    dataset, count = open_dataset(layouts.config("coco"), local_store), 0
    for row, picture in zip(dataset.read(0, 20), layouts.pictures, strict=True):
        assert row.captions == picture.captions and row.first_caption == count
        count += len(picture.captions)
    assert dataset.num_captions == count > 20


def test_loaded_images_are_cropped_and_labelled_and_unreadable_ones_left_out(broken_image_folder, local_store):
    dataset = open_dataset(DatasetConfig(kind="image_folder", path=str(broken_image_folder)), local_store)
    assert dataset.num_images == 14
    images, labels = dataset.load_images(16, 0, 100)
    assert images.shape == (12, 3, 16, 16) and images.dtype == np.uint8
    assert labels.tolist() == [0] * 6 + [1] * 6 and labels.dtype == np.int64
    assert len({image.tobytes() for image in images}) == 12
    first = to_array(center_crop(decode_image((broken_image_folder / "china" / "000.jpg").read_bytes()), 16))
    np.testing.assert_array_equal(images[0], first)
    pieces = [dataset.load_images(16, start, start + 5) for start in (0, 5, 10)]
    np.testing.assert_array_equal(np.concatenate([piece[0] for piece in pieces]), images)
    np.testing.assert_array_equal(np.concatenate([piece[1] for piece in pieces]), labels)


def test_range_without_a_readable_image_is_empty(tmp_path, local_store):
    write(tmp_path / "images" / "text.jpg", b"not an image")
    images, labels = open_dataset(DatasetConfig(kind="images", path=str(tmp_path / "images")), local_store).load_images(16, 0, 10)
    assert images.shape == (0, 3, 16, 16) and labels.shape == (0,)


@pytest.mark.parametrize("kind", ["image_folder", "tar"])
def test_file_over_the_limit_is_not_read(layouts, local_store, kind, monkeypatch):
    """Its row remains, and decoding it raises the reason."""
    dataset, expected = open_dataset(layouts.config(kind), local_store), layouts.rows(kind)
    limit = sorted(len(row.data) for row in expected)[12]
    monkeypatch.setattr(data_dataset, "MAX_FILE_BYTES", limit)
    for row, known in zip(dataset.read(0, 20), expected, strict=True):
        assert row.data == (known.data if len(known.data) <= limit else b"") and row.size == len(known.data)
        if row.size > limit:
            with pytest.raises(ImageError, match=rf"the file has {row.size:,} bytes, more than {limit:,}"):
                row.pixels(16)
        else:
            assert row.pixels(16).shape == (3, 16, 16)
    assert len(dataset.load_images(16, 0, 20)[0]) == 13


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_that_changed_since_it_was_scanned_is_an_error_of_one_line(tmp_path, local_store, kind):
    layouts = make_layouts(tmp_path / "sets", num_images=6)
    dataset = open_dataset(layouts.config(kind), local_store)
    path = max(path for path in (layouts.root / kind).rglob("*") if path.is_file())
    if kind == "parquet":
        write_parquet(path, layouts.pictures[:2])
    elif kind == "tar":
        write(path, tar_bytes([("a.jpg", b"1")]))
    else:
        write(path, b"1")
    with pytest.raises(StorageError, match=f"{path.name}.* (were expected|has changed since it was scanned)") as caught:
        _rows(dataset)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(StorageError, match=rf"{path} cannot be read \(No such file or directory\)"):
        _rows(dataset)


# The index -----------------------------------------------------------------------------------------------------------------

NUM_ENTRIES = 2 * 4096 + 700


def _entry(number: int) -> Entry:
    captions = tuple(f"caption {number}.{order}" for order in range(number % 3))
    return Entry(f"key-{number:06d}", f"file-{number // 100}", 10 * number, number % 977, number % 5 - 1, captions)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An index of several row groups."""
    root = tmp_path_factory.mktemp("large")
    summary = write_index(root / INDEX, (_entry(number) for number in range(NUM_ENTRIES)))
    assert summary == IndexSummary(
        NUM_ENTRIES,
        sum(number % 3 for number in range(NUM_ENTRIES)),
        {label: sum(number % 5 - 1 == label for number in range(NUM_ENTRIES)) for label in range(-1, 4)},
    )
    store = open_store(str(root / "store"))
    file = store.put_file("dataset", "k", INDEX, root / INDEX)
    counts = summary_of("dataset", name="large", num_images=NUM_ENTRIES, num_captions=summary.num_captions)
    fields = {"stage_version": 1, "config": {}, "inputs": {}, "summary": counts}
    return Dataset(DatasetConfig(kind="digits"), store, store.commit(Manifest(stage="dataset", key="k", files=(file,), **fields)))


BORDERS = [0, 1, 4095, 4096, 4097, 8191, 8192, 8193, NUM_ENTRIES - 1, NUM_ENTRIES, NUM_ENTRIES + 50]


@given(ends=st.tuples(*[st.one_of(st.sampled_from(BORDERS), st.integers(0, NUM_ENTRIES + 100))] * 2))
def test_any_slice_of_the_index_is_that_of_its_entries(large, ends):
    start, stop = ends
    rows = large.index(start, stop)
    assert rows["key"].to_pylist() == [f"key-{number:06d}" for number in range(start, min(stop, NUM_ENTRIES))]


def test_index_holds_every_entry_and_the_number_of_its_first_caption(large):
    count = 0
    for number, row in enumerate(large.index(0, NUM_ENTRIES).to_pylist()):
        captions = tuple(row.pop("captions"))
        assert row.pop("first_caption") == count
        assert Entry(**row, captions=captions) == _entry(number)
        count += len(captions)
    assert large.num_captions == count


def test_only_the_row_groups_that_are_needed_are_read(large, monkeypatch):
    asked: list[list[int]] = []
    original = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda self, groups: asked.append(groups) or original(self, groups))
    for start, stop in ((0, 4096), (4095, 4097), (4096, 8192), (8500, 10**6)):
        large.index(start, stop)
    assert asked == [[0], [0, 1], [1], [2]]


def test_equal_entries_are_an_index_of_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_index(tmp_path / name, (_entry(number) for number in range(5000)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_keys_that_are_repeated_are_named_with_their_places(tmp_path):
    def check(*places: tuple[str, str]) -> None:
        write_index(tmp_path / INDEX, (Entry(key, file, 0, 0) for key, file in places))

    check()
    check(("a", "1.tar"), ("b", "1.tar"), ("A", "1.tar"))
    with pytest.raises(
        ValueError, match=r"2 keys of the dataset are not unique: a in 1\.tar and 2\.tar and 1\.tar; b in 1\.tar and"
    ):
        check(("b", "1.tar"), ("a", "1.tar"), ("c", "1.tar"), ("a", "2.tar"), ("a", "1.tar"), ("b", "9.tar"))
    many = [(f"key-{number}", f"{shard}.tar") for shard in range(2) for number in range(9)]
    with pytest.raises(ValueError, match=r"9 keys .* key-4 in 0\.tar and 1\.tar and 4 more"):
        check(*many)
