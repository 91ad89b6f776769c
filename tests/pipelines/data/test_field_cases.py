"""Layouts that users of such systems have met: splits in one folder, files that systems leave behind, other columns and names.

The inputs in field_cases are small and synthetic.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from material.layouts import IMAGE_TYPE, Row, found_in, make_layouts, read, scan, tar_bytes, write, write_table
from pipelines.data.dataset import write_index
from pipelines.data.sources.base import Entry
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.data.sources.names import is_foreign, split_of, split_of_folder

CASES = Path(__file__).parent / "field_cases"


def _config(kind: str, name: str, **given: object) -> DatasetConfig:
    return DatasetConfig(kind=kind, path=str(CASES / name), **given)


# Splits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "splits"), [
    ("parquet", "01_parquet_splits", "test (1 file), train (1 file), validation (1 file)"),
    ("tar", "01_tar_splits", "train (1 file), validation (1 file)"),
])  # fmt: skip
def test_files_of_several_splits_are_refused_until_one_is_chosen(kind: str, name: str, splits: str) -> None:
    with pytest.raises(ValueError, match=r"holds several splits: ") as refused:
        open_source(_config(kind, name)).fingerprint()
    assert splits in str(refused.value) and "dataset.split" in str(refused.value)
    chosen = scan(_config(kind, name, split="train"))
    pattern = "*train-*"
    assert len(chosen) == 8 and [entry.label for entry in chosen] == list(range(8))
    by_pattern = _config(kind, f"{name}/{pattern}")
    assert scan(by_pattern) == chosen and by_pattern.identity() == _config(kind, name, split="train").identity()
    assert len(scan(_config(kind, f"{name}/*"))) > 8  # a pattern may ask for all
    absent = "unknown" if kind == "parquet" else "test"
    with pytest.raises(ValueError, match=rf"split is '?{absent}'?"):
        scan(_config(kind, name, split=absent))


def test_split_of_a_file_is_named_by_words_of_its_path() -> None:
    for name, split in {
        "data/train-00000-of-00005.parquet": "train", "default/validation/0000.parquet": "validation", "VAL2017.tar": "validation",
        "a/dev-1.tar": "validation", "trainval-1.tar": None, "restaurants.tar": None, "test_train.tar": "test+train",
    }.items():  # fmt: skip
        assert split_of(name) == split, name
    for name, split in {"train2017": "train", "val": "validation", "Test-1": "test", "train_station": None, "tests": None}.items():
        assert split_of_folder(name) == split, name


def test_braces_and_wildcards_choose_files(layouts, tmp_path) -> None:
    whole = read(layouts.config("tar"))
    for pattern, rows in {
        "train-{0000..0001}.tar": whole[:12], "train-{0002,0000}.tar": whole[:6] + whole[12:18], "train-000[12].tar": whole[6:18],
        "t*n-0003.tar": whole[18:], "train-{0000..0003}.tar": whole,
    }.items():  # fmt: skip
        assert read(DatasetConfig(kind="tar", path=f"{layouts.root}/tar/{pattern}")) == rows, pattern
    for kind, pattern, sentence in (
        ("tar", "train-{0002..0009}.tar", r"has no train-0004\.tar, train-0005\.tar, train-0006\.tar and 3 more"),
        ("tar", "x-*.tar", r"has no x-\*\.tar"),
        ("tar", "*/train-0000.tar", r"has no \*/train-0000\.tar"),
        ("tar", "{1..1000000}.tar", "names more than 100,000 files"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scan(DatasetConfig(kind=kind, path=f"{layouts.root}/{kind}/{pattern}"))
    odd = write(tmp_path / "a{1..3}.tar", (layouts.root / "tar" / "train-0000.tar").read_bytes())
    assert read(DatasetConfig(kind="tar", path=str(odd))) == whole[:6]


def test_patterns_choose_objects_of_a_bucket(layouts, layouts_bucket) -> None:
    config = DatasetConfig(kind="parquet", path=f"{layouts_bucket.uri}/parquet/train-*[12].parquet", s3=layouts_bucket.config)
    assert read(config) == layouts.rows("parquet")[6:18]


def test_folder_of_splits_is_not_one_of_classes(tmp_path) -> None:
    for kind, sentence in (("image_folder", "holds splits, not classes"), ("images", "holds several splits")):
        with pytest.raises(ValueError, match=sentence):
            open_source(_config(kind, "02_folder_root_with_splits"))
    chosen = _config("image_folder", "02_folder_root_with_splits", split="val")
    assert scan(chosen) == scan(_config("image_folder", "02_folder_root_with_splits/val")) and len(scan(chosen)) == 2
    assert chosen.identity() == _config("image_folder", "02_folder_root_with_splits/val").identity()
    with pytest.raises(ValueError, match=r"has 0 folders of this split \(ILSVRC2012_devkit_t12, train, val\)"):
        open_source(_config("image_folder", "02_folder_root_with_splits", split="test"))
    write(tmp_path / "one" / "train" / "n1" / "a.jpg", b"1")  # one split beside another folder
    write(tmp_path / "one" / "devkit" / "readme.txt", b"")
    with pytest.raises(ValueError, match=r"holds splits, not classes \(train\)"):
        open_source(DatasetConfig(kind="image_folder", path=str(tmp_path / "one")))
    for name in ("bus", "train"):  # a class may be called so
        write(tmp_path / "vehicles" / name / "a.jpg", b"1")
    assert open_source(DatasetConfig(kind="image_folder", path=str(tmp_path / "vehicles"))).known_classes() == ("bus", "train")


def test_split_that_cannot_apply_is_refused() -> None:
    for kind in ("coco", "digits"):
        with pytest.raises(ValueError, match=rf"split does not apply to kind {kind}"):
            DatasetConfig(kind=kind, path="x", captions="x" if kind == "coco" else None, split="train")


# Files that systems leave behind -------------------------------------------------------------------------------------------


def test_hidden_and_foreign_files_are_neither_images_nor_classes(tmp_path) -> None:
    config = _config("image_folder", "03_junk_folders")
    assert [(entry.key, entry.label) for entry in scan(config)] == [("n1/a.JPEG", 0), ("n2/a.JPEG", 1)]
    assert open_source(config).known_classes() == ("n1", "n2")
    found = found_in(config)["hidden or foreign files"]
    assert {"@eaDir/", "__MACOSX/", "lost+found/", "n1/._a.JPEG", "n2/@eaDir/a.JPEG/SYNOFILE_THUMB_M.jpg"} <= set(found)
    for name in ("n1", "n2"):
        write(tmp_path / "clean" / name / "a.JPEG", (CASES / "03_junk_folders" / name / "a.JPEG").read_bytes())
    assert DatasetConfig(kind="image_folder", path=str(tmp_path / "clean")).identity() == config.identity()


def test_foreign_names_are_skipped_in_every_layout(own_layouts) -> None:
    junk = next((own_layouts.root / "images").iterdir()).read_bytes()
    for kind in ("images", "coco", "image_folder"):
        config = own_layouts.config(kind)
        before, identity = read(config), config.identity()
        for name in ("._a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/SYNOFILE_THUMB_M.jpg", "__MACOSX/b.png"):
            write(own_layouts.root / kind / name, junk)
        assert read(config) == before and config.identity() == identity and found_in(config)["hidden or foreign files"], kind
    for kind, name in (("tar", "._train-0000.tar"), ("parquet", ".ipynb_checkpoints/train-00000-checkpoint.parquet")):
        before = read(own_layouts.config(kind))
        write(own_layouts.root / kind / name, junk)
        assert read(own_layouts.config(kind)) == before
    members = [("a.jpg", b"1"), ("._a.jpg", b"2"), ("__MACOSX/._a.jpg", b"3"), ("./b/.DS_Store", b"4"), ("a.cls", b"0")]
    write(own_layouts.root / "mac" / "0.tar", tar_bytes(members))
    config = DatasetConfig(kind="tar", path=str(own_layouts.root / "mac"))
    assert read(config) == [Row("a", b"1", 0)]
    assert found_in(config) == {"hidden or foreign files": [f"0.tar: {name}" for name, _ in members[1:4]]}


def test_names_of_classes_and_images_are_not_foreign() -> None:
    for name in ("a..jpg", "n1/__MACOS/a.jpg", "lost/found.png", "Thumbs.db.png", "eaDir/x.jpg", "a/b.c/d.jpg"):
        assert not is_foreign(name), name
    for name in ("a/Thumbs.db", "$RECYCLE.BIN/x.jpg", "System Volume Information/x.png", "#recycle", "a/.hidden/b.jpg"):
        assert is_foreign(name), name


# Columns and members -------------------------------------------------------------------------------------------------------


def test_another_column_of_labels_is_a_finding_or_chosen() -> None:
    found = found_in(_config("parquet", "07_parquet_labels_column"))
    assert len(found["images without a label"]) == 6
    assert found["files without a column label"] == ["train-00000-of-00001.parquet: its columns are image, labels"]
    chosen = _config("parquet", "07_parquet_labels_column", label_column="labels")
    assert [entry.label for entry in scan(chosen)] == list(range(6)) and found_in(chosen) == {}
    assert chosen.identity() != _config("parquet", "07_parquet_labels_column").identity()
    with pytest.raises(ValueError, match=r"dataset\.label_column is class, but the columns of .*parquet are image, labels"):
        scan(_config("parquet", "07_parquet_labels_column", label_column="class"))


def test_captions_come_from_columns_and_members(tmp_path) -> None:
    texts = pa.array([["one  cat", "a\ncat"], None, [""], ["three"]], pa.list_(pa.string()))
    images = pa.array([b"1", b"2", b"3", b"4"])
    write_table(tmp_path / "rows" / "0.parquet", pa.table({"image": images, "text": pa.array(["x"] * 4), "captions": texts}))
    config = DatasetConfig(kind="parquet", path=str(tmp_path / "rows"))
    assert [row.captions for row in read(config)] == [("one cat", "a cat"), (), (), ("three",)]
    assert len(found_in(config)["images without captions"]) == 2
    chosen = DatasetConfig(kind="parquet", path=config.path, caption_column="text")
    assert [row.captions for row in read(chosen)] == [("x",)] * 4 and chosen.identity() != config.identity()
    for column, sentence in (("title", "the columns of 0.parquet are image, text, captions"), ("image", "it holds binary")):
        with pytest.raises(ValueError, match=rf"dataset\.caption_column is {column}, but {sentence}"):
            scan(DatasetConfig(kind="parquet", path=config.path, caption_column=column))
    about = json.dumps({"caption": "of the json", "url": "x"}).encode()
    write(tmp_path / "shards" / "0.tar", tar_bytes([
        ("0.jpg", b"1"), ("0.txt", "of  the\ttext ü".encode()), ("0.json", about), ("1.jpg", b"2"), ("1.json", about),
        ("2.jpg", b"3"), ("2.txt", b"\xff"), ("2.json", b"{"), ("3.jpg", b"4"), ("3.json", b"[" * 100_000),
    ]))  # fmt: skip
    shards = DatasetConfig(kind="tar", path=str(tmp_path / "shards"))
    assert [row.captions for row in read(shards)] == [("of the text ü",), ("of the json",), (), ()]
    assert found_in(shards)["images without captions"] == ["2", "3"]
    assert found_in(shards)["other files"] == ["0.tar: 2.txt", "0.tar: 2.json", "0.tar: 3.json"]


def test_null_caption_of_coco_is_left_out(own_layouts) -> None:
    path = own_layouts.root / "captions.json"
    captions = json.loads(path.read_bytes())
    captions["annotations"][-1]["caption"] = None  # the first caption of the first image
    path.write_text(json.dumps(captions))
    expected = own_layouts.rows("coco")[0].captions[1:]
    assert read(own_layouts.config("coco"))[0].captions == expected and "None" not in str(read(own_layouts.config("coco")))


def test_image_beside_its_mask_is_one_image() -> None:
    config = _config("tar", "08_tar_two_extensions")
    assert [entry.key for entry in scan(config)] == ["0", "1", "2"]
    assert found_in(config) == {"other files": [f"a.tar: {number}.seg.png" for number in range(3)]}


def test_masks_alone_do_not_say_which_is_the_image(tmp_path) -> None:
    write(tmp_path / "0.tar", tar_bytes([("0.a.png", b"1"), ("0.b.png", b"2")]))
    with pytest.raises(ValueError, match=r"has several images with key 0 \(0\.a\.png, 0\.b\.png\)"):
        scan(DatasetConfig(kind="tar", path=str(tmp_path)))


def test_rows_with_equal_paths_get_keys_of_file_and_row(tmp_path) -> None:
    index = tmp_path / "index.parquet"
    config = _config("parquet", "06_parquet_same_path")
    assert open_source(config).keys_may_repeat and write_index(index, scan(config), keys_may_repeat=True).renamed
    images = pa.array([{"bytes": b"%d" % number, "path": path} for number, path in enumerate(("a", "b", "a"))], IMAGE_TYPE)
    write_table(tmp_path / "rows" / "0.parquet", pa.table({"image": images, "label": [0, 1, 2]}))
    entries = scan(DatasetConfig(kind="parquet", path=str(tmp_path / "rows")))
    assert write_index(index, entries, keys_may_repeat=True).renamed == ("a",)
    table = pq.read_table(index)
    assert table["key"].to_pylist() == ["0.parquet/00000000", "b", "0.parquet/00000002"]
    assert table["label"].to_pylist() == [0, 1, 2] and table["position"].to_pylist() == [0, 1, 2]
    assert write_index(index, entries[:2], keys_may_repeat=True).renamed == ()


def test_message_about_many_repeated_keys_is_short(tmp_path) -> None:
    entries = (Entry(f"{number % 50}.jpg", f"{number:05d}.tar", 0, 1) for number in range(20_000))
    with pytest.raises(ValueError, match=r"50 keys of the dataset are not unique: 0\.jpg in 00000\.tar and .* 395 more") as refused:
        write_index(tmp_path / "index", entries)
    assert len(str(refused.value)) < 1000


def test_captions_of_another_split_are_refused(tmp_path, local_store, make_session) -> None:
    from pipelines.stages import dataset as stage
    from pipelines.workflow import driver
    from pipelines.workflow.stage import Node

    layouts = make_layouts(tmp_path / "sets", num_images=4)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}))
    config = DatasetConfig(kind="coco", path=str(layouts.root / "coco"), captions=str(other))
    with pytest.raises(ValueError, match=r"none of the 4 images at .*/coco has captions in .*/other\.json"):
        driver.execute([Node("dataset", stage.STAGE, config)], make_session(local_store))
