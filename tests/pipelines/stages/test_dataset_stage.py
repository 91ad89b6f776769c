"""Stage dataset: the index of a dataset, scanned by the driver or by workers, and findings about it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from material.layouts import CLASSES, Layouts, make_layouts, open_dataset, tar_bytes, write, write_parquet
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.dataset import INDEX, Dataset, DatasetSummary
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.stages import dataset as stage
from pipelines.storage.s3 import S3Folder
from pipelines.workflow import driver
from pipelines.workflow.stage import Node
from services.s3_server import S3Endpoint


@pytest.fixture
def make(make_session: Callable[..., Any], tmp_path: Path) -> Callable[..., Manifest]:
    """Index a dataset as it is now."""

    def run(config: DatasetConfig, store: ArtifactStore | None = None, **replaced: Any) -> Manifest:
        open_source(config)
        session = make_session(store or open_store(str(tmp_path / "store")), **replaced)
        return driver.execute([Node("dataset", stage.STAGE, config)], session)[0].manifest

    return run


def _no_ray() -> None:
    raise AssertionError("listing needs no cluster")


# Scanned by the driver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["digits", "image_folder", "images", "coco"])
def test_listed_datasets_need_no_cluster(layouts: Layouts, make, local_store: ArtifactStore, kind: str) -> None:
    config = DatasetConfig(kind="digits") if kind == "digits" else layouts.config(kind)
    manifest, expected = make(config, connect=_no_ray), open_dataset(config, local_store)
    assert manifest.file(INDEX).sha256 == expected.manifest.file(INDEX).sha256
    assert DatasetSummary.read(manifest) == DatasetSummary.read(expected.manifest) and not DatasetSummary.read(manifest).findings
    assert manifest.metrics == {
        "images": expected.num_images,
        "classes": len(expected.class_names),
        "captions": expected.num_captions,
    }


def test_bucket_is_listed_in_order(layouts: Layouts, make, make_bucket: Callable[..., S3Folder], s3_endpoint: S3Endpoint) -> None:
    bucket = make_bucket()
    s3_endpoint.fill(bucket, layouts.contents())
    manifest = make(layouts.config("image_folder", bucket.uri, s3=bucket.config), connect=_no_ray)
    assert manifest.file(INDEX).sha256 == make(layouts.config("image_folder")).file(INDEX).sha256


def test_many_class_folders_keep_their_order(make, tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / "many" / f"{number:02d}" / "1.jpg", b"%d" % number)
        write(tmp_path / "many" / f"{number:02d}" / "about.txt", b"")
    config, store = DatasetConfig(kind="image_folder", path=str(tmp_path / "many")), open_store(str(tmp_path / "store"))
    manifest = make(config, store)
    assert [(r.label, r.data) for r in Dataset(config, store, manifest).read(0, 99)] == [(n, b"%d" % n) for n in range(40)]
    found = json.loads(store.fetch(manifest, "findings.json").read_bytes())
    assert found == {"other files": [f"{number:02d}/about.txt" for number in range(40)]}


def test_findings_are_recorded_and_shown(tmp_path: Path, make) -> None:
    root, store = make_layouts(tmp_path / "sets", num_images=4).root / "image_folder", open_store(str(tmp_path / "store"))
    (root / "empty").mkdir()
    for name in ("[/]", "[bold]", "\x1b]0;c\x07", "d", "é"):
        write(root / "coffee" / name, b"")
    console = Console(file=io.StringIO(), width=200)
    manifest = make(DatasetConfig(kind="image_folder", path=str(root)), store, console=console)
    assert manifest.summary["class_names"] == ["astronaut", "chelsea", "coffee", "empty", "rocket"]
    assert manifest.summary["findings"] == {"other_files": 5, "classes_without_images": 1}
    assert manifest.metrics["other_files"] == 5 and manifest.metrics["classes_without_images"] == 1
    assert json.loads(store.fetch(manifest, "findings.json").read_bytes()) == {
        "other files": ["coffee/\x1b]0;c\x07", "coffee/[/]", "coffee/[bold]", "coffee/d", "coffee/é"],
        "classes without images": ["empty"],
    }
    assert [record.name for record in manifest.records] == ["findings.json"]
    shown = console.file.getvalue()
    assert (
        "other files (5): coffee/ ]0;c , coffee/[/], coffee/[bold], ..." in shown
        and "\x1b" not in shown
        and "classes without images (1): empty" in shown
    )


def test_a_dataset_without_images_is_refused(make, tmp_path: Path) -> None:
    write(tmp_path / "set" / "class" / "notes.txt", b"")
    for kind in ("image_folder", "images"):
        with pytest.raises(ValueError, match=rf"dataset {kind} has no images at {tmp_path}/set"):
            make(DatasetConfig(kind=kind, path=str(tmp_path / "set")))


def test_key_depends_on_content_and_name_not_on_the_path(make, tmp_path: Path) -> None:
    keys = set()
    for place in ("here", "there"):
        config = make_layouts(tmp_path / place, num_images=4).config("image_folder")
        manifest = make(config)
        keys.add((manifest.key, manifest.digest))
    assert len(keys) == 1
    write(tmp_path / "there" / "image_folder" / "coffee" / "one-more.jpg", b"1")
    assert make(config).key != manifest.key
    assert make(DatasetConfig(kind="image_folder", name="other", path=config.path)).key != manifest.key


# Scanned by workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.usefixtures("ray_cluster")
def test_workers_make_the_same_index(layouts: Layouts, make, local_store: ArtifactStore, kind: str) -> None:
    manifest, expected = make(layouts.config(kind)), open_dataset(layouts.config(kind), local_store)
    assert manifest.file(INDEX).sha256 == expected.manifest.file(INDEX).sha256
    assert manifest.summary["num_images"] == 20 and manifest.summary["findings"] == {}
    assert manifest.summary["class_names"] == (list("0123") if kind == "tar" else list(CLASSES))


@pytest.mark.usefixtures("ray_cluster")
def test_findings_of_workers_are_in_order(make, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for number in range(3):
        members = [(f"{number}.jpg", b"1"), (f"{number}.json", b"{}"), (f"x{number}.cls", b"1"), (f"k{number}.png", b"2")]
        write(shards / f"{number}.tar", tar_bytes([*members, (f"k{number}.cls", b"%d" % (2 * number))]))
    store = open_store(str(tmp_path / "store"))
    manifest = make(DatasetConfig(kind="tar", path=str(shards), num_classes=6), store)
    assert json.loads(store.fetch(manifest, "findings.json").read_bytes()) == {
        "other files": [f"{number}.tar: {number}.json" for number in range(3)],
        "labels without an image": [f"{number}.tar: x{number}" for number in range(3)],
        "images without a label": ["0", "1", "2"],
        "classes without images": ["1", "3", "5"],
    }


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.usefixtures("ray_cluster")
def test_keys_that_are_repeated_across_files_are_refused_and_those_of_rows_renamed(make, tmp_path: Path, kind: str) -> None:
    layouts = make_layouts(tmp_path / "sets", num_images=14)
    first, _, last = sorted((layouts.root / kind).iterdir())
    last.write_bytes(first.read_bytes())
    row = layouts.rows(kind)[0]
    if kind == "parquet":
        assert make(layouts.config(kind)).summary["findings"] == {"repeated_paths": 6}
        return
    with pytest.raises(
        ValueError, match=rf"6 keys of the dataset are not unique: {row.key} in {first.name} and {last.name}; .* 1 more"
    ):
        make(layouts.config(kind))


@pytest.mark.usefixtures("ray_cluster")
def test_errors_of_workers_are_one_sentence(make, tmp_path: Path) -> None:
    write(tmp_path / "shards" / "a.tar", b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"^a\.tar in .*/shards is not a complete tar file \(.*\)"):
        make(DatasetConfig(kind="tar", path=str(tmp_path / "shards")))


@pytest.mark.usefixtures("ray_cluster")
def test_labels_must_be_among_the_classes(make, tmp_path: Path, layouts: Layouts) -> None:
    write_parquet(tmp_path / "rows" / "0.parquet", layouts.pictures[:6], CLASSES[:2])
    config = DatasetConfig(kind="parquet", path=str(tmp_path / "rows"))
    with pytest.raises(ValueError, match="dataset parquet has label 3, but 2 classes"):
        make(config)
    with pytest.raises(ValueError, match=r"dataset\.num_classes is 9, but the files name 2 classes"):
        make(DatasetConfig(kind="parquet", path=str(tmp_path / "rows"), num_classes=9))
    with pytest.raises(ValueError, match=r"dataset tar has label 3, but 3 classes; set dataset\.num_classes"):
        make(layouts.config("tar", num_classes=3))
    assert make(layouts.config("tar", num_classes=5)).summary["class_names"] == list("01234")


@pytest.mark.usefixtures("ray_cluster")
def test_interrupted_scan_resumes_from_its_parts(layouts: Layouts, make, tmp_path: Path, monkeypatch) -> None:
    """A shard with a committed part is not opened again."""
    config, whole = layouts.config("tar"), make(layouts.config("tar"))
    store, original = open_store(str(tmp_path / "interrupted")), stage._scan_file

    def scan_file(config: DatasetConfig, unit: str, name: str, context: Any) -> Any:
        (tmp_path / f"opened-{unit}").touch()
        return original(config, unit, name, context)

    def write_half(path: Path, entries: Any, **_: Any) -> Any:
        for _ in range(8):  # into the second of four shards
            next(entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_index", write_half)
        with pytest.raises(KeyboardInterrupt):
            make(config, store)
    parts = store.read_parts("dataset", whole.key)
    assert store.read_manifest("dataset", whole.key) is None and {"scan-00000", "scan-00001"} <= set(parts)
    (Path(store.uri) / "dataset" / whole.key / ".parts" / "scan-00001.json").unlink()
    monkeypatch.setattr(stage, "_scan_file", scan_file)
    resumed = make(config, store)
    assert (resumed.key, resumed.digest) == (whole.key, whole.digest)
    opened = sorted(path.name for path in tmp_path.glob("opened-*"))
    assert "opened-train-0001.tar" in opened and "opened-train-0000.tar" not in opened
    assert store.read_parts("dataset", whole.key) == {}
