"""CLIP scores of a run of captions: those of its samples and of the captions that they were asked for, on Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enat.images import to_uint8
from enat.metrics.clip_score import ClipImages, caption_embeddings, clip_scores
from enat.metrics.errors import standard_error
from material.layouts import Layouts
from material.tiny_clip import make_tiny_clip
from pipelines.artifacts.open import open_store
from pipelines.data.dataset import Dataset
from pipelines.data.samples import read_samples
from pipelines.run.loading import load_run
from pipelines.workflow import driver


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_samples_are_scored_with_the_captions_that_they_were_asked_for(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], layouts: Layouts, vqgan: Any, tmp_path: Path
) -> None:
    clip = make_tiny_clip(tmp_path / "clip", kind="full")
    nodes = tiny_nodes(
        *(f"dataset={{kind: coco, name: photographs, path: {layouts.root / 'coco'}, captions: {layouts.root / 'captions.json'}}}",),
        f"reference.dataset={{kind: image_folder, name: labelled, path: {layouts.root / 'image_folder'}}}",
        *(
            f"captions.encoder={clip}",
            "train.model.text=true",
            "train.num_steps=2",
            "generate.num_samples=8",
            "generate.replicates=2",
        ),
        f"evaluate={{clip_score: {clip}, metrics: [frechet_distance], num_samples: 6, precision: bf16}}",
        until="evaluate",
    )
    store = open_store(str(tmp_path / "store"))
    made = {item.node.id: item.manifest for item in driver.execute(nodes, make_session(store))}
    config = next(node for node in nodes if node.id == "dataset").config
    texts = [
        text
        for row in Dataset(config, store, made["dataset"]).read(0, made["dataset"].summary["num_images"])
        for text in row.captions
    ]
    found, scores = made["evaluate"].metrics, []
    for replicate in (0, 1):
        samples = read_samples(store, made["generate"], 0, 6, replicate=replicate)
        images = to_uint8(vqgan.decode(torch.from_numpy(samples.codes).view(-1, 4, 4), "bf16"))
        embedded = ClipImages.read(clip)(images)["features"].numpy()
        scores.append(clip_scores(embedded, caption_embeddings(clip, [texts[number] for number in samples.captions])))
        assert found[f"clip_score_replicate_{replicate + 1}"] == pytest.approx(scores[-1].mean(), abs=1e-3)
    assert found["clip_score"] == pytest.approx(np.mean(scores), abs=1e-3) and np.ptp(scores) > 1
    expected = np.sqrt(sum(standard_error(each) ** 2 for each in scores)) / 2
    assert found["clip_score_se"] == pytest.approx(expected, rel=1e-3)
    assert made["evaluate"].summary["protocol"]["clip"]


def test_models_of_classes_have_no_captions_to_score_with(tiny_config: Path, tmp_path: Path) -> None:
    clip = make_tiny_clip(tmp_path / "clip", kind="full")
    with pytest.raises(ValueError, match=r"evaluate.clip_score needs .* conditioned on classes"):
        load_run(tiny_config, (f"evaluate.clip_score={clip}",))
