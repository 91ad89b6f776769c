"""The Python API of notebooks, and the example notebook, run as a user would run it, on a short run of the demonstration."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image
from rich.console import Console

from enat.images import make_grid
from material.digits_run import DIGITS
from pipelines import notebook
from pipelines.data.samples import read_samples
from pipelines.storage.base import StorageError

EXAMPLE = Path(notebook.__file__).parent / "guide" / "digits.ipynb"


def _text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained(digits_run) -> str:
    return f"train/{digits_run.planned()['train'].key}"


def test_artifacts_are_listed_opened_and_traced(digits_run, trained: str) -> None:
    listed = _text(notebook.ls("train", "token_map", store=digits_run.store))
    assert trained[:18] in listed and "token_map/" in listed and "evaluate/" not in listed
    assert "0 images" not in listed and _text(notebook.ls(dataset="flowers", store=digits_run.store)).count("\n") == 1, "a header"
    artifact = notebook.open_artifact(trained, digits_run.store.uri)
    assert artifact.manifest.key in _text(artifact) and "text/html" in artifact._repr_mimebundle_([], [])
    assert [row["step"] for row in json.loads(artifact.path("history.json").read_text())] == [5, 10, 15, 20]
    assert "token_map/" in _text(artifact.lineage()) and "evaluate/" in _text(artifact.lineage())
    assert artifact.input("token_map").manifest.stage == "token_map"
    assert artifact.input("token_map").contact_sheet(8).size == (16 * 98 + 2, 98 + 2)
    with pytest.raises(ValueError, match=r"train is made from .*token_map.*, not from captions"):
        artifact.input("captions")
    with pytest.raises(StorageError, match=r"has no artifact whose key begins with train/xyz; it has artifacts of .*, train"):
        notebook.open_artifact("train/xyz", digits_run.store)


def test_mistyped_names_are_errors_not_empty_lists(digits_run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown stage no-such-stage; stages are tokenizer, dataset, token_map,"):
        notebook.ls("train", "no-such-stage", store=digits_run.store)
    with pytest.raises(ValueError, match="unknown stage tarin; did you mean train"):
        notebook.ls("tarin", store=digits_run.store)
    for look in (notebook.ls, lambda store: notebook.open_model("train/3f2a", store)):
        with pytest.raises(ValueError, match=r"stroe does not exist; name another, or make one with enat run"):
            look(store=tmp_path / "stroe")


def test_token_map_is_opened_by_key_or_as_an_input(digits_run, trained: str) -> None:
    source = notebook.open_artifact(trained, digits_run.store).input("token_map")
    opened = [notebook.open_token_map(source), notebook.open_token_map(source.manifest.key[:10], digits_run.store)]
    for token_map in opened:
        assert len(token_map) == 1797
        codes, labels = token_map.take(np.arange(3), np.zeros(3, bool))
        assert codes.shape == (3, 16) and labels.tolist() == [0, 1, 2]


def test_samples_equal_those_of_stage_generate(digits_run, trained: str) -> None:
    model = notebook.open_model(trained, digits_run.store)
    generated = digits_run.planned()["generate"].manifest
    sampler = generated.summary["sampler"]
    made = read_samples(digits_run.store, generated)
    samples = notebook.sample(
        model, labels="0-9", num_images=10, **{name: sampler[name] for name in ("num_steps", "guidance_scale")}
    )
    assert samples.images.dtype == torch.uint8 and samples.images.shape == (10, 3, 16, 16)
    np.testing.assert_array_equal(samples.codes.numpy(), made.codes[:10])
    assert samples.steps.shape == (sampler["num_steps"] + 1, 10, 3, 16, 16) and torch.equal(samples.steps[-1], samples.images)
    assert notebook.show(samples).tobytes() == make_grid(samples.images, 4, scale=6).tobytes()
    assert samples.strip(3).size == (sampler["num_steps"] * 98 + 2, 3 * 98 + 2)
    with Image.open(io.BytesIO(samples.animation())) as gif:
        assert gif.n_frames == sampler["num_steps"] + 1
    assert notebook.show(samples.images[:1]).size == (98 + 2, 98 + 2)
    several = notebook.sample(model, labels=(3, 5), num_images=6, num_steps=2)
    assert notebook.show(several).size == (2 * 98 + 2, 3 * 98 + 2), "one column per label"


def test_wrong_requests_are_errors_of_one_sentence(digits_run, trained: str) -> None:
    model = notebook.open_model(trained, digits_run.store)
    for asked, sentence in (
        ({"labels": "11"}, "the classes of this model are 0 to 9"),
        ({"labels": [11]}, "the classes of this model are 0 to 9"),
        ({"captions": ["a three"]}, "--caption is for text-conditional models"),
        ({"num_images": 0}, "must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"labels": [1.5]}, "labels holds 1.5, which is not a class number"),
        ({"num_stepz": 4}, "unknown key num_stepz; did you mean num_steps"),
        ({"num_steps": "many"}, "num_steps: Value 'many'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            notebook.sample(model, **asked)
    token_map = notebook.open_artifact(trained, digits_run.store).input("token_map")
    with pytest.raises(ValueError, match="is not a token map"):
        notebook.open_token_map(trained, digits_run.store)
    with pytest.raises(ValueError, match="a contact sheet of 0 images"):
        token_map.contact_sheet(0)
    with pytest.raises(ValueError, match="is not a model"):
        notebook.open_model(f"token_map/{token_map.manifest.key}", digits_run.store)


@pytest.fixture
def own_run(digits_run, tmp_path: Path) -> dict[str, Any]:
    """The values of the run, on a copy of its store that a test may add to."""
    shutil.copytree(digits_run.workspace / "store", tmp_path / "runs" / "store")
    given = (each.partition("=") for each in digits_run.overrides)
    return {"workspace": tmp_path / "runs"} | {name: yaml.safe_load(value) for name, _, value in given}


@pytest.mark.slow
def test_a_run_is_run_again_and_shown_as_by_the_command_line(digits_run, own_run: dict[str, Any]) -> None:
    done = notebook.run(DIGITS, **own_run)
    planned = digits_run.planned()
    assert {each["stage"]: each["key"] for each in done.answer["stages"]} == {id: item.key for id, item in planned.items()}
    assert all(each["reused"] for each in done.answer["stages"]), "the same stages as the command line, with the same keys"
    assert done.scores["main"] == planned["evaluate"].manifest.metrics and set(done.scores) == {"main", "untrained"}
    shown = _text(done)
    assert "What it is worth" in shown and "14 stages, 14 reused" in shown and "frechet_distance of untrained is" in shown
    assert "text/html" in done._repr_mimebundle_([], []) and shown.count(done.artifact("train@untrained").manifest.key) == 0
    assert done.artifact("train@untrained").manifest.key == planned["train@untrained"].key
    with pytest.raises(ValueError, match="this run has no stage tarin; its stages are dataset, tokenizer,"):
        done.artifact("tarin")
    with pytest.raises(ValueError, match="unknown key trian; did you mean train"):
        notebook.run(DIGITS, trian={"num_steps": 3})


@pytest.mark.slow
def test_images_of_another_generator_are_scored_like_those_of_the_run(digits_run, own_run: dict[str, Any], tmp_path: Path) -> None:
    made = read_samples(digits_run.store, digits_run.planned()["generate"].manifest)
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:40, :, :, None] * 15.9).clip(0, 255).astype(np.uint8).repeat(3, axis=3)
    np.savez(tmp_path / "real.npz", arr_0=pixels.repeat(2, axis=1).repeat(2, axis=2))
    assert len(made.codes) == len(pixels)
    scored = notebook.evaluate(tmp_path / "real.npz", "real", config=DIGITS, **own_run)
    by_run = digits_run.planned()["evaluate"].manifest.metrics
    assert 0 <= scored.scores["main"]["frechet_distance"] < by_run["frechet_distance"], "real images are nearer to real images"
    reused = {each["stage"]: each["reused"] for each in scored.answer["stages"]}
    assert reused["reference"] and scored.artifact("reference").manifest.key == digits_run.planned()["reference"].key
    with pytest.raises(ValueError, match=r"real\.npy"):
        notebook.evaluate(tmp_path / "real.npy", "real", config=DIGITS, **own_run)


def test_evaluations_are_compared_and_written(digits_run, tmp_path: Path) -> None:
    compared = notebook.compare("digits", workspace=digits_run.workspace)
    rows = [row for section in compared.answer["sections"] for row in section["rows"]]
    assert {row["variant"] for row in rows} == {"main", "untrained"}
    shown = _text(compared)
    assert "Fréchet dist." in shown and "untrained" in shown and "text/html" in compared._repr_mimebundle_([], [])
    assert "frechet_distance" in compared.write(tmp_path / "table.csv").read_text()
    assert compared.write(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match=r"table.txt cannot be written; end its name with .csv, .png or .html"):
        compared.write(tmp_path / "table.txt")
    with pytest.raises(ValueError, match="no-such-run"):
        notebook.compare("no-such-run", workspace=digits_run.workspace)


@pytest.mark.slow
def test_example_runs_and_was_committed_with_its_outputs(
    digits_run, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = nbformat.read(EXAMPLE, as_version=4)
    cells = [cell for cell in example.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed from top to bottom"
    assert not [each for cell in cells for each in cell.outputs if each.output_type == "error"]
    assert sum("image/png" in each.get("data", {}) for cell in cells for each in cell.outputs) >= 5
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = {"STORE": digits_run.store.uri, "TRACKING": f"sqlite:///{digits_run.workspace}/mlflow.db", "MODEL": trained}
    for name, value in names.items():
        parameters.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", parameters.source)
        assert count == 1
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    NotebookClient(example, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum("image/png" in each.get("data", {}) for cell in cells for each in cell.outputs) >= 5
