"""Parquet files of images: rows and labels as written, and errors that name the file and the column."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from material.layouts import CLASSES, IMAGE_TYPE, Row, found_in, read, scan, sentence_of, write_parquet, write_table
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.storage.base import StorageError


def _parquet(tmp_path: Path, **columns: Any) -> DatasetConfig:
    write_table(tmp_path / "rows" / "0.parquet", pa.table(columns))
    return DatasetConfig(kind="parquet", path=str(tmp_path / "rows"))


def test_one_parquet_file_can_be_named_alone_and_a_folder_may_be_called_so(layouts, layouts_bucket, own_layouts):
    rows, name = layouts.rows("parquet")[6:12], "parquet/train-00001.parquet"
    assert read(DatasetConfig(kind="parquet", path=str(layouts.root / name))) == rows
    assert read(DatasetConfig(kind="parquet", path=f"{layouts_bucket.uri}/{name}", s3=layouts_bucket.config)) == rows
    (own_layouts.root / "parquet").rename(own_layouts.root / "all.parquet")
    assert read(DatasetConfig(kind="parquet", path=str(own_layouts.root / "all.parquet"))) == own_layouts.rows("parquet")


def test_row_without_a_path_is_known_by_file_and_number(tmp_path):
    images = pa.array([{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "b.jpg"}, {"bytes": b"3", "path": ""}], IMAGE_TYPE)
    config = _parquet(tmp_path, image=images, label=[4, 5, 6])
    assert read(config) == [Row("0.parquet/00000000", b"1", 4), Row("b.jpg", b"2", 5), Row("0.parquet/00000002", b"3", 6)]


def test_column_of_bytes_holds_images_too(tmp_path):
    for kind in (pa.binary(), pa.large_binary()):
        config = _parquet(tmp_path, image=pa.array([b"1", b"2", b"3"], kind))
        assert read(config) == [Row(f"0.parquet/0000000{number}", b"%d" % (number + 1)) for number in range(3)]
        assert len(found_in(config)["images without a label"]) == 3 and open_source(config).known_classes() is None


def test_rows_without_bytes_are_empty_images(tmp_path):
    """Which quarantine names, as it does an empty file."""
    images = pa.array([{"bytes": None, "path": "a"}, None, {"bytes": b"3", "path": "c"}], IMAGE_TYPE)
    assert [(row.key, row.data) for row in read(_parquet(tmp_path, image=images))] == [
        ("a", b""),
        ("0.parquet/00000001", b""),
        ("c", b"3"),
    ]


def test_labels_are_integers_and_missing_labels_are_reported(tmp_path):
    """In test splits of hubs, -1 means no label."""
    for kind in (pa.int64(), pa.int8(), pa.uint64()):
        labels = pa.array([3, None, 0, 5 if pa.types.is_unsigned_integer(kind) else -1], kind)
        config = _parquet(tmp_path, image=[b"1", b"2", b"3", b"4"], label=labels)
        assert [row.label for row in read(config)][:3] == [3, -1, 0]
        unlabelled = {row.key for row in read(config) if row.label == -1}
        assert set(found_in(config)["images without a label"]) == unlabelled


def test_columns_that_cannot_be_read_are_named(tmp_path):
    for columns, sentence in (
        ({"pixels": [b"1"], "label": [1]}, r"no column `image` of bytes.* its columns are pixels, label"),
        ({"image": ["text"]}, "no column `image` of bytes"),
        ({"image": [{"path": "a"}]}, "no column `image` of bytes"),
        ({"image": [{"bytes": "text"}]}, "no column `image` of bytes"),
        ({"image": [b"1"], "label": ["cat"]}, r"column label of 0\.parquet is string, not an integer"),
        ({"image": [b"1"], "label": [1.0]}, r"column label of 0\.parquet is double, not an integer"),
        ({"image": [b"1"], "label": [1 << 40]}, r"row 0 of 0\.parquet in .* has label 1099511627776"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read(_parquet(tmp_path, **columns))


def test_class_names_come_from_hugging_face_metadata_alone(tmp_path, layouts):
    config = DatasetConfig(kind="parquet", path=str(tmp_path / "rows"))
    for names, expected in ((CLASSES, CLASSES), (None, None), (("b", "a"), ("b", "a"))):
        write_parquet(tmp_path / "rows" / "0.parquet", layouts.pictures, names)
        assert open_source(config).known_classes() == expected
    for metadata in ("", "{", "[]", '{"info": null}', '{"info": {"features": {"label": {"names": "ab"}}}}'):
        table = pa.table({"image": [b"1"]}).replace_schema_metadata({"huggingface": metadata})
        write_table(tmp_path / "rows" / "0.parquet", table)
        assert open_source(config).known_classes() is None


def test_damaged_parquet_file_is_named(own_layouts):
    path, config = own_layouts.root / "parquet" / "train-00001.parquet", own_layouts.config("parquet")
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-100], b"x" * 5000, whole[:-12] + b"\xff" * 4 + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-00001\.parquet in .* is not a readable Parquet file \(.+\)") as caught:
            scan(config)
        assert "\n" not in str(caught.value)


def test_damaged_pages_of_a_parquet_file_are_errors_in_one_line(own_layouts):
    path, config = own_layouts.root / "parquet" / "train-00001.parquet", own_layouts.config("parquet")
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        start = generator.randrange(4, len(whole) - 3000)
        damaged[start : start + 64] = generator.randbytes(64)
        path.write_bytes(damaged)
        refusal = sentence_of(lambda: read(config))
        assert not refusal or ("train-00001.parquet" in refusal and "\n" not in refusal)
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    with pytest.raises(ValueError, match=r"train-00001\.parquet"):
        read(config)


def test_parquet_file_with_fewer_rows_than_were_scanned_is_named(own_layouts):
    config = own_layouts.config("parquet")
    entries = scan(config)
    for rows in (5, 4, 0):
        write_parquet(own_layouts.root / "parquet" / "train-00001.parquet", own_layouts.pictures[6 : 6 + rows])
        with pytest.raises(StorageError, match=r"train-00001\.parquet in .* has no row 5; the file has changed"):
            list(open_source(config).read(entries))
