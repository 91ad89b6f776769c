"""Images of other generators: every kind of set gives the same pixels, and irregular images are refused."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from material.hostile import corpus, photo
from material.layouts import tar_bytes, write, write_table
from pipelines.artifacts.manifest import Manifest
from pipelines.data.image_sets import ImageSet, ImageSetConfig, check_images, label_scheme, resolution_of, scan
from pipelines.data.labels import scheme_of_labels
from pipelines.data.sources.base import Findings
from pipelines.stages import image_set
from pipelines.workflow import config as configuration

KINDS = ("folder", "tar", "npz", "parquet")
NUM_IMAGES, SIZE = 14, 24
NAMES = [f"sample-{number:03d}.png" for number in range(NUM_IMAGES)]
LABELS = [number * 7 % 5 for number in range(NUM_IMAGES)]


def pixels(number: int, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """uint8 (H, W, 3), each number's its own."""
    return np.roll(photo(("astronaut", "chelsea", "coffee", "flower")[number % 4], width, height), number, axis=1)


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


@dataclass(frozen=True)
class Sets:
    """The same images in every kind of place."""

    root: Path

    def config(self, kind: str, place: str | None = None, **given: Any) -> ImageSetConfig:
        name = {"folder": "folder", "tar": "tar", "npz": "images.npz", "parquet": "parquet"}[kind]
        return ImageSetConfig(path=f"{place or self.root}/{name}", name="other", **given)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files and members of the tar are in the reverse order of their names."""
    root = tmp_path_factory.mktemp("sets")
    images = [pixels(number) for number in range(NUM_IMAGES)]
    members: list[tuple[str, bytes]] = []
    for number in reversed(range(NUM_IMAGES)):
        write(root / "folder" / NAMES[number], png(images[number]))
        members += [(NAMES[number], png(images[number])), (f"sample-{number:03d}.cls", b"%d" % LABELS[number])]
    write(root / "folder" / "settings.txt", b"num_steps 50")
    write(root / "tar" / "samples.tar", tar_bytes(members))
    np.savez(root / "images.npz", np.stack(images), np.array(LABELS))
    table = pa.table({"image": pa.array([png(image) for image in images], pa.binary()), "label": pa.array(LABELS, pa.int64())})
    write_table(root / "parquet" / "samples.parquet", table)
    return Sets(root)


@pytest.fixture
def index(make_context, local_store):
    """Run the stage and open what it made."""

    def run(config: ImageSetConfig) -> ImageSet:
        key = f"{len(list(local_store.manifests())):064d}"
        result = image_set.run(config, {}, make_context(local_store, "images", key))
        fields: dict[str, Any] = {"stage_version": 1, "config": configuration.redacted(config), "inputs": {}}
        manifest = Manifest(stage="images", key=key, files=tuple(result.files), summary=result.summary.to_dict(), **fields)
        return ImageSet(config, local_store, local_store.commit(manifest))

    return run


def found(config: ImageSetConfig) -> None:
    """What the stage looks at, without Ray."""
    entries = scan(config, Findings())
    check_images(config, entries, resolution_of(config, entries))


# Reading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_every_kind_of_set_gives_the_same_pixels_in_the_order_of_names(index, sets):
    expected = np.stack([pixels(number) for number in range(NUM_IMAGES)]).transpose(0, 3, 1, 2)
    for kind in KINDS:
        images = index(sets.config(kind))
        summary = images.manifest.summary
        assert (summary["kind"], summary["num_images"], summary["resolution"]) == (kind, NUM_IMAGES, SIZE)
        assert len(images) == NUM_IMAGES and images.resolution == SIZE
        for start, stop in ((0, NUM_IMAGES), (5, 6), (3, 11), (12, 99)):
            read = images.read(start, stop, "cpu")
            assert str(read.dtype) == "torch.uint8"
            np.testing.assert_array_equal(read.numpy(), expected[start:stop])
        assert images.labels().tolist() == ([-1] * NUM_IMAGES if kind == "folder" else LABELS)
        assert summary["labels"] == ("unknown" if kind == "folder" else scheme_of_labels(LABELS))
        assert summary["other_files"] == (1 if kind == "folder" else 0)
        sent = pickle.dumps(images)
        np.testing.assert_array_equal(pickle.loads(sent).read(2, 4, "cpu").numpy(), expected[2:4])
        assert len(sent) < 5000
    stated = index(sets.config("folder", labels=f"{NUM_IMAGES // 2} classes"))
    assert stated.manifest.summary["labels"] == f"{NUM_IMAGES // 2} classes, 2 each"


def test_jpeg_files_are_counted_by_their_content_and_said(tmp_path, make_context, local_store, monkeypatch):
    monkeypatch.setattr(
        image_set, "_check_by_workers", lambda config, entries, resolution, _: check_images(config, entries, resolution)
    )
    for number, kind in enumerate(("PNG", "JPEG")):
        write(tmp_path / f"{number}.png", png(pixels(number), kind))
    console = Console(file=io.StringIO(), width=500)
    config = ImageSetConfig(path=str(tmp_path), name="other\x1b[31m", labels="none")
    result = image_set.run(config, {}, make_context(local_store, "images", "k" * 64, console=console))
    shown = console.file.getvalue()
    assert result.summary.num_jpeg == 1
    assert "1 of 2 images of other" in shown and "stored as JPEG" in shown and "\x1b[31m" not in shown


def test_stated_labels_are_part_of_the_key_and_must_be_possible(sets):
    folder, npz = sets.config("folder"), sets.config("npz")
    assert folder.identity() != replace(folder, labels="none").identity() != replace(folder, labels="unknown").identity()
    with pytest.raises(ValueError, match="have labels: 5 classes, about 3 each; the config states none"):
        label_scheme(replace(npz, labels="none"), scan(npz, Findings()))
    assert label_scheme(npz, scan(npz, Findings())) == scheme_of_labels(LABELS)
    with pytest.raises(ValueError, match=rf"{NUM_IMAGES} images cannot be split equally"):
        label_scheme(replace(folder, labels="1000 classes"), scan(folder, Findings()))
    with pytest.raises(ValueError, match="labels are stated as 'all of them'; choose one of "):
        replace(folder, labels="all of them")


def test_bucket_gives_the_same_images_as_the_folder(index, sets, make_bucket, s3_endpoint, monkeypatch):
    # Workers of a cluster that was started before the bucket do not have its credentials.
    monkeypatch.setattr(
        image_set, "_check_by_workers", lambda config, entries, resolution, _: check_images(config, entries, resolution)
    )
    folder = make_bucket("sets")
    files = {path.relative_to(sets.root).as_posix(): path.read_bytes() for path in sets.root.rglob("*") if path.is_file()}
    s3_endpoint.fill(folder, files)
    for kind in KINDS:
        images, here = index(sets.config(kind, folder.uri, s3=folder.config)), index(sets.config(kind))
        np.testing.assert_array_equal(images.read(4, 9, "cpu").numpy(), here.read(4, 9, "cpu").numpy())
        assert images.labels().tolist() == here.labels().tolist()


def test_folders_named_by_class_numbers_give_labels(tmp_path):
    for label in (3, 0, 10):
        for number in range(2):
            write(tmp_path / f"{label:02d}" / f"{number}.png", png(pixels(number)))
    entries = scan(ImageSetConfig(path=str(tmp_path), name="other"), Findings())
    assert [(entry.key, entry.label) for entry in entries[1:4]] == [("00/1.png", 0), ("03/0.png", 3), ("03/1.png", 3)]
    write(tmp_path / "other" / "0.png", png(pixels(0)))
    assert {entry.label for entry in scan(ImageSetConfig(path=str(tmp_path), name="other"), Findings())} == {-1}


# What names them -----------------------------------------------------------------------------------------------------------


def test_identity_of_a_set_is_its_content_and_neither_its_path_nor_its_name(sets, tmp_path):
    files = {path.relative_to(sets.root).as_posix(): path.read_bytes() for path in sets.root.rglob("*") if path.is_file()}
    for name, content in files.items():
        write(tmp_path / name, content)
    for kind in KINDS:
        config, copy = sets.config(kind), sets.config(kind, str(tmp_path))
        stated = ImageSetConfig(path=config.path, name="another", kind=kind)
        assert config.identity() == copy.identity() == stated.identity()
        changed = next(name for name in files if name.startswith(config.path.rpartition("/")[2]) and not name.endswith(".txt"))
        write(tmp_path / changed, files[changed][:-1] + b"!")
        assert copy.identity() != config.identity()


def test_ambiguous_path_needs_a_kind(sets, tmp_path):
    write(tmp_path / "0.png", png(pixels(0)))
    write(tmp_path / "0.tar", tar_bytes([("0.png", png(pixels(0)))]))
    with pytest.raises(ValueError, match=r"images other: .* holds 1 of kind folder and 1 of kind tar"):
        ImageSetConfig(path=str(tmp_path), name="other").found_kind()
    assert len(scan(ImageSetConfig(path=str(tmp_path), name="other", kind="tar"), Findings())) == 1


def test_path_without_images_and_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        ("nowhere", r"images other: .*/nowhere "),
        ("nowhere.npz", r"images other: .*/nowhere\.npz "),
        ("nowhere.tar", r"images other.* has no nowhere\.tar"),
        ("empty", r"images other: .*/empty holds no images, tar or Parquet files"),
    ):
        with pytest.raises(ValueError, match=sentence):
            found(ImageSetConfig(path=str(tmp_path / path), name="other"))
    with pytest.raises(ValueError, match="images other: kind is 'zip'; choose one of auto, folder, tar, npz, parquet"):
        ImageSetConfig(path="x", name="other", kind="zip")


# Irregular images --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_stage_names_the_first_of_several_irregular_images(index, sets, tmp_path):
    for number in range(6):
        side = SIZE + 1 if number in (2, 4) else SIZE
        write(tmp_path / NAMES[number], png(pixels(number, side, side)))
    with pytest.raises(ValueError, match=r"image sample-002\.png of other has 25 x 25 pixels, but others have 24 x 24") as caught:
        index(ImageSetConfig(path=str(tmp_path), name="other"))
    assert "not resized" in str(caught.value)


def test_images_must_be_square(tmp_path):
    write(tmp_path / "0.png", png(pixels(0, SIZE, SIZE + 4)))
    with pytest.raises(ValueError, match=r"image 0\.png of other has 24 x 28 pixels, but images must be square"):
        found(ImageSetConfig(path=str(tmp_path), name="other"))


def test_image_that_cannot_be_read_is_named(tmp_path):
    for number, file in enumerate(file for file in corpus() if file.reason is not None):
        folder = tmp_path / str(number)
        write(folder / "0.png", png(pixels(0)))
        write(folder / "1.png", file.data)
        with pytest.raises(ValueError, match=r"image 1\.png of other cannot be read \(.*\)"):
            found(ImageSetConfig(path=str(folder), name="other"))
    assert number > 10


def test_image_that_changes_after_it_was_indexed_is_noticed(local_store, tmp_path, make_context):
    config = ImageSetConfig(path=str(tmp_path / "set"), name="other", kind="folder")
    for number in range(3):
        write(tmp_path / "set" / NAMES[number], png(pixels(number)))
    result = image_set.run(config, {}, make_context(local_store, "images", "k"))
    fields: dict[str, Any] = {"stage_version": 1, "config": {}, "inputs": {}, "summary": result.summary.to_dict()}
    images = ImageSet(config, local_store, Manifest(stage="images", key="k", files=tuple(result.files), **fields))
    whole = (tmp_path / "set" / NAMES[1]).read_bytes()
    write(tmp_path / "set" / NAMES[1], whole[:-40])
    with pytest.raises(ValueError, match=r"sample-001\.png"):
        images.read(0, 3, "cpu")


def test_arrays_that_are_not_images_are_refused(tmp_path):
    for arrays, sentence in (
        ([np.zeros((2, 8, 9, 3), np.uint8)], r"image 0 of other has 9 x 8 pixels, but images must be square"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array([0, -7])], r"images other have labels from -7 to 0"),
        ([np.array([{"a": 1}], dtype=object)], "arr_0"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        np.savez(folder / "images.npz", *arrays)
        with pytest.raises(ValueError, match=sentence):
            found(ImageSetConfig(path=str(folder / "images.npz"), name="other"))


def test_damaged_npz_is_noticed_when_it_is_indexed(sets, tmp_path):
    content = bytearray((sets.root / "images.npz").read_bytes())
    content[5000] ^= 1
    write(tmp_path / "images.npz", bytes(content))
    with pytest.raises(ValueError, match=r"images\.npz"):
        found(ImageSetConfig(path=str(tmp_path / "images.npz"), name="other"))
