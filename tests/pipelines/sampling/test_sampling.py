"""`enat sample`: images equal those of the stage, the record describes them, and errors are one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.images import to_uint8
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from enat.text import load_text_encoder
from enat.tokenizer import VQGAN
from material.random_weights import randomized
from material.summaries import summary_of
from material.tiny_clip import make_tiny_clip
from pipelines import notebook
from pipelines.artifacts import garbage
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cli import main
from pipelines.cli.sample import _sampler
from pipelines.data.samples import sample_seed
from pipelines.sampling import models
from pipelines.sampling.models import Generator
from pipelines.sampling.pictures import MASKED_GRAY
from pipelines.sampling.pyfunc import PyfuncModel
from pipelines.sampling.request import parse_labels
from pipelines.stages.generate import GenerateConfig
from pipelines.storage.base import StorageError
from pipelines.storage.external import folder_digest
from pipelines.tracking import run as tracking
from services.mlflow_database import mlflow_database

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2, "grid_size": 4, "codebook_size": 32}
CLASSES = ("tench", "golden retriever", "crane", "crane", "t-shirt, jersey")
OWN_SAMPLER = SamplerConfig(num_steps=4, guidance_scale=2.0)
FIELDS: dict[str, Any] = {"stage_version": 1}


@dataclass
class World:
    """A store with a model of classes ("c...") and one of captions ("d..."), both also as files of weights."""

    root: Path
    store: ArtifactStore
    model: ENAT
    text_model: ENAT
    vqgan: VQGAN
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    def images(self, labels: list[int], sampler: SamplerConfig = OWN_SAMPLER, seed: int = 0) -> np.ndarray:
        """uint8 (B, H, W, 3), image after image."""
        made = []
        for index, label in enumerate(labels):
            codes = sample(self.model, torch.tensor([label]), sampler, seeds=[sample_seed(seed, index)])
            made.append(to_uint8(self.vqgan.decode(codes.view(1, 4, 4)))[0].permute(1, 2, 0).numpy())
        return np.stack(made)


def random_model(**sizes: Any) -> ENAT:
    return randomized(ENAT(ENATConfig(**{**SIZES, **sizes})))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"), max_position_embeddings=16)


@pytest.fixture(scope="module")
def world(vqgan, clip, tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    store = open_store(str(root / "store"))
    model, text_model = random_model(num_classes=5), random_model(num_classes=0, text_width=32, num_text_tokens=16)
    for name, module in (("vqgan", vqgan), ("enat", model), ("text", text_model)):
        save_weights(root / f"{name}.safetensors", module)

    def commit(stage: str, key: str, files: dict[str, str], **fields: Any) -> Manifest:
        records = tuple(store.put_file(stage, key, name, root / source) for name, source in files.items())
        return store.commit(
            Manifest(**{**FIELDS, "stage": stage, "key": key, "config": {}, "inputs": {}, "files": records, **fields})
        )

    def source(manifest: Manifest) -> dict[str, str]:
        return {"stage": manifest.stage, "key": manifest.key, "digest": manifest.digest}

    tokenizer = commit("tokenizer", "a" * 64, {"vqgan.safetensors": "vqgan.safetensors"})
    token_map = commit("token_map", "b" * 64, {}, summary=summary_of("token_map", class_names=list(CLASSES)))
    known = {"encoder": "hf://some/clip", "captions_per_file": 4}
    captions = commit(
        "captions", "e" * 64, {}, config=known, summary=summary_of("captions", info={"encoder_digest": folder_digest(clip)})
    )
    config = {"sampler": dataclasses.asdict(OWN_SAMPLER)}
    inputs = {"tokenizer": source(tokenizer), "token_map": source(token_map)}
    made = commit("train", "c" * 64, {"model.safetensors": "enat.safetensors"}, config=config, inputs=inputs)
    inputs = {"tokenizer": source(tokenizer), "captions": source(captions)}
    commit("train", "d" * 64, {"model.safetensors": "text.safetensors"}, config=config, inputs=inputs)
    return World(root, store, model, text_model, vqgan, made)


@pytest.fixture
def ask(world, tmp_path, monkeypatch, capsys):
    """Run `enat sample`, in a folder of its own: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: object, store: object = world.store.uri) -> tuple[int, str, str]:
        given = [*map(str, arguments), *(["--store", str(store)] if store else [])]
        monkeypatch.setattr(sys, "argv", ["enat", "sample", *given])
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def assert_same_images(images: np.ndarray, expected: np.ndarray) -> None:
    """The same codes; a decoder that computes other images beside them may round a pixel to the other side."""
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# What is made --------------------------------------------------------------------------------------------------------------


def test_images_depend_on_seed_and_label_and_not_on_the_batch(ask, world, tmp_path):
    code, out, err = ask("cc", "--labels", "1,3 x2", "-n", 7, "--seed", 5, "--images-per-pass", 3)
    assert (code, err) == (0, "")
    expected = world.images([1, 3, 3, 1, 3, 3, 1], seed=5)
    files = sorted((tmp_path / "samples" / "images").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(7)]
    assert_same_images(np.stack([opened(file) for file in files]), expected)
    with np.load(tmp_path / "samples" / "samples.npz", allow_pickle=False) as arrays:
        assert_same_images(arrays["arr_0"], expected)
        assert arrays["arr_1"].tolist() == [1, 3, 3, 1, 3, 3, 1]
    assert "7 images of 16 x 16 pixels" in out and f"train/{'c' * 12}, " in out and "golden retriever, crane" in out


def test_record_describes_the_images(ask, world, tmp_path):
    code, out, _ = ask("train/ccc", "num_steps=6", "-n", 2, "--json", "-o", "here")
    assert code == 0
    record = json.loads(out)
    assert record.pop("folder") == "here" and record == json.loads((tmp_path / "here" / "samples.json").read_text())
    assert SamplerConfig(**record["sampler"]) == dataclasses.replace(OWN_SAMPLER, num_steps=6), "the model's own but for the steps"
    assert record["model"]["artifact"] == f"train/{'c' * 64}" and record["model"]["model_digest"] == world.manifest.digest
    assert [sample["seed"] for sample in record["samples"]] == [sample_seed(0, 0), sample_seed(0, 1)]
    assert [(sample["label"], sample["class"]) for sample in record["samples"]] == [(0, "tench"), (1, "golden retriever")]
    assert record["images_per_pass"] == GenerateConfig().forward_batch_size, "so that codes are those of stage generate"
    assert record["images_per_second"] > 0 and record["device"] and record["seed"] == 0
    assert set(record["files"]) == {path.name for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert_same_images(
        opened(tmp_path / "here" / record["samples"][1]["file"]),
        world.images([0, 1], dataclasses.replace(OWN_SAMPLER, num_steps=6))[1],
    )


def test_only_requested_outputs_are_written(ask, tmp_path):
    assert ask("cc", "-n", 2, "--no-images", "--no-steps", "--no-gif", "--no-npz")[0] == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["grid.png", "samples.json"]


def test_grid_has_a_row_for_each_time_that_the_labels_come(ask, world, tmp_path):
    assert ask("cc", "--labels", "0-2", "-n", 6, "--no-images", "--no-npz")[0] == 0
    tile, gap = 16 * 6, 2
    grid = opened(tmp_path / "samples" / "grid.png")
    assert grid.shape == (2 * (tile + gap) + gap, 3 * (tile + gap) + gap, 3)
    expected = world.images([0, 1, 2, 0, 1, 2])
    for index in range(6):
        top, left = gap + index // 3 * (tile + gap), gap + index % 3 * (tile + gap)
        assert_same_images(grid[top : top + tile : 6, left : left + tile : 6], expected[index])


def test_earlier_samples_are_kept_without_overwrite_and_other_files_always(ask, tmp_path):
    assert ask("cc", "-n", 4)[0] == 0
    before = (tmp_path / "samples" / "grid.png").read_bytes()
    code, out, err = ask("cc", "-n", 2)
    assert (code, out) == (2, "") and "--output samples already contains grid.png; use --overwrite" in err
    assert (tmp_path / "samples" / "grid.png").read_bytes() == before
    (tmp_path / "samples" / "images" / "mine.png").write_text("mine")
    assert ask("cc", "-n", 2, "--overwrite", "--no-gif")[0] == 0
    left = sorted(path.name for path in (tmp_path / "samples" / "images").iterdir())
    assert left == ["000000.png", "000001.png", "mine.png"] and not (tmp_path / "samples" / "progress.gif").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    code, _, err = ask("cc", "-o", "other", "--overwrite")
    assert code == 2 and "--output other already contains thesis.txt; give another folder" in err


@pytest.mark.slow
def test_it_runs_without_ray(world, tmp_path):
    script = (
        "import sys; from pipelines.cli.sample import sample; sample.main(sys.argv[1:], standalone_mode=False); "
        "assert not {'ray', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    arguments = ["cc", "-n", "1", "--store", world.store.uri, "-o", str(tmp_path / "out")]
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


# Steps ---------------------------------------------------------------------------------------------------------------------


def test_first_eight_are_shown_step_by_step_at_any_size_of_a_pass(ask, tmp_path):
    tile, gap = 16 * 6, 2
    for images_per_pass in (3, 32):
        size = ("--images-per-pass", images_per_pass, "--batch-size", 1, "--no-images", "--no-npz", "--overwrite")
        assert ask("cc", "-n", 11, *size)[0] == 0
        assert opened(tmp_path / "samples" / "steps.png").shape == (8 * (tile + gap) + gap, 4 * (tile + gap) + gap, 3)
        assert opened(tmp_path / "samples" / "progress.gif").shape == (2 * (tile + gap) + gap, 4 * (tile + gap) + gap, 3)


# Settings ------------------------------------------------------------------------------------------------------------------

TWELVE = SamplerConfig(num_steps=12, guidance_scale=2.0, remask_temperature=0.0)
TWELFTHS = tuple(round(1 - step / 12, 3) for step in range(1, 13))


def test_overrides_replace_the_model_own_values_and_are_checked_together(world):
    generator = Generator(world.model, world.vqgan, origin={}, sampler=TWELVE)
    for overrides, expected in (
        ([], TWELVE),
        (["reveal_order=halton"], dataclasses.replace(TWELVE, reveal_order="halton")),
        ([f"mask_ratios={list(TWELFTHS)}"], dataclasses.replace(TWELVE, mask_ratios=TWELFTHS)),
        (["guidance_scales=[1,3]", "num_steps=2"], SamplerConfig(num_steps=2, guidance_scales=(1, 3), remask_temperature=0.0)),
        (["guidance_scales=[1,3]", "guidance_scales=null"], TWELVE),
    ):
        assert _sampler(generator, overrides) == expected


def test_settings_in_use_are_shown(ask):
    assert "4 steps, guidance 2, fp32" in ask("cc", "-n", 1, "-o", "a")[1]
    lists = ("guidance_scales=[1,1.5,3]", "mask_ratios=[0.8,0.3,0]", "num_steps=3")
    assert "3 steps, guidance 1 1.5 3, mask ratios 0.8 0.3 0, fp32" in ask("cc", "-n", 1, "-o", "b", *lists)[1]


# Regions -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photograph(photographs, tmp_path):
    path = tmp_path / "photograph.png"
    photographs["flower"].crop((100, 100, 300, 260)).save(path)
    return path


@pytest.mark.parametrize(("keep", "is_inside_made"), [("outside", True), ("inside", False)])
def test_only_the_region_is_regenerated(ask, world, photograph, tmp_path, keep, is_inside_made):
    """Box 5..9 by 0..4 in pixels touches the codes of columns 1 and 2 in row 0."""
    assert ask("cc", "--inpaint", photograph, "--box", "5,0,9,4", "--keep", keep, "--labels", "4", "-n", 5)[0] == 0
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    made = [1, 2] if is_inside_made else [position for position in range(16) if position not in (1, 2)]
    assert record["regenerated_codes"] == made and {sample["class"] for sample in record["samples"]} == {"t-shirt, jersey"}
    source = opened(tmp_path / "samples" / "source.png")[2:98:6]
    crop, gray = source[:, 2:98:6], source[:, 100:196:6] == MASKED_GRAY
    assert crop.std() > 10, "the photograph, cropped and made small"
    expected = np.zeros((4, 4), bool)
    expected.flat[made] = True
    np.testing.assert_array_equal(gray.all(axis=2), expected.repeat(4, 0).repeat(4, 1))
    codes = world.vqgan.encode(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255).flatten()
    start = torch.where(torch.from_numpy(expected).flatten(), 32, codes)
    for index in range(5):
        alone = sample(world.model, torch.tensor([4]), OWN_SAMPLER, seeds=[sample_seed(0, index)], start=start[None])
        image = to_uint8(world.vqgan.decode(alone.view(1, 4, 4)))[0].permute(1, 2, 0).numpy()
        assert_same_images(opened(tmp_path / "samples" / "images" / f"{index:06d}.png"), image)


# Captions ------------------------------------------------------------------------------------------------------------------


def test_text_conditional_model_samples_captions(ask, world, clip, tmp_path):
    captions = ["the cat", "a dog on the cat"]
    code, out, err = ask("dd", "--caption", captions[0], "--caption", captions[1], "--text-encoder", clip, "-n", 3)
    assert (code, err) == (0, "") and "the cat, a dog on the cat" in out
    features = load_text_encoder(clip).encode([*captions, captions[0]])
    seeds = [sample_seed(0, index) for index in range(3)]
    codes = sample(world.text_model, TextCondition(features.hidden, features.pooled), OWN_SAMPLER, seeds=seeds)
    images = to_uint8(world.vqgan.decode(codes.view(3, 4, 4))).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert_same_images(arrays["arr_0"], images)
        assert arrays.files == ["arr_0"], "captions are not labels"
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [sample["caption"] for sample in record["samples"]] == [*captions, captions[0]]


def test_a_model_that_mlflow_loads_samples_captions(world, clip):
    loaded = PyfuncModel(models.from_artifact(world.store, "dd"))
    captions = ["the cat", "a dog on the cat"]
    features = load_text_encoder(clip).encode(captions)
    seeds = [sample_seed(0, index) for index in range(2)]
    codes = sample(world.text_model, TextCondition(features.hidden, features.pooled), OWN_SAMPLER, seeds=seeds)
    images = to_uint8(world.vqgan.decode(codes.view(2, 4, 4))).permute(0, 2, 3, 1).numpy()
    assert_same_images(loaded.predict(captions, {"text_encoder": str(clip), "device": "cpu"}), images)
    with pytest.raises(ValueError, match="this model needs captions; give params"):
        loaded.predict(captions)


# Where models come from ----------------------------------------------------------------------------------------------------


def test_registered_model_is_found_by_name_and_alias(ask, world, tmp_path):
    uri = mlflow_database(tmp_path)
    run = tracking.start_run(uri, tracking.TrackingConfig(), "train", {})
    tags = {"enat.digest": "d", "enat.created": "2026", "enat.artifact": f"train/{world.key}", "enat.store": world.store.uri}
    assert run.register_model("enat-s-digits", {"README.md": b"card"}, tags, "card", "newest") == "1"
    run.register_model("other", {"README.md": b"card"}, {"enat.digest": "x", "enat.created": "2026"}, "card", "newest")
    expected = world.images([2])[0]
    for number, reference in enumerate(("enat-s-digits@newest", "models:/enat-s-digits@newest", "models:/enat-s-digits/1")):
        code, out, err = ask(reference, "--labels", "2", "--tracking-uri", uri, "-o", number, store=None)
        assert (code, err) == (0, "") and reference in out
        assert_same_images(opened(tmp_path / str(number) / "images" / "000000.png"), expected)
    for reference, sentence in (
        ("enat-s-digits@best", "has no model enat-s-digits@best"),
        ("nothing@newest", "has no model nothing@newest"),
        ("models:/enat-s-digits/7", "has no model models:/enat-s-digits/7"),
        ("models:/enat-s-digits", "does not name a registered model"),
        ("other@newest", "it has no tag enat.artifact"),
    ):
        code, out, err = ask(reference, "--tracking-uri", uri, "-o", "none", store=None)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1
    code, _, err = ask("enat-s-digits@newest", "--tracking-uri", uri, store=tmp_path / "elsewhere")
    assert code == 2 and f"which the store {tmp_path / 'elsewhere'} does not have" in err
    code, _, err = ask("enat-s-digits@newest", "--tracking-uri", f"sqlite:///{tmp_path / 'no.db'}", store=None)
    assert code == 2 and "no.db" in err and not (tmp_path / "no.db").exists()


def _open_in_a_notebook(world: World, ask: Callable[..., tuple[int, str, str]]) -> None:
    notebook.open_artifact(f"train/{world.key}", world.store)


def _load_in_a_notebook(world: World, ask: Callable[..., tuple[int, str, str]]) -> None:
    notebook.open_model(f"train/{world.key}", world.store)


def _sample(world: World, ask: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = ask("cc", "--labels", "2")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("use", [_sample, _load_in_a_notebook, _open_in_a_notebook])
def test_model_that_is_sampled_counts_as_used_together_with_its_inputs(world, ask, monkeypatch, use):
    """Garbage collection keeps it. A store that refuses to note the use is sampled from all the same."""
    for path in (path for path in Path(world.store.uri).rglob("*") if path.is_file()):
        os.utime(path, (0, 0))
    assert garbage.plan(world.store, limit=time.time() - 3600).kept == {}
    use(world, ask)
    kept = garbage.plan(world.store, limit=time.time() - 3600).kept
    made_from = [(source["stage"], source["key"]) for source in world.manifest.inputs.values()]
    assert kept == {("train", world.key): "recent", **dict.fromkeys(made_from, "needed")}
    errors: list[Exception] = [PermissionError(13, "Permission denied"), StorageError("s3://b/.used: no permission")]

    def refused(*_: object) -> None:
        raise errors.pop()

    monkeypatch.setattr(ArtifactStore, "record_use", refused)
    for remaining in (1, 0):
        use(world, functools.partial(ask, "--overwrite"))
        assert len(errors) == remaining, "it was tried"


def test_files_of_weights_make_what_the_artifact_makes(ask, world, tmp_path):
    weights = ("--weights", world.root / "enat.safetensors", "--vqgan", world.root / "vqgan.safetensors")
    code, out, err = ask(*weights, "--labels", "3", "num_steps=4", "guidance_scale=2", store=None)
    assert (code, err) == (0, "") and "enat.safetensors" in out
    assert_same_images(opened(tmp_path / "samples" / "images" / "000000.png"), world.images([3])[0])


# Errors -------------------------------------------------------------------------------------------------------------


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("xyz",), "has no artifact whose key begins with train/xyz"),
    (("tokenizer/aa",), f"tokenizer/{'a' * 12} is not a model; models are artifacts of stage train"),
    ((), "name a MODEL"),
    (("cc", "dd"), "give one MODEL, not cc and dd"),
    (("cc", "--labels", "5"), "--labels has 5, but the classes of this model are 0 to 4"),
    (("cc", "--labels", "3-7"), "--labels has 3-7, but the classes of this model are 0 to 4"),
    (("cc", "--labels", "4-3"), "--labels has 4-3, a range that ends before it begins; write 3-4"),
    (("cc", "--seed", "-1"), "-1 is not in the range"),
    (("cc", "--labels", "goldfish"), "--labels has 'goldfish', which is not a class of this model"),
    (("cc", "--labels", "crane"), "the name of several classes: 2, 3"),
    (("cc", "--labels", ","), "--labels is empty"),
    (("cc", "num_stepz=3"), "unknown key num_stepz; did you mean num_steps?"),
    (("cc", "num_steps=0"), "the model's sampler with num_steps=0: num_steps is 0; it must be at least 1"),
    (("cc", "num_steps=few"), "override num_steps=few: num_steps: Value 'few'"),
    (("cc", "num_steps=2", "mask_ratios=[0.5,0.2,0]"), "mask_ratios has 3 values for 2 steps; give one value a step"),
    (("cc", "guidance_scale=3.5", "guidance_scales=[1,2,3,4]"), "leave out guidance_scale"),
    (("cc", "sampling_temperature=0", "top_k=5"), "top_k is 5, but at sampling_temperature 0 nothing is drawn"),
    (("cc", "--caption", "a cat"), "--caption is for text-conditional models, but this model has 5 classes; use --labels"),
    (("dd",), "this model is text-conditional; give captions with --caption"),
    (
        ("dd", "--caption", "a cat"),
        "--caption needs --text-encoder, the CLIP text model that this model was trained with",
    ),
    (
        ("dd", "--caption", "a cat", "--text-encoder", "{other_clip}"),
        "is not the one this model was trained with, hf://some/clip",
    ),
    (("cc", "--device", "tpu7"), "--device tpu7"),
    (("cc", "--device", "cuda:99"), "--device cuda:99 does not exist"),
    (("cc", "--inpaint", "{photo}"), "--inpaint and --box must be given together"),
    (("cc", "--inpaint", "{photo}", "--box", "1,2,3"), "--box 1,2,3 is not left,top,right,bottom in pixels"),
    (("cc", "--inpaint", "{photo}", "--box", "0,0,17,4"), "is not left,top,right,bottom within 16 x 16 pixels"),
    (("cc", "--inpaint", "{photo}", "--box", "4,4,4,8"), "is not left,top,right,bottom within 16 x 16 pixels"),
    (("cc", "--inpaint", "{photo}", "--box", "0,0,16,16", "--keep", "inside"), "leaves nothing to generate"),
    (("cc", "--inpaint", "gone.png", "--box", "0,0,4,4"), "--inpaint gone.png cannot be read (No such file or directory)"),
    (("cc", "--inpaint", "{text}", "--box", "0,0,4,4"), "it is neither JPEG nor PNG"),
    (("cc", "--weights", "x", "--vqgan", "y"), "--weights replaces MODEL"),
    (("--weights", "gone.pth", "--vqgan", "{vqgan}"), "--weights: gone.pth is not a file"),
    (("--weights", "{vqgan}", "--vqgan", "{vqgan}"), "holds vqgan, not the weights of enat"),
    (("cc", "--preset", "enat-l"), "--preset needs --weights"),
    (("cc", "-o", "{text}"), "is not a readable folder"),
]


def test_error_is_one_line_and_nothing_is_written(ask, world, photograph, tmp_path, tmp_path_factory, capsys):
    (tmp_path / "text.png").write_text("this is not an image")
    places = {"photo": photograph, "text": tmp_path / "text.png", "vqgan": world.root / "vqgan.safetensors"}
    places["other_clip"] = make_tiny_clip(tmp_path_factory.mktemp("other"), seed=1, max_position_embeddings=16)
    capsys.readouterr()  # progress of transformers
    for arguments, sentence in WRONG:
        code, out, err = ask(*(argument.format(**places) for argument in arguments))
        assert (code, out) == (2, ""), arguments
        assert err.startswith("enat: ") and err.count("\n") == 1 and sentence in err, (arguments, err)
        assert not (tmp_path / "samples").exists(), arguments


def test_labels_are_parsed_as_people_write_them():
    for text, labels in (
        ("207,360 x4", (207, 360, 360, 360, 360)),
        ("207x2, 3-5", (207, 207, 3, 4, 5)),
        ("1-2 x2", (1, 2, 1, 2)),
        ("Golden Retriever x2,tench", (1, 1, 0)),
        ("7 , , 8", (7, 8)),
        ("box x 2", (4, 4)),
    ):
        assert parse_labels(text, 1000, ("tench", "golden retriever", "a", "b", "box")) == labels
    with pytest.raises(ValueError, match="asks for more than 1,000,000 images"):
        parse_labels("0-999 x9999999", 1000)
