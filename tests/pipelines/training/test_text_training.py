"""Captions from a dataset in COCO's layout to a model, samples of other captions, scores and the report."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from layouts import Layouts
from tiny_clip import make_tiny_clip
from transformers import Dinov2Config, Dinov2Model

from enat.checkpoint import load_enat
from enat.model import TextCondition
from enat.sampler import sample
from enat.sampler_config import SamplerConfig
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import EMPTY_INDEX, CaptionFeatures
from pipelines.data.dataset import INDEX
from pipelines.data.samples import read_codes
from pipelines.workflow import driver
from pipelines.workflow.stage import Done

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.faults,
]  # of the parts alone: test_train_loop.py, test_learning.py


def _make_tiny_dinov2(folder: Path) -> Path:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], layouts: Layouts, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ArtifactStore, dict[str, Done]]:
    root = tmp_path_factory.mktemp("text")
    encoder = make_tiny_clip(root / "clip", max_position_embeddings=16)
    dataset = layouts.config("coco")
    overrides = [
        f"dataset={{kind: coco, name: photographs, path: {dataset.path}, captions: {dataset.captions}}}",
        f"captions={{encoder: {encoder}}}",
        "train.model.text=true",
        "train.execution.num_workers=2",
        f"generate.dataset={{kind: coco, name: others, path: {dataset.path}, captions: {dataset.captions}}}",
        f"reference={{extractor: dinov2, weights: {_make_tiny_dinov2(root / 'dinov2')}}}",
    ]
    store = open_store(str(root / "store"))
    done = driver.execute(tiny_nodes(*overrides), make_session(store))
    return store, {item.node.id: item for item in done}


def test_the_model_has_the_widths_of_the_features_and_no_classes(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    model = trained[1]["train"].manifest.summary["model"]
    assert (model["text_width"], model["num_text_tokens"], model["num_classes"]) == (32, 16, 0)


def test_the_model_keeps_the_empty_caption(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    store, done = trained
    empty, pooled = CaptionFeatures.open(store, done["captions"].manifest).take(np.array([EMPTY_INDEX]))
    for name in ("model.safetensors", "raw.safetensors"):
        model = load_enat(store.fetch(done["train"].manifest, name))
        assert torch.equal(model.null_hidden, torch.from_numpy(empty[0]).float()) and model.null_hidden.any()
        assert torch.equal(model.null_pooled, torch.from_numpy(pooled[0]).float())


def test_the_model_samples_from_captions(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    store, done = trained
    model = load_enat(store.fetch(done["train"].manifest, "model.safetensors"))
    features = CaptionFeatures.open(store, done["captions"].manifest)
    condition = TextCondition(*map(torch.from_numpy, features.take(np.arange(4))))
    codes = sample(model, condition, SamplerConfig(num_steps=4), seeds=range(4))
    assert codes.shape == (4, 16) and int(codes.max()) < 32


def test_samples_are_of_captions_of_as_many_images(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    store, done = trained
    manifest = done["generate"].manifest
    samples = read_codes(store, manifest)
    assert manifest.summary["labels"] == "captions" and len(samples.codes) == manifest.summary["num_samples"]
    assert (samples.captions >= 0).all() and len(np.unique(samples.captions)) > 1
    model = load_enat(store.fetch(done["train"].manifest, "model.safetensors"))
    asked_for = done[done["generate"].node.inputs["captions"]].manifest
    condition = TextCondition(*map(torch.from_numpy, CaptionFeatures.open(store, asked_for).take(samples.captions[:3])))
    codes = sample(model, condition, SamplerConfig(**manifest.summary["sampler"]), seeds=samples.seeds[:3].tolist())
    np.testing.assert_array_equal(codes.numpy(), samples.codes[:3])


def test_they_are_scored_and_the_report_shows_what_was_asked_for(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    store, done = trained
    scores = done["evaluate"].manifest
    assert scores.metrics["frechet_distance"] > 0 and scores.summary["protocol"]["labels"] == "captions of others, drawn"
    page = store.fetch(done["report"].manifest, "report.html").read_text(encoding="utf-8")
    index = done[done[done["generate"].node.inputs["captions"]].node.inputs["dataset"]].manifest
    texts = pc.list_flatten(pq.read_table(store.fetch(index, INDEX))["captions"]).to_pylist()
    shown = [texts[number] for number in read_codes(store, done["generate"].manifest).captions]
    assert shown and all(text in html.unescape(page) for text in shown)


def test_a_text_model_without_features_of_its_captions_is_refused(tiny_nodes: Callable[..., Any], layouts: Layouts) -> None:
    with pytest.raises(ValueError, match=r"train\.model\.text needs the features of captions; give captions\.encoder"):
        tiny_nodes("train.model.text=true", "targets=[train]")


def test_weights_are_registered_as_a_model_of_captions(trained: tuple[ArtifactStore, dict[str, Done]]) -> None:
    from pipelines.registry.model_card import model_card

    store, done = trained
    inputs = {name: done[id].manifest for name, id in done["train"].node.inputs.items()}
    card = model_card(done["train"].manifest, inputs, store.uri)
    assert "caption" in card and Path(store.uri).name in card
