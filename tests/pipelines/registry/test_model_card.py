"""A trained model is registered under a name that describes it, with all that is needed to find, load and judge it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from enat.checkpoint import save_weights
from enat.config import ENATConfig
from enat.cost import generation_cost
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN
from material.places import key_of, make
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.token_map import TokenMapInfo
from pipelines.registry import model_card
from pipelines.registry.model_card import registered_name
from pipelines.run.config import RunConfig
from pipelines.sampling import models
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.sample import sample_batches
from pipelines.tracking import run as tracking
from pipelines.tracking.run import TrackingConfig
from pipelines.workflow import driver
from pipelines.workflow.config import load_config, redacted, with_overrides
from pipelines.workflow.stage import PublishContext
from services.mlflow_database import mlflow_database

PROVENANCE = {
    "created": "2026-01-02T03:04:05+00:00",
    "code": "0.1.0+g0123456789ab",
    "seconds": 1.0,
    "worker_seconds": 7200.5,
    "device_seconds": 3600.0,
}
SMALL = ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=3)


@dataclass(frozen=True)
class Trained:
    """A model's artifact in a store, and those it was made from."""

    store: ArtifactStore
    manifest: Manifest
    inputs: dict[str, Manifest]

    def replaced(self, config: dict[str, Any] | None = None, **summary: Any) -> Trained:
        """The same with other values of its config and summary."""
        changed = dataclasses.replace(
            self.manifest, config={**self.manifest.config, **(config or {})}, summary={**self.manifest.summary, **summary}
        )
        return dataclasses.replace(self, manifest=changed)

    def of(self, preset: str | None, changes: dict[str, Any] | None = None, **summary: Any) -> Trained:
        """The same with a preset's architecture, some of it changed."""
        usual = ENATConfig.preset(preset) if preset else SMALL
        model = dataclasses.asdict(dataclasses.replace(usual, **(changes or {})))
        return self.replaced(config={"model": {"preset": preset}}, model=model, **summary)

    @property
    def name(self) -> str:
        return registered_name(self.manifest)

    @property
    def card(self) -> str:
        return model_card.model_card(self.manifest, self.inputs, self.store.uri)

    def publish(self, run: tracking.RunHandle, **config: Any) -> None:
        context = PublishContext(store=self.store, run=run, tracking=TrackingConfig(**config), node="train")
        model_card.publish(self.manifest, self.inputs, context)


@pytest.fixture(scope="module")
def trained(vqgan: VQGAN, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model with its initial weights, in the artifact of a trained model."""
    folder = tmp_path_factory.mktemp("trained")
    store = open_store(str(folder / "store"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ENAT(SMALL).eval()
    weights = {}
    for name, module in (("vqgan.safetensors", vqgan), ("model.safetensors", model)):
        save_weights(folder / name, module)
        weights[name] = {name: (folder / name).read_bytes()}
    summary = summary_of("tokenizer", config=vqgan.config)
    tokenizer = make(store, "tokenizer/t", files=weights["vqgan.safetensors"], summary=summary, provenance=PROVENANCE)
    token_map = make(store, "token_map/m", tokenizer, metrics={"rows": 1234.0}, provenance=PROVENANCE)
    manifest = make(
        store,
        "train/x",
        token_map,
        tokenizer,
        files=weights["model.safetensors"],
        config={
            "weights": None,
            "s3": None,
            "model": {"preset": None, "embed_dim": 32},
            "masking": {"alpha": 12.0, "beta": 3.0, "reuse_probability": 0.5},
            "sampler": json.loads(json.dumps(dataclasses.asdict(SamplerConfig(num_steps=4, guidance_scale=2.0)))),
            "num_steps": 1200,
            "learning_rate": 0.001,
            "betas": [0.9, 0.99],
            "execution": {"num_workers": 7},
        },
        summary=summary_of("train", model=SMALL, parameters=sum(tensor.numel() for tensor in model.parameters()), num_steps=1200),
        metrics={"final/loss": 3.14159265, "images": 5.0},
        provenance=PROVENANCE,
    )
    return Trained(store, manifest, {"token_map": token_map, "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_database(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def run(uri: str) -> tracking.RunHandle:
    return tracking.start_run(uri, TrackingConfig(experiment="tests"), "train", {})


# Names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters", "dataset", "name"),
    [
        ("enat-l", 574_300_000, "imagenet", "enat-l-imagenet"),
        ("nat-s", 98_100_000, "imagenet", "nat-s-imagenet"),
        (None, 1_310_000, "digits", "enat-1.3m-1e1d-digits"),
        (None, 574_300_000, "imagenet", "enat-574m-1e1d-imagenet"),
        (None, 1_040_700_000, "coco", "enat-1.0b-1e1d-coco"),
        (None, 9_960_000, "coco", "enat-10m-1e1d-coco"),
        (None, 40_500, "digits", "enat-40k-1e1d-digits"),
        (None, 832, "digits", "enat-832-1e1d-digits"),
        ("enat-b", 1, "my/data: v2", "enat-b-my-data-v2"),
    ],
)
def test_the_name_of_a_model_has_its_size_and_its_dataset(
    trained: Trained, preset: str | None, parameters: int, dataset: str, name: str
) -> None:
    assert trained.of(preset, parameters=parameters, dataset=dataset).name == name


@pytest.mark.parametrize(
    ("preset", "changes", "masking", "name"),
    [
        ("enat-s", {"decoder_attention": "full"}, {}, "enat-s-digits-decoder_attention-full"),
        ("enat-s", {"encoder_layers": 14, "decoder_layers": 2}, {}, "enat-s-digits-encoder_layers-14-decoder_layers-2"),
        ("enat-s", {"reuse": False}, {"reuse_probability": 0.0}, "enat-s-digits-reuse-false"),
        ("enat-s", {"reused_features": "all"}, {}, "enat-s-digits-reused_features-all"),
        ("enat-s", {}, {"reuse_probability": 0.25}, "enat-s-digits-reuse_probability-0.25"),
        ("nat-s", {"decoder_layers": 5}, {}, "nat-s-digits-decoder_layers-5"),
        ("enat-s", {"grid_size": 32, "codebook_size": 8, "num_classes": 0}, {}, "enat-s-digits"),
        ("enat-s", {"num_classes": 0, "text_width": 768}, {}, "enat-s-digits-text"),
        ("enat-s", {"num_classes": 0, "text_width": 768, "qk_norm": True}, {}, "enat-s-digits-text-qk_norm-true"),
        (None, {"qk_norm": True}, {}, "enat-1.0k-1e1d-digits-qk_norm-true"),
    ],
)
def test_an_ablation_has_a_name_of_its_own(
    trained: Trained, preset: str | None, changes: dict[str, Any], masking: dict[str, Any], name: str
) -> None:
    """So it is not a version of the model that it is compared with, and no alias moves between them."""
    changed = trained.of(preset, changes, parameters=1000, dataset="digits")
    assert changed.replaced(config={"masking": masking}).name == name


@pytest.mark.slow
def test_all_ablations_of_a_config_have_different_names(trained: Trained) -> None:
    """Of the paper's ablations and of the digits' variants: one name each."""
    for config in ("imagenet256-ablations", "digits-variants"):
        run = load_config(RunConfig, Path(__file__).parents[3] / "configs" / f"{config}.yaml")
        names, recipes = set(), set()  # variants may differ in their sampler only
        variants = [run, *(with_overrides(run, values, "") for values in run.variants.values())]
        for variant in variants:
            info = TokenMapInfo(dataset="it", resolution=256, grid_size=16, codebook_size=1024, num_classes=10, tokenizer_digest="")
            recipe = {"model": dataclasses.asdict(variant.train.model), "masking": dataclasses.asdict(variant.train.masking)}
            recipes.add(json.dumps(recipe, sort_keys=True))
            model = dataclasses.asdict(variant.train.model.architecture(info))
            names.add(trained.replaced(config=recipe, model=model, parameters=1000).name)
        assert len(names) == len(recipes) > 7


# The card ------------------------------------------------------------------------------------------------------------------


def test_the_code_on_a_card_loads_the_model_and_samples_from_it(trained: Trained) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", trained.card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["codes"].shape == (3, 16) and names["images"].shape == (3, 3, 16, 16)
    assert names["images"].min() >= 0 and names["images"].max() <= 1


def test_a_card_has_the_inputs_the_recipe_the_metrics_and_the_cost(trained: Trained, vqgan: VQGAN) -> None:
    card = trained.card
    cost = generation_cost(SMALL, SamplerConfig(num_steps=4, guidance_scale=2.0), vqgan.config)
    assert card.startswith(f"# enat-{model_card._short_count(trained.manifest.summary['parameters'])}-1e1d-digits\n")
    for source in trained.inputs.values():
        assert source.digest in card
    for row in [
        "| final/loss | 3.14159 |",
        "| resolution | 16 px |",
        "| images | 1,234 |",
        "| codes of an image | 4 x 4, out of 32 |",
        "| embed_dim | 32 |",
        "| decoder_attention | self_cross |",
        "| learning_rate | 0.001 |",
        "| betas | 0.9, 0.99 |",
        "| masking | alpha 12.0, beta 3.0, reuse_probability 0.5 |",
        "| making it, worker-seconds | 7,200.5 |",
        "| making it, device-seconds | 3,600.0 |",
        f"| one image, as published code computes it | {cost.total_macs / 1e9:,.4g} GMACs |",
        f"| one image, as this code does | {cost.executed_total_macs / 1e9:,.4g} GMACs |",
    ]:
        assert row in card.splitlines(), row
    assert "trained on digits at 16 px for 1,200 steps" in card and "given one of 3 classes" in card
    assert "0.1.0+g0123456789ab" in card and "2026-01-02" in card
    assert "num_workers" not in card, "execution settings do not change the model"


def test_a_card_of_imported_weights_describes_no_training(trained: Trained) -> None:
    inputs = {"tokenizer": trained.inputs["tokenizer"]}
    imported = dataclasses.replace(trained, inputs=inputs).replaced(is_imported=True, num_steps=0, dataset="imported")
    assert "imported and not trained here" in imported.card and "learning_rate" not in imported.card


def test_a_card_describes_the_condition_of_a_model_without_classes(trained: Trained) -> None:
    for fields, condition, code in (
        ({"num_classes": 0}, "given nothing", "labels = torch.tensor([0])"),
        ({"num_classes": 0, "text_width": 64}, "given a caption", "labels = TextCondition(features.hidden, features.pooled)"),
    ):
        other = trained.replaced(model=dataclasses.asdict(dataclasses.replace(SMALL, **fields)))
        assert condition in other.card and code in other.card.splitlines()


def test_any_dataset_name_is_escaped_on_a_card(trained: Trained) -> None:
    card = trained.replaced(dataset="a|b\n\n# <img src=x> `c` [d](e)").card
    assert "| dataset | a\\|b # \\<img src=x\\> \\`c\\` \\[d\\](e) |" in card.splitlines()
    assert [line for line in card.splitlines() if line.startswith("# ")] == [card.splitlines()[0]]


def test_a_card_of_a_large_model_fits_a_description(trained: Trained) -> None:
    """Of a whole config, as a run writes it."""
    large = dataclasses.asdict(ENATConfig.preset("enat-xl"))
    train = dataclasses.replace(RunConfig(name="run").train, sampler=SamplerConfig())
    assert len(trained.replaced(config=redacted(train), model=large).card) < 5000


# Registering ---------------------------------------------------------------------------------------------------------------


def test_a_trained_model_is_registered_with_its_card_and_manifest(
    trained: Trained, run: tracking.RunHandle, tmp_path: Path
) -> None:
    named = trained.of("enat-s", dataset="first")
    named.publish(run, model_alias="candidate")
    version = MlflowClient(run.uri).get_model_version_by_alias("enat-s-first", "candidate")
    assert version.run_id == run.run_id and version.description == named.card
    assert version.tags == {
        "enat.digest": named.manifest.digest,
        "enat.created": "2026-01-02T03:04:05+00:00",
        "enat.key": key_of("x"),
        "enat.artifact": f"train/{key_of('x')}",
        "enat.store": trained.store.uri,
        "enat.code": "0.1.0+g0123456789ab",
        "enat.dataset": "first",
        "enat.resolution": "16",
        "enat.num_steps": "1200",
        "enat.input.token_map": f"token_map/{key_of('m')}",
        "enat.token_map_digest": trained.inputs["token_map"].digest,
        "enat.input.tokenizer": f"tokenizer/{key_of('t')}",
        "enat.tokenizer_digest": trained.inputs["tokenizer"].digest,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        files = Path(download_artifacts(version.source, tracking_uri=run.uri, dst_path=str(tmp_path)))
    assert (files / "README.md").read_text() == named.card
    assert Manifest.from_json((files / "manifest.json").read_bytes()) == named.manifest
    assert open_store(str(version.tags["enat.store"])).read_manifest(*version.tags["enat.artifact"].split("/")) == trained.manifest


def test_mlflow_loads_a_registered_model_which_samples_as_the_artifact_does(
    trained: Trained, run: tracking.RunHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own means, without unpickling. Settings that are not given are those of the previews in training."""
    tokenizer, key, name = trained.inputs["tokenizer"], key_of("loaded"), "model.safetensors"
    file = trained.store.put_file("train", key, name, trained.store.fetch(trained.manifest, name))
    inputs = {"tokenizer": {"stage": tokenizer.stage, "key": tokenizer.key, "digest": tokenizer.digest}}
    committed = trained.store.commit(dataclasses.replace(trained.manifest, key=key, files=(file,), inputs=inputs))
    named = dataclasses.replace(trained, manifest=committed).replaced(dataset="loaded")
    named.publish(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    monkeypatch.setattr(pickle, "load", None)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        loaded = mlflow.pyfunc.load_model(f"models:/{named.name}@newest")
    images = loaded.predict(pandas.DataFrame({"label": [1, 0, 1]}))
    side = named.inputs["tokenizer"].summary["config"]["resolution"]
    assert images.shape == (3, side, side, 3) and images.dtype == np.uint8
    generator = models.from_manifest(trained.store, committed)
    request = SampleRequest(num_images=3, sampler=generator.sampler, labels=(1, 0, 1))
    (batch,) = [batch for batch, _ in sample_batches(generator, request, None)]
    np.testing.assert_array_equal(images, batch.images.numpy().transpose(0, 2, 3, 1))
    assert (loaded.predict({"label": [1, 0, 1]}) == images).all(), "without pandas"
    assert (loaded.predict({"label": [1, 0, 1]}, params={"seed": 5}) != images).any()
    assert (loaded.predict({"label": [1, 0, 1]}, params={"num_steps": 2}) != images).any()
    with pytest.raises(ValueError, match="the input has no rows"):
        loaded.predict(pandas.DataFrame({"label": np.array([], dtype=np.int64)}))
    with pytest.raises(ValueError, match="99"):
        loaded.predict({"label": [99]})


def test_an_untrained_model_is_not_registered_and_an_imported_one_is(trained: Trained, run: tracking.RunHandle) -> None:
    trained.replaced(num_steps=0, dataset="untrained").publish(run)
    trained.replaced(num_steps=0, dataset="imported", is_imported=True).publish(run)
    names = [model.name for model in MlflowClient(run.uri).search_registered_models()]
    assert not [name for name in names if name.endswith("-untrained")]
    assert [name for name in names if name.endswith("-imported")]


def test_registered_texts_have_no_password_of_the_store(trained: Trained) -> None:
    secret = "s3://someone:secret@bucket/store"
    tags = model_card.model_tags(trained.manifest, trained.inputs, secret)
    card = model_card.model_card(trained.manifest, trained.inputs, secret)
    assert tags["enat.store"] == "s3://bucket/store" and "open_store('s3://bucket/store')" in card
    assert "secret" not in card + str(tags)


def test_a_reused_model_is_registered_with_another_server(
    tiny_nodes: Callable[..., list[Any]], make_session: Callable[..., Any], tmp_path: Path, uri: str, vqgan: VQGAN
) -> None:
    """An imported model, so that nothing is trained; the second server learns of it though its artifact is only reused."""
    weights = tmp_path / "enat.safetensors"
    save_weights(weights, ENAT(dataclasses.replace(SMALL, encoder_layers=2, num_classes=2)).eval())
    nodes = [
        dataclasses.replace(node, stage=dataclasses.replace(node.stage, publish=model_card.publish))
        if node.stage.name == "train"
        else node
        for node in tiny_nodes(f"train.weights={weights}", "train.model.num_classes=2", until="train")
    ]
    store = open_store(str(tmp_path / "store"))
    for server in (uri, mlflow_database(tmp_path)):
        config = TrackingConfig(experiment="runs")
        parent = tracking.start_run(server, config, "run", {})
        done = driver.execute(nodes, make_session(store, run=parent, tracking=config))[-1]
        name = registered_name(done.manifest)
        version = MlflowClient(server).get_model_version_by_alias(name, "newest")
        assert version.tags["enat.digest"] == done.manifest.digest and "not trained here" in version.description
    assert done.is_reused
