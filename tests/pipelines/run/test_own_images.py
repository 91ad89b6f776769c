"""`enat init`: what it finds in folders, the config it writes for the machine, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from enat.images import png_bytes
from material.digits_run import fresh_environment
from material.layouts import Layouts, write
from pipelines.artifacts.open import open_store
from pipelines.cli.main import commands
from pipelines.cluster import hardware
from pipelines.data.sources.config import DatasetConfig
from pipelines.run import graph, own_images
from pipelines.run.loading import load_run
from pipelines.run.own_images import OwnImages
from pipelines.workflow import driver

REPOSITORY = Path(__file__).parents[3]
SHIPPED = "configs/own-images-32.yaml"
CLASSES = ("astronaut", "chelsea", "coffee", "rocket")
FEW = (
    "tokenizer.recipe={num_steps: 10, batch_size: 8}",
    "reference.num_epochs=1",
    "train.num_steps=4",
    "train.execution={num_workers: 1, checkpoint_every: 4, log_every: 2, sample_every: 4}",
    "generate.num_samples=40",
)
TWO_CORES, GPUS = hardware.parse_cluster("1x2xCPU"), hardware.parse_cluster("1x8xH200")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 crops of scikit-image's photographs, 50 in the folder of each of four classes."""
    root, rng = tmp_path_factory.mktemp("own") / "photos", np.random.default_rng(0)
    for name in CLASSES:
        photograph = Image.fromarray(getattr(skimage.data, name)())
        (root / name).mkdir(parents=True)
        for number in range(50):
            side = int(rng.integers(150, min(photograph.size) + 1))
            left, top = (int(rng.integers(0, size - side + 1)) for size in photograph.size)
            photograph.crop((left, top, left + side, top + side)).resize((96, 96)).save(root / name / f"{number:03d}.jpg")
    return root


def _png(color: int = 0) -> bytes:
    return png_bytes(Image.new("RGB", (20, 20), (color, 0, 0)))


def _init(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["init", *map(str, arguments)])


# What a folder holds -------------------------------------------------------------------------------------------------------


def test_class_folders_are_classes(photos: Path) -> None:
    found = own_images.find_images(str(photos), needs_classes=True)
    assert found.dataset == DatasetConfig(kind="image_folder", name="photos", path=str(photos))
    assert (found.num_images, found.class_names) == (200, CLASSES)


def test_images_without_folders_beside_them_or_in_one_folder_have_no_classes(tmp_path: Path) -> None:
    for name, files in (
        ("flat", ["a.png", "b.png"]),
        ("one", ["all/a.png", "all/b.png"]),
        ("mixed", ["a.png", "c/b.png", "d/e.png"]),
    ):
        for file in files:
            write(tmp_path / name / file, _png())
        found = own_images.find_images(str(tmp_path / name))
        assert (found.dataset.kind, found.num_images, found.class_names) == ("images", len(files), ()), name
        with pytest.raises(ValueError, match=r"has no classes: put each image into a folder named after its class"):
            own_images.find_images(str(tmp_path / name), needs_classes=True)


def test_the_split_for_training_is_read(tmp_path: Path) -> None:
    for file in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        write(tmp_path / file, _png())
    found = own_images.find_images(str(tmp_path))
    assert (found.dataset.kind, found.dataset.split) == ("image_folder", "train")
    assert (found.num_images, found.class_names) == (2, ("cat", "dog"))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_tar_and_parquet_files_are_read_with_their_classes(layouts: Layouts, kind: str) -> None:
    given = layouts.config(kind)
    found = own_images.find_images(str(given.path), needs_classes=True)
    assert found.dataset.kind == kind and found.num_images == 20 and found.class_names


def test_another_usual_column_of_labels_is_found(tmp_path: Path) -> None:
    table = pa.table({"image": [_png(), _png(9)], "number": [5, 6], "labels": [0, 1]})
    pq.write_table(table, tmp_path / "all.parquet")
    found = own_images.find_images(str(tmp_path), needs_classes=True)
    assert (found.dataset.label_column, found.class_names) == ("labels", ("0", "1"))
    pq.write_table(table.drop(["labels"]), tmp_path / "all.parquet")
    assert own_images.find_images(str(tmp_path)).class_names == ()
    with pytest.raises(ValueError, match="has no classes: write class numbers into an integer column named label"):
        own_images.find_images(str(tmp_path), needs_classes=True)


# What is written -----------------------------------------------------------------------------------------------------------


def test_the_shipped_config_is_what_init_writes_on_two_cores() -> None:
    found = OwnImages(dataset=DatasetConfig(kind="image_folder", name="photos", path="photos"), num_images=200, class_names=CLASSES)
    assert (REPOSITORY / SHIPPED).read_text() == own_images.config_text(found, 32, TWO_CORES, SHIPPED)


@pytest.mark.parametrize("resolution", [16, 32, 48, 64, 256, 512])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("class_names", [(), CLASSES])
def test_every_config_can_be_planned(tmp_path: Path, resolution: int, is_large: bool, class_names: tuple[str, ...]) -> None:
    for name in class_names or ("",):
        write(tmp_path / "photos" / name / "a.png", _png())
    found = own_images.find_images(str(tmp_path / "photos"))
    file = tmp_path / "own.yaml"
    file.write_text(own_images.config_text(found, resolution, GPUS if is_large else TWO_CORES, str(file)))
    run = load_run(file, (f"workspace={tmp_path / 'runs'}",))
    assert run.tokenizer.architecture().resolution == resolution and run.name == "own"
    assert run.train.model.preset == ("enat-s" if is_large else None)
    assert (run.tokenizer.preset in ("vqgan-256", "vqgan-512")) == (is_large and resolution >= 128)
    assert run.reference.extractor == ("classifier" if class_names else "inception")
    planned = driver.plan(graph.build(run), open_store(run.store_uri, run.s3))
    assert {"tokenizer", "train", "generate", "memorization", "evaluate", "report"} <= {each.node.id for each in planned}


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    """Neither a folder nor a class can add lines to the config, and each path arrives as it is."""
    folder = tmp_path / "a: b\n# 'c'\" {d}\x1b"
    for name in ("null\ntargets: [dataset]", "{x}"):
        write(folder / name / "a.png", _png())
    file = tmp_path / "null.yaml"
    file.write_text(own_images.config_text(own_images.find_images(str(folder)), 32, TWO_CORES, str(file)))
    values = yaml.safe_load(file.read_text())
    assert values["dataset"]["path"] == str(folder) and "targets" not in values and "\x1b" not in file.read_text()
    assert load_run(file).dataset == DatasetConfig(kind="image_folder", name="a: b # 'c'\" {d}", path=str(folder))


# The command ---------------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_config_and_says_what_is_next(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = _init(photos, "--resolution", 32, "--classes")
    assert shown.exit_code == 0, shown.exception
    assert "own-images.yaml: 200 images in 4 classes, kind image_folder" in shown.output
    assert re.search(r"the run takes \d.* on this machine", shown.output) and "enat run own-images.yaml" in shown.output
    assert [path.name for path in tmp_path.iterdir()] == ["own-images.yaml"], "nothing else is written"
    answer = json.loads(_init(photos, "--resolution", 32, "--output", "b.yaml", "--json").stdout)
    assert answer["classes"] == [*CLASSES] and answer["images"] == 200 and answer["predicted"]["seconds"]["value"] > 0


def test_what_cannot_become_a_run_is_refused_in_one_sentence(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "texts" / "a.txt", b"text")
    write(tmp_path / "broken" / "a.jpg", b"no image")
    write(tmp_path / "both" / "a.png", _png())
    write(tmp_path / "both" / "b.tar", b"")
    write(tmp_path / "taken.yaml", b"mine")
    output = tmp_path / "own.yaml"
    for folder, given, sentence in (
        ("empty", (), "holds no images, tar files or Parquet files; name the folder that holds them"),
        ("texts", (), "holds no images, tar files or Parquet files"),
        ("broken", (), "none of 1 image of .* can be read"),
        ("both", (), "holds 1 image and 1 tar file; name a folder that holds one kind"),
        ("nowhere", (), "nowhere is not a directory"),
        (photos, ("--output", tmp_path / "taken.yaml"), "taken.yaml exists; give another file with --output"),
        (photos, ("--output", tmp_path / "taken.yaml" / "x.yaml"), "cannot be written"),
        (photos, ("--resolution", 33), "--resolution 33 does not suit the tokenizer: resolution is 33; it must be a multiple"),
        (photos, ("--resolution", 8), "--resolution is 8; it must be 16 to 512"),
        (photos / "coffee", ("--classes",), "has no classes"),
    ):
        refused = _init(tmp_path / folder, "--resolution", 32, "--output", output, *given)
        assert isinstance(refused.exception, ValueError), sentence
        assert re.search(sentence, str(refused.exception)) and "\n" not in str(refused.exception)
        assert not output.exists() and (tmp_path / "taken.yaml").read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "closed" / "a.png", _png())
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            own_images.find_images(str(tmp_path / "closed"))
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_scoring_images_without_a_dataset_is_refused_before_anything_is_computed(photos: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--samples", str(photos), "--name", "X", f"workspace={tmp_path / 'runs'}"]
    refused = CliRunner().invoke(commands, arguments)
    assert isinstance(refused.exception, ValueError) and "`enat init FOLDER`" in str(refused.exception)
    assert not (tmp_path / "runs").exists()


def _enat(folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {**fresh_environment(), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines", *arguments, "--json"]
    ended = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_photographs_become_samples_and_scores(photos: Path) -> None:
    _enat(photos.parent, "init", "photos", "--resolution", "32")
    answer = _enat(photos.parent, "run", "own-images.yaml", *FEW, "tracking.enabled=false")
    assert {"frechet_distance", "class_agreement"} <= answer["scores"]["main"].keys()
    assert (photos.parent / "runs" / "own-images.html").stat().st_size > 10_000
