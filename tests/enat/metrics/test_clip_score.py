"""CLIP scores are those of transformers' CLIPModel with CLIP's own preprocessing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from enat.metrics.clip_score import ClipImages, caption_embeddings, clip_scores
from material.tiny_clip import make_tiny_clip

CAPTIONS = ["the cat", "a dog on the cat", "", "the the the", "on a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"), kind="full")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth pictures of 20 x 20 pixels, which resizing changes: uint8 (5, 3, 20, 20)."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    pictures = [np.asarray(Image.fromarray(each).resize((20, 20), Image.Resampling.BICUBIC)) for each in noise]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def test_scores_are_those_of_transformers(folder: Path, images: torch.Tensor) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    pixels = processor([Image.fromarray(each) for each in images.permute(0, 2, 3, 1).numpy()], return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        output = model(**pixels, input_ids=tokens["input_ids"])
    cosines = (output.image_embeds * output.text_embeds).sum(dim=1).numpy()
    embedded = ClipImages.read(folder)(images)["features"].numpy()
    found = clip_scores(embedded, caption_embeddings(folder, CAPTIONS))
    np.testing.assert_allclose(found, 100 * np.maximum(cosines, 0), atol=1e-3)
    assert (found > 1).any() and np.ptp(found) > 1, "equality is meaningful"


def test_resizing_is_not_that_of_distances(folder: Path, images: torch.Tensor) -> None:
    clip = ClipImages.read(folder)
    by_pillow = [
        np.asarray(Image.fromarray(each).resize((8, 8), Image.Resampling.BICUBIC)) for each in images.permute(0, 2, 3, 1).numpy()
    ]
    assert np.array_equal(clip.resize(images).permute(0, 2, 3, 1).numpy(), np.stack(by_pillow))
    assert not torch.allclose(clip.resize(images), super(ClipImages, clip).resize(images), atol=3)


def test_opposite_embeddings_score_0_and_equal_ones_100() -> None:
    embedded = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    assert clip_scores(embedded, embedded * [[1], [-1], [1]]) == pytest.approx([100, 0, 0])
    with pytest.raises(ValueError, match=r"images \(3, 2\) and captions \(2, 2\)"):
        clip_scores(embedded, embedded[:2])


def test_text_alone_is_refused(tmp_path: Path) -> None:
    text = make_tiny_clip(tmp_path / "text")
    with pytest.raises(ValueError, match=r"has no text_projection.weight; give the folder of a whole CLIPModel"):
        caption_embeddings(text, CAPTIONS)
    with pytest.raises(ValueError, match="holds a model of type clip_text_model"):
        ClipImages.read(text)
