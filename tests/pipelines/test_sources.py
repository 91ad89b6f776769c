"""Datasets as rows: what is read is what lies there, and a digest names the content."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.sources import DatasetConfig, DigitsSource, ImageFolderSource, load_images, open_source


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# Digits --------------------------------------------------------------------------------------------------------------------


def test_the_digits_are_all_of_scikit_learn_s_with_its_labels() -> None:
    rows = list(open_source(DatasetConfig()).read(0, 10_000))
    assert len(rows) == len(open_source(DatasetConfig())) == 1797
    assert [row.label for row in rows] == load_digits().target.tolist()
    assert len({row.key for row in rows}) == 1797
    assert DigitsSource.class_names == tuple("0123456789")


def test_the_png_of_a_digit_holds_its_seventeen_levels_of_gray() -> None:
    """0..16 become 0..255, so every level of the scans stays apart."""
    images = load_digits().images
    for row, image in zip(open_source(DatasetConfig()).read(0, 1797), images, strict=True):
        assert row.data.startswith(b"\x89PNG")
        decoded = _pixels(row.data)
        assert decoded.shape == (8, 8) and decoded.dtype == np.uint8
        np.testing.assert_array_equal(np.round(decoded / 255 * 16), image)
        assert abs(decoded / 255 - image / 16).max() <= 0.5 / 255


def test_a_range_of_the_digits_is_a_piece_of_the_whole() -> None:
    source = open_source(DatasetConfig())
    whole = list(source.read(0, 1797))
    assert list(source.read(500, 503)) == whole[500:503]
    assert list(source.read(1790, 1900)) == whole[1790:]
    assert list(source.read(1797, 1900)) == []


# Folders -------------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_every_image_with_the_class_of_its_first_folder(image_folder: Path) -> None:
    source = ImageFolderSource(image_folder)
    rows = list(source.read(0, 100))
    files = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*") if path.is_file())
    assert source.class_names == ("china", "flower")
    assert [row.key for row in rows] == files and len(source) == len(files) == 12
    assert any("/deeper/" in key for key in files)
    for row in rows:
        assert row.label == ("china", "flower").index(row.key.split("/")[0])
        assert row.data == (image_folder / row.key).read_bytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 8), (10, 99), (12, 99)])
def test_a_range_of_a_folder_is_a_piece_of_the_whole(image_folder: Path, start: int, stop: int) -> None:
    source = ImageFolderSource(image_folder)
    assert list(source.read(start, stop)) == list(source.read(0, 100))[start:stop]


def test_only_images_in_class_folders_count(make_image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    expected = [row.key for row in ImageFolderSource(root).read(0, 100)]
    (root / "README.txt").write_text("about")
    (root / "china" / "labels.csv").write_text("a,b")
    shutil.copy(root / "china" / "000.jpg", root / "cover.jpg")
    assert [row.key for row in ImageFolderSource(root).read(0, 100)] == expected
    shutil.copy(root / "china" / "000.jpg", root / "china" / "UPPER.JPG")
    assert [row.key for row in ImageFolderSource(root).read(0, 100)] == sorted([*expected, "china/UPPER.JPG"])


def test_a_class_folder_may_be_a_link_as_in_shared_copies_of_imagenet(
    make_image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    (root / "linked").symlink_to(root / "china", target_is_directory=True)
    source = ImageFolderSource(root)
    assert source.class_names == ("china", "flower", "linked")
    assert {row.label for row in source.read(0, 100)} == {0, 1, 2}


def test_a_folder_that_is_called_like_an_image_is_none(make_image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    (root / "china" / "album.jpg").mkdir()
    source = ImageFolderSource(root)
    assert "china/album.jpg" not in [row.key for row in source.read(0, 100)] and len(source) == 4


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.path {tmp_path}/nowhere is no folder"):
        open_source(DatasetConfig(kind="image_folder", path=str(tmp_path / "nowhere")))


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        open_source(DatasetConfig(kind="image_folder", path=str(tmp_path / "file")))


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=rf"dataset\.path {tmp_path} has no images in class folders"):
        open_source(DatasetConfig(kind="image_folder", path=str(tmp_path)))


def test_a_dataset_that_cannot_be_is_refused_where_it_is_configured() -> None:
    with pytest.raises(ValueError, match=r"dataset\.kind is 'imagenet'; choose one of digits, image_folder"):
        DatasetConfig(kind="imagenet")
    with pytest.raises(ValueError, match=r"dataset\.path must say where"):
        DatasetConfig(kind="image_folder")


# Digests -------------------------------------------------------------------------------------------------------------------


def test_a_digest_does_not_change_with_the_place_or_the_time(image_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(image_folder, copy)
    for path in copy.rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert ImageFolderSource(copy).digest == ImageFolderSource(image_folder).digest


@pytest.mark.parametrize("change", ["byte", "removed", "added", "renamed", "other class"])
def test_a_digest_changes_with_the_content(image_folder: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    image = copy / "china" / "000.jpg"
    if change == "byte":
        content = bytearray(image.read_bytes())
        content[-3] ^= 1
        image.write_bytes(content)
    elif change == "removed":
        image.unlink()
    elif change == "added":
        shutil.copy(image, copy / "china" / "added.jpg")
    elif change == "renamed":
        image.rename(copy / "china" / "zzz.jpg")
    else:
        image.rename(copy / "flower" / "from-china.jpg")
    assert ImageFolderSource(copy).digest != ImageFolderSource(image_folder).digest


def test_the_digest_of_the_digits_is_that_of_their_pixels_and_labels() -> None:
    source = DigitsSource()
    images, labels = source._digits
    assert source.digest == DigitsSource().digest

    def changed(images: np.ndarray, labels: np.ndarray) -> str:
        other = DigitsSource()
        other.__dict__["_digits"] = (images, labels)
        return other.digest

    assert changed(images.copy(), labels.copy()) == source.digest
    assert changed(np.where(np.arange(8) == 3, 255 - images, images).astype(np.uint8), labels) != source.digest
    assert changed(images, labels[::-1]) != source.digest


# Pixels --------------------------------------------------------------------------------------------------------------------


def test_loaded_images_are_cropped_and_labelled_and_unreadable_ones_left_out(broken_image_folder: Path) -> None:
    config = DatasetConfig(kind="image_folder", path=str(broken_image_folder))
    assert len(open_source(config)) == 14
    images, labels = load_images(config, 16, 0, 100)
    assert images.shape == (12, 3, 16, 16) and images.dtype == np.uint8
    assert labels.tolist() == [0] * 6 + [1] * 6 and labels.dtype == np.int64
    photographs_differ = {image.tobytes() for image in images}
    assert len(photographs_differ) == 12
    pieces = [load_images(config, 16, start, start + 5) for start in (0, 5, 10)]
    np.testing.assert_array_equal(np.concatenate([piece[0] for piece in pieces]), images)
    np.testing.assert_array_equal(np.concatenate([piece[1] for piece in pieces]), labels)


def test_a_range_without_a_readable_image_is_empty(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "text.jpg").write_text("not an image")
    images, labels = load_images(DatasetConfig(kind="image_folder", path=str(tmp_path)), 16, 0, 10)
    assert images.shape == (0, 3, 16, 16) and labels.shape == (0,)
