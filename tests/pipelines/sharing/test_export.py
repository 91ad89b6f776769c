"""A model of a store becomes a folder or a repository of the hub, which gives the samples of `enat sample` to anyone who opens it.

huggingface_hub itself writes to and reads from a server on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Hub, hub_server
from huggingface_hub import ModelCard
from PIL import Image

from enat import ENAT, ENATPipeline
from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.files import hub
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from material.places import key_of, make
from material.random_weights import randomized
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cli import main
from pipelines.sampling import models, pictures
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.sample import sample_batches
from pipelines.sharing import export as sharing
from pipelines.sharing.export import ExportRequest, Target

SMALL = ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=3)
SAMPLER = SamplerConfig(num_steps=4, guidance_scale=2.0)
CLASSES = ["tench", "golden [retriever]", "crane"]
PROVENANCE = {"created": "2026-01-02T03:04:05+00:00", "code": "0.1.0+g0123456789ab", "worker_seconds": 7.5, "device_seconds": 3.0}
PROTOCOL = {
    "extractor": "inception",
    "reference": "digits",
    "num_samples": 500,
    "num_reference": 1797,
    "labels": "3 classes, 5 each",
}
FILES = {hub.CONFIG, hub.MODEL, hub.TOKENIZER, hub.CARD, "samples.png"}


@dataclass(frozen=True)
class World:
    """A store with a model, two evaluations of it and one of an earlier step of its training, and a model of captions."""

    store: ArtifactStore
    model: Manifest
    scores: Manifest
    text: Manifest

    def export(self, target: str, **values: Any) -> dict[str, Any]:
        request = ExportRequest(target=Target.parse(target), **values)
        return sharing.export(self.store, self.model, request)


def train(store: ArtifactStore, name: str, inputs: list[Manifest], config: ENATConfig, folder: Path) -> Manifest:
    save_weights(folder / "model", randomized(ENAT(config)))
    return make(
        store,
        f"train/{name}",
        files={"model.safetensors": (folder / "model").read_bytes()},
        config={
            "weights": None, "model": {"preset": None}, "sampler": dataclasses.asdict(SAMPLER), "num_steps": 1200,
            "masking": {"alpha": 12.0, "beta": 3.0, "reuse_probability": 0.5},
        },
        inputs={each.stage: {"stage": each.stage, "key": each.key, "digest": each.digest} for each in inputs},
        summary=summary_of("train", model=config, num_steps=1200),
        metrics={"final/loss": 3.25},
        provenance=PROVENANCE,
    )  # fmt: skip


def evaluate(store: ArtifactStore, name: str, model: Manifest, fid: float, **samples: Any) -> Manifest:
    made = make(store, f"generate/{name}", model, summary=summary_of("generate", sampler=SAMPLER, **samples))
    return make(
        store,
        f"evaluate/{name}",
        inputs={
            role: {"stage": each.stage, "key": each.key, "digest": each.digest}
            for role, each in (("model", model), ("samples", made))
        },
        metrics={"fid": fid, "fid_se": 0.25, "precision": 0.5, "images_per_second": 9.0},
        summary=summary_of("evaluate", protocol=PROTOCOL, extractor="inception"),
        provenance=PROVENANCE,
    )


@pytest.fixture(scope="module")
def world(vqgan: VQGAN, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("exported")
    store = open_store(str(folder / "store"))
    save_weights(folder / "vqgan", vqgan)
    tokenizer = make(
        store,
        "tokenizer/t",
        files={"vqgan.safetensors": (folder / "vqgan").read_bytes()},
        summary=summary_of("tokenizer", config=vqgan.config),
        provenance=PROVENANCE,
    )
    token_map = make(
        store,
        "token_map/m",
        metrics={"rows": 1797.0},
        summary=summary_of("token_map", class_names=CLASSES),
        provenance=PROVENANCE,
    )
    model = train(store, "x", [token_map, tokenizer], SMALL, folder)
    of_text = dataclasses.replace(SMALL, num_classes=0, text_width=32, num_text_tokens=16)
    text = train(store, "text", [tokenizer], of_text, folder)
    scores = evaluate(store, "e", model, 6.5)
    evaluate(store, "earlier", model, 66.0, train_steps=100)
    evaluate(store, "other", text, 77.0)
    return World(store, model, scores, text)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server(monkeypatch, tmp_path / "hub-cache") as made:
        yield made


def codes_of_sample(world: World, request: SampleRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and pixels of `enat sample`."""
    batches = [batch for batch, _ in sample_batches(models.from_manifest(world.store, world.model), request, None)]
    return torch.cat([batch.codes for batch in batches]), torch.cat([batch.images for batch in batches])


# The folder ----------------------------------------------------------------------------------------------------------------


def test_folder_gives_the_samples_of_enat_sample_bit_for_bit(world: World, tmp_path: Path) -> None:
    answer = world.export(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES == set(answer["files"])
    assert answer["model"] == f"train/{key_of('x')}" and answer["folder"] == str(tmp_path / "out")
    pipe = ENATPipeline.from_pretrained(tmp_path / "out")
    for num_images, images_per_pass, seed in ((40, 32, 0), (5, 2, 7)):
        request = SampleRequest(
            num_images=num_images, sampler=SAMPLER, seed=seed, labels=(2, 0), device="cpu", images_per_pass=images_per_pass
        )
        codes, pixels = codes_of_sample(world, request)
        seeds = [sharing.sample_seed(seed, i) for i in range(num_images)]
        made = pipe(labels=[(2, 0)[i % 2] for i in range(num_images)], seeds=seeds, images_per_pass=images_per_pass)
        assert torch.equal(made.codes, codes)
        for image, expected in zip(made.images, pixels, strict=True):
            assert image.tobytes() == expected.permute(1, 2, 0).numpy().tobytes()


def test_weights_are_those_of_the_store_and_settings_those_of_the_model(world: World, tmp_path: Path) -> None:
    world.export(str(tmp_path / "new" / "out"))
    folder = tmp_path / "new" / "out"
    assert (folder / hub.MODEL).read_bytes() == world.store.fetch(world.model, "model.safetensors").read_bytes()
    pipe = ENATPipeline.from_pretrained(folder)
    assert (pipe.sampler, pipe.class_names, pipe.model.config) == (SAMPLER, tuple(CLASSES), SMALL)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"], "nothing temporary is left"


def test_picture_has_a_column_for_each_class(world: World, tmp_path: Path) -> None:
    world.export(str(tmp_path / "out"), num_images=6, seed=3)
    request = SampleRequest(num_images=6, sampler=SAMPLER, seed=3, labels=(0, 1, 2), device="cpu")
    _, pixels = codes_of_sample(world, request)
    with Image.open(tmp_path / "out" / "samples.png") as picture, pictures.grid_of(pixels, 3) as expected:
        assert picture.tobytes() == expected.convert(picture.mode).tobytes()


def test_card_is_read_by_the_hubs_own_library(world: World, tmp_path: Path) -> None:
    world.export(str(tmp_path / "out"), licence="cc-by-4.0")
    card = ModelCard.load(tmp_path / "out" / hub.CARD)
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-4.0", "unconditional-image-generation")
    assert card.data.datasets == ["digits"] and "class-conditional" in card.data.tags
    assert len(card.data.eval_results) == 2, "of this model, and of its last step only"
    found = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in found.items()} == {"fid": 6.5, "precision": 0.5}
    assert card.data.metrics == ["fid", "precision"] and "&id" not in (tmp_path / "out" / hub.CARD).read_text(), "no aliases"
    args = found["fid"].metric_args
    assert {name: args[name] for name in PROTOCOL} == PROTOCOL and args["standard_error"] == 0.25
    assert args["sampler"]["num_steps"] == 4 and found["fid"].dataset_name == "digits"
    assert "standard_error" not in found["precision"].metric_args
    text = card.content
    assert "| FID | 6.5 ± 0.49 |" in text and "1,797 images of digits" in text and "![Samples of this model](samples.png)" in text
    assert "4 steps at guidance 2" in text and f"evaluate/{world.scores.key[:12]}" in text
    assert world.store.uri not in text and "open_store" not in text, "places of the store stay private"
    code = text.partition("```python")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "labels=[0, 1, 2]" in code


def test_card_without_evaluations_and_licence_says_so(world: World, tmp_path: Path) -> None:
    alone = open_store(str(tmp_path / "alone"))
    for stage in ("tokenizer", "token_map", "train"):
        name = {"tokenizer": "t", "token_map": "m", "train": "x"}[stage]
        found = world.store.read_manifest(stage, key_of(name))
        assert found is not None
        for record in found.files:
            alone.put_file(stage, found.key, record.name, world.store.fetch(found, record.name))
        alone.commit(found)
    sharing.export(alone, world.model, ExportRequest(target=Target.parse(str(tmp_path / "out")), num_images=0))
    card = ModelCard.load(tmp_path / "out" / hub.CARD)
    assert card.data.eval_results is None and card.data.license == "unknown"
    assert "No evaluation of this model is known." in card.content and "samples.png" not in card.content
    assert not (tmp_path / "out" / "samples.png").exists()


def test_model_of_captions_has_no_picture_and_asks_for_its_encoder(world: World, tmp_path: Path) -> None:
    sharing.export(world.store, world.text, ExportRequest(target=Target.parse(str(tmp_path / "out"))))
    card = ModelCard.load(tmp_path / "out" / hub.CARD)
    assert card.data.pipeline_tag == "text-to-image" and "text_encoder=" in card.content
    assert not (tmp_path / "out" / "samples.png").exists()
    assert ENAT.from_pretrained(tmp_path / "out").config.text_width == 32


def test_an_interrupted_export_leaves_no_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "hub_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.export(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sharing.hub_card

    def slow(*values: Any, **named: Any) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        return made(*values, **named)

    monkeypatch.setattr(sharing, "hub_card", slow)
    with pytest.raises(ValueError, match=r"out cannot be written \(Directory not empty\); give another folder"):
        world.export(str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# The target ----------------------------------------------------------------------------------------------------------------


def test_names_of_repositories_and_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Target.parse("owner/name") == Target.parse("hf://owner/name") == Target(repository="owner/name")
    for folder in ("out", "./owner/name", "a/b/c", str(tmp_path / "out"), "../out"):
        assert Target.parse(folder) == Target(folder=Path(folder))
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"models/x may be a folder or a repository; write \./models/x or hf://models/x$"):
        Target.parse("models/x")
    assert Target.parse("models") == Target(folder=Path("models")), "an empty folder is filled"
    (tmp_path / "models" / "a").write_text("")
    for taken in ("models", "./models/a"):
        with pytest.raises(ValueError, match="is not empty; give another folder"):
            Target.parse(taken)
    for wrong in ("s3://bucket/x", "https://huggingface.co/owner/name", "hf://owner", "hf://owner/name/file", "hf://../x"):
        with pytest.raises(ValueError, match=r"is neither a folder nor owner/name|is not a repository of the hub"):
            Target.parse(wrong)


# The hub -------------------------------------------------------------------------------------------------------------------


def test_repository_gets_one_commit_and_opens_by_its_name(
    world: World, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    answer = world.export("owner/digits")
    assert server.commits == 1 and set(server.repositories["owner/digits"]) == FILES
    assert server.made[0]["name"] == "digits" and server.made[0]["organization"] == "owner"
    assert server.made[0].get("private", True) is True or server.made[0].get("visibility") == "private"
    assert answer["repository"] == "owner/digits" and answer["url"].startswith(server.url)
    assert TOKEN not in json.dumps(answer)
    monkeypatch.delenv("HF_TOKEN")
    world.export(str(tmp_path / "local"))
    local, remote = (
        ENATPipeline.from_pretrained(place)(labels=[0, 1], seeds=[4, 5]) for place in (tmp_path / "local", "owner/digits")
    )
    assert torch.equal(local.codes, remote.codes)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    world.export("owner/again", is_public=True)
    assert server.made[-1].get("private") is False or server.made[-1].get("visibility") == "public"


def test_refusals_of_the_hub_are_one_sentence(world: World, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match=r"^hf://owner/name cannot be written: ") as refused:
            world.export("hf://owner/name", num_images=0)
        assert "\n" not in str(refused.value) and "hf_wrong" not in str(refused.value)
    assert server.commits == 0 and server.repositories == {}
    with pytest.raises(
        ValueError, match=r"^owner/missing is not a directory and cannot be fetched from the hub: the repository does"
    ):
        ENATPipeline.from_pretrained("owner/missing")


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["enat", "export", *arguments, "--store", world.store.uri])
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_command_writes_a_folder(ask: Callable[..., Any], tmp_path: Path) -> None:
    name = f"train/{key_of('x')[:8]}"
    code, out, err = ask(name, "--hf", "out", "-n", "3")
    assert (code, err) == (0, "")
    assert "with 1 evaluation on its card" in out and "the card states no licence; give it with --license" in out
    code, out, _ = ask(name, "--hf", "again", "--license", "mit", "--json", "-n", "0")
    assert code == 0 and json.loads(out)["license"] == "mit" and (tmp_path / "again" / hub.CARD).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train/zz", "--hf", "out"), "has no artifact whose key begins with"),
        ((f"tokenizer/{key_of('t')[:8]}", "--hf", "out"), "is not a model"),
        ((f"train/{key_of('x')[:8]}",), "Missing option '--hf'"),
        ((f"train/{key_of('x')[:8]}", "--hf", "."), "is not empty"),
        ((f"train/{key_of('x')[:8]}", "--hf", "out", "--license", "My Licence"), "is not an identifier of the hub"),
    ],
)
def test_what_cannot_be_exported_is_refused(ask: Callable[..., Any], tmp_path: Path, arguments: Any, message: str) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
