"""From captions of a dataset in COCO's layout to a model, samples of other captions, scores and the report."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from enat.checkpoint import load_enat
from enat.model import TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from material.tiny_clip import make_tiny_clip
from pipelines.artifacts.open import open_store
from pipelines.data.captions import EMPTY_INDEX, CaptionFeatures
from pipelines.data.dataset import INDEX
from pipelines.data.samples import read_samples
from pipelines.registry.model_card import model_card
from pipelines.workflow import driver

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.faults,
]  # of the parts alone: test_train_loop.py, test_learning.py


def _make_tiny_dinov2(folder: Path) -> Path:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_captions_become_a_model_samples_scores_and_a_report(tiny_nodes, make_session, layouts, tmp_path):
    dataset = layouts.config("coco")
    overrides = [
        f"dataset={{kind: coco, name: photographs, path: {dataset.path}, captions: {dataset.captions}}}",
        f"captions={{encoder: {make_tiny_clip(tmp_path / 'clip', max_position_embeddings=16)}}}",
        "train.model.text=true",
        "train.execution.num_workers=2",
        f"generate.dataset={{kind: coco, name: others, path: {dataset.path}, captions: {dataset.captions}}}",
        f"reference={{extractor: dinov2, weights: {_make_tiny_dinov2(tmp_path / 'dinov2')}}}",
    ]
    store = open_store(str(tmp_path / "store"))
    done = {item.node.id: item for item in driver.execute(tiny_nodes(*overrides), make_session(store))}
    trained, generated, scores = (done[name].manifest for name in ("train", "generate", "evaluate"))

    sizes = trained.summary["model"]
    assert (sizes["text_width"], sizes["num_text_tokens"], sizes["num_classes"]) == (32, 16, 0)
    features = CaptionFeatures.open(store, done["captions"].manifest)
    empty, pooled = features.take(np.array([EMPTY_INDEX]))
    for name in ("raw.safetensors", "model.safetensors"):
        model = load_enat(store.fetch(trained, name))
        assert torch.equal(model.null_hidden, torch.from_numpy(empty[0]).float()) and model.null_hidden.any()
        assert torch.equal(model.null_pooled, torch.from_numpy(pooled[0]).float())

    samples, asked_for = read_samples(store, generated), done[done["generate"].node.inputs["captions"]]
    assert generated.summary["labels"] == "captions" and len(samples.codes) == generated.summary["num_samples"]
    assert (samples.captions >= 0).all() and len(np.unique(samples.captions)) > 1
    taken = CaptionFeatures.open(store, asked_for.manifest).take(samples.captions[:3])
    settings = SamplerConfig(**generated.summary["sampler"])
    codes = sample(model, TextCondition(*map(torch.from_numpy, taken)), settings, seeds=samples.seeds[:3].tolist())
    np.testing.assert_array_equal(codes.numpy(), samples.codes[:3])

    assert scores.metrics["frechet_distance"] > 0 and scores.summary["protocol"]["labels"] == "captions of others, drawn"
    page = store.fetch(done["report"].manifest, "report.html").read_text(encoding="utf-8")
    index = done[asked_for.node.inputs["dataset"]].manifest
    texts = pc.list_flatten(pq.read_table(store.fetch(index, INDEX))["captions"]).to_pylist()
    assert all(texts[number] in html.unescape(page) for number in samples.captions)
    inputs = {name: done[id].manifest for name, id in done["train"].node.inputs.items()}
    card = model_card(trained, inputs, store.uri)
    assert "caption" in card and Path(store.uri).name in card


def test_text_model_without_features_of_its_captions_is_refused(tiny_nodes, layouts):
    with pytest.raises(ValueError, match=r"train\.model\.text requires .*captions\.encoder"):
        tiny_nodes("train.model.text=true", "targets=[train]")
