"""Layouts of datasets: every layout gives the same images, and irregular files are reported or refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from material.layouts import (
    CLASSES,
    KINDS,
    coco_captions,
    found_in,
    read,
    scan,
    write,
)
from pipelines.data.sources.base import Entry, _pieces
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.data.sources.digits import DigitsSource


def _fingerprint(config: DatasetConfig) -> str:
    return open_source(config).fingerprint()


# Every layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_every_layout_gives_the_same_photographs_from_a_folder_and_a_bucket(layouts, layouts_bucket, kind):
    expected = {"images": (), "coco": (), "tar": None}.get(kind, CLASSES)
    for config in (layouts.config(kind), layouts.config(kind, layouts_bucket.uri, s3=layouts_bucket.config)):
        assert read(config) == layouts.rows(kind) == read(config)
        assert found_in(config) == {}
        assert open_source(config).known_classes() == expected
        assert _fingerprint(config) == _fingerprint(config)


def test_only_the_bytes_of_the_images_asked_for_are_fetched(layouts, layouts_bucket, s3_endpoint):
    config = layouts.config("tar", layouts_bucket.uri, s3=layouts_bucket.config)
    entries = scan(config)
    s3_endpoint.requests.clear()
    assert list(open_source(config).read(entries[7:9])) == [row.data for row in layouts.rows("tar")[7:9]]
    asked = sorted(headers["RANGE"] for _, _, headers in s3_endpoint.requests)
    assert asked == sorted(2 * [f"bytes={e.position}-{e.position + e.size - 1}" for e in entries[7:9]]), "and compared"


def test_invalid_config_of_a_dataset_is_refused():
    with pytest.raises(ValueError, match=r"kind is 'imagenet'; choose one of digits, image_folder"):
        DatasetConfig(kind="imagenet")
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"path is missing; for kind {kind} it must name"):
            DatasetConfig(kind=kind)
    for kind, captions in (("coco", None), ("images", "captions.json")):
        with pytest.raises(ValueError, match=r"captions .* give both or neither"):
            DatasetConfig(kind=kind, path="x", captions=captions)
    for kind, num_classes in (("images", 3), ("tar", 0), ("parquet", -1), ("tar", 1_000_001)):
        with pytest.raises(
            ValueError, match=rf"num_classes is {num_classes}; it must be 1 to 1,000,000, and applies to kinds tar and parquet only"
        ):
            DatasetConfig(kind=kind, path="x", num_classes=num_classes)


def test_path_that_does_not_exist_or_is_empty_is_named(tmp_path):
    for kind in KINDS:
        for path in (tmp_path / "nowhere", write(tmp_path / "file", b"")):
            config = DatasetConfig(kind=kind, path=str(path), captions="x" if kind == "coco" else None)
            with pytest.raises(ValueError, match=rf"dataset\.path: {path} "):
                open_source(config)
    write(tmp_path / "empty" / "README.txt", b"")
    for kind, sentence in (
        ("image_folder", "has no class folders"),
        ("tar", r"has no \.tar files"),
        ("parquet", r"has no \.parquet files"),
    ):
        with pytest.raises(ValueError, match=rf"dataset\.path {tmp_path}/empty {sentence}"):
            scan(DatasetConfig(kind=kind, path=str(tmp_path / "empty")))


# Fingerprints --------------------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_change_with_the_path_or_the_time(layouts, tmp_path):
    copy = Path(shutil.copytree(layouts.root, tmp_path / "copy"))
    for number, path in enumerate(sorted(copy.rglob("*"))):
        os.utime(path, (number, number))
    for kind in KINDS:
        config = layouts.config(kind, str(copy))
        assert _fingerprint(config) == _fingerprint(layouts.config(kind))
        assert config.identity() == layouts.config(kind).identity() and str(copy) not in str(config.identity())


def _change(change: str, first: Path, second: Path) -> None:
    if change == "byte":
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 1
        first.write_bytes(content)
    elif change == "removed":
        first.unlink()
    elif change == "added":
        shutil.copy(first, first.with_stem("zzz"))
    elif change == "renamed":  # still the first in order: names are keys
        first.rename(first.with_stem("aaa"))
    else:
        first.rename(first.parent / "swap")
        second.rename(first)
        (first.parent / "swap").rename(second)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_changes_with_content_and_order(layouts, tmp_path, kind):
    for change in ("byte", "removed", "added", "order", "renamed"):
        own = replace(layouts, root=Path(shutil.copytree(layouts.root, tmp_path / change)))
        first, second = sorted(path for path in (own.root / kind).rglob("*") if path.is_file())[:2]
        _change(change, first, second)
        assert _fingerprint(own.config(kind)) != _fingerprint(layouts.config(kind)), change


def test_fingerprint_changes_with_labels_classes_and_captions(own_layouts):
    before = {kind: _fingerprint(own_layouts.config(kind)) for kind in KINDS}
    picture = next((own_layouts.root / "image_folder" / "coffee").glob("*.*"))
    picture.rename(own_layouts.root / "image_folder" / "rocket" / picture.name)
    assert (moved := _fingerprint(own_layouts.config("image_folder"))) != before["image_folder"]
    (own_layouts.root / "image_folder" / "a-class-without-images").mkdir()
    assert _fingerprint(own_layouts.config("image_folder")) != moved
    other = coco_captions([replace(picture, captions=("another",)) for picture in own_layouts.pictures])
    write(own_layouts.root / "captions.json", json.dumps(other).encode())
    assert _fingerprint(own_layouts.config("coco")) != before["coco"]
    assert _fingerprint(own_layouts.config("images")) == before["images"]


def test_other_files_do_not_change_a_fingerprint(own_layouts):
    for kind in KINDS:
        before = _fingerprint(own_layouts.config(kind))
        write(own_layouts.root / kind / "README.txt", b"about")
        assert _fingerprint(own_layouts.config(kind)) == before


def test_object_of_a_bucket_is_known_by_its_etag(layouts, make_bucket, s3_endpoint):
    def fingerprint(contents: dict[str, bytes]) -> str:
        folder = make_bucket()
        s3_endpoint.fill(folder, contents)
        s3_endpoint.requests.clear()
        found = _fingerprint(DatasetConfig(kind="images", path=f"{folder.uri}/images", s3=folder.config))
        assert not any("picture" in target for _, target, _ in s3_endpoint.requests)  # nothing was read
        return found

    contents = {f"images/{picture.name}": picture.data for picture in layouts.pictures}
    changed = {**contents, f"images/{layouts.pictures[3].name}": b"x"}
    assert fingerprint(contents) == fingerprint(contents) != fingerprint(changed)


# Digits --------------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_with_seventeen_levels_of_gray():
    rows, expected = read(DatasetConfig(kind="digits")), load_digits()
    assert [row.label for row in rows] == expected.target.tolist()
    assert len({row.key for row in rows}) == len(rows) == 1797
    assert DigitsSource().known_classes() == tuple("0123456789")
    for row, image in zip(rows, expected.images, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(row.data)))
        assert row.data.startswith(b"\x89PNG") and decoded.dtype == np.uint8
        np.testing.assert_array_equal(np.round(decoded / 255 * 16), image)  # 0..16 become 0..255


def test_fingerprint_of_the_digits_is_that_of_their_pixels_and_labels():
    source = DigitsSource()
    images, labels = source._digits

    def changed(images: np.ndarray, labels: np.ndarray) -> str:
        other = DigitsSource()
        other.__dict__["_digits"] = (images, labels)
        return other.fingerprint()

    assert changed(images.copy(), labels.copy()) == source.fingerprint()
    assert changed(np.where(np.arange(8) == 3, 255 - images, images).astype(np.uint8), labels) != source.fingerprint()
    assert changed(images, labels[::-1]) != source.fingerprint()


# Folders -------------------------------------------------------------------------------------------------------------------


def test_classes_are_numbered_by_their_sorted_names_with_images_or_without(own_layouts):
    (own_layouts.root / "image_folder" / "b-nothing").mkdir()
    write(own_layouts.root / "image_folder" / ".thumbnails" / "1.jpg", b"")
    config = own_layouts.config("image_folder")
    assert open_source(config).known_classes() == ("astronaut", "b-nothing", "chelsea", "coffee", "rocket")
    moved = [replace(row, label=row.label + (row.label > 0)) for row in own_layouts.rows("image_folder")]
    assert read(config) == moved


def test_files_beside_the_class_folders_are_reported(own_layouts):
    root = own_layouts.root / "image_folder"
    write(root / "loose.jpg", b"")
    write(root / ".thumbnails" / "1.jpg", b"")
    assert found_in(own_layouts.config("image_folder"))["other files"] == ["loose.jpg"]


@pytest.mark.parametrize("kind", ["image_folder", "images", "coco"])
def test_other_files_are_reported_and_images_of_other_formats_are_entries(own_layouts, kind):
    """Images that cannot be decoded end in quarantine with a reason."""
    place = "coffee/" if kind == "image_folder" else "below/"
    others = [f"{place}{name}" for name in ("README.txt", "labels.csv", "noimage", "x.jpg.part")]
    images = [f"{place}{name}" for name in ("a.webp", "b.GIF", "c.tiff", "d.bmp", "UPPER.JPG", "e.jpe")]
    for name in [*others, *images]:
        write(own_layouts.root / kind / name, b"x")
    config = own_layouts.config(kind)
    assert found_in(config)["other files"] == sorted(others)
    assert {entry.key for entry in scan(config)} == {row.key for row in own_layouts.rows(kind)} | set(images)


def test_class_folder_may_be_a_link_as_in_shared_copies_of_imagenet(own_layouts):
    (own_layouts.root / "image_folder" / "linked").symlink_to(
        own_layouts.root / "image_folder" / "coffee", target_is_directory=True
    )
    rows = read(own_layouts.config("image_folder"))
    assert [row.data for row in rows if row.label == 3] == [row.data for row in rows if row.label == 2]
    assert {row.key.split("/")[0] for row in rows if row.label == 3} == {"linked"}


def test_circular_links_and_folders_named_like_images_add_no_images(own_layouts):
    before = _fingerprint(own_layouts.config("image_folder"))
    (own_layouts.root / "image_folder" / "coffee" / "up").symlink_to(own_layouts.root / "image_folder")
    (own_layouts.root / "image_folder" / "coffee" / "album.jpg").mkdir()
    assert read(own_layouts.config("image_folder")) == own_layouts.rows("image_folder")
    assert _fingerprint(own_layouts.config("image_folder")) == before


def test_folder_of_splits_or_of_images_without_classes_is_refused(layouts, tmp_path):
    for number, names in enumerate((["train", "val"], ["Train"], ["test", "training", "validation"])):
        root = tmp_path / str(number)
        for name in names:
            write(root / name / "cat" / "1.jpg", b"")
        with pytest.raises(ValueError, match=rf"dataset\.path {root} holds splits, not classes \({', '.join(names)}\)"):
            open_source(DatasetConfig(kind="image_folder", path=str(root)))
        write(root / "devkit" / "readme.txt", b"")  # one more folder beside the splits
        with pytest.raises(ValueError, match="holds splits, not classes"):
            open_source(DatasetConfig(kind="image_folder", path=str(root)))
    with pytest.raises(ValueError, match=r"has no class folders.* kind images"):
        open_source(DatasetConfig(kind="image_folder", path=str(layouts.root / "images")))


# COCO ----------------------------------------------------------------------------------------------------------------------


def test_captions_are_in_the_order_of_their_ids_with_single_spaces(layouts):
    written = json.loads((layouts.root / "captions.json").read_bytes())["annotations"]
    assert any("\n" in each["caption"] for each in written) and [each["id"] for each in written] != sorted(
        each["id"] for each in written
    )
    captions = {row.key: row.captions for row in read(layouts.config("coco"))}
    assert captions == {picture.name: picture.captions for picture in layouts.pictures}
    assert {len(each) for each in captions.values()} == {1, 2, 3}


def test_absent_images_and_images_without_captions_are_named(own_layouts):
    gone, unknown, bare = own_layouts.pictures[0].name, own_layouts.pictures[1].name, own_layouts.pictures[2].name
    values = coco_captions(own_layouts.pictures)
    values["images"] = [image for image in values["images"] if image["file_name"] != unknown]
    kept = {image["id"] for image in values["images"] if image["file_name"] != bare}
    values["annotations"] = [each for each in values["annotations"] if each["image_id"] in kept]
    write(own_layouts.root / "captions.json", json.dumps(values).encode())
    (own_layouts.root / "coco" / gone).unlink()
    assert found_in(own_layouts.config("coco")) == {"images without captions": [unknown, bare], "captions of absent images": [gone]}
    rows = {row.key: row.captions for row in read(own_layouts.config("coco"))}
    assert rows[unknown] == rows[bare] == () and gone not in rows


IMAGES = b'"images": [{"id": 1, "file_name": "a.jpg"}]'


def test_files_that_are_not_coco_captions_are_refused_in_one_line(own_layouts):
    for text in (
        b"",
        b"[]",
        b"{}",
        b'{"images": null, "annotations": []}',
        b'{"images": [{"id": 1}], "annotations": []}',
        b'{"images": [{"id": "x", "file_name": "a.jpg"}], "annotations": []}',
        b'{"images": [{"id": 1e999, "file_name": "a.jpg"}], "annotations": []}',
        b'{"images": ["a.jpg"], "annotations": []}',
        b"{%s}" % IMAGES,
        b'{%s, "annotations": [{"id": 1, "image_id": 2, "caption": "of no image"}]}' % IMAGES,
        b'{%s, "annotations": [{"id": 1, "image_id": 1}]}' % IMAGES,
        b'{%s, "annotations": [{"id": 1, "image_id": 1, "caption": "half \\ud83d"}]}' % IMAGES,
        b"[" * 100_000,
        b"\xff\xfe\x00",
    ):
        path = write(own_layouts.root / "captions.json", text)
        with pytest.raises(ValueError, match=rf"dataset\.captions {path} is not a valid COCO captions file") as caught:
            scan(own_layouts.config("coco"))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_captions_file_that_does_not_exist_is_named(layouts, layouts_bucket, tmp_path):
    for captions in (f"{tmp_path}/gone.json", "/gone.json", f"{layouts_bucket.uri}/gone.json"):
        config = DatasetConfig(kind="coco", path=str(layouts.root / "coco"), captions=captions, s3=layouts_bucket.config)
        with pytest.raises(ValueError, match=rf"dataset\.captions: {captions} "):
            scan(config)


def test_captions_may_be_in_the_working_directory_or_in_a_bucket(layouts, layouts_bucket, monkeypatch):
    monkeypatch.chdir(layouts.root)
    for captions in ("captions.json", f"{layouts_bucket.uri}/captions.json"):
        assert read(DatasetConfig(kind="coco", path="coco", captions=captions, s3=layouts_bucket.config)) == layouts.rows("coco")


# Reading ahead -------------------------------------------------------------------------------------------------------------


def test_of_large_images_few_are_read_ahead():
    for sizes, expected in (([1] * 130, [64, 64, 2]), ([40 << 20] * 3, [1, 1, 1]), ([9, 90 << 20, 9], [1, 1, 1])):
        entries = [Entry(str(number), "file", 0, size) for number, size in enumerate(sizes)]
        pieces = list(_pieces(entries))
        assert [len(piece) for piece in pieces] == expected and [entry for piece in pieces for entry in piece] == entries
