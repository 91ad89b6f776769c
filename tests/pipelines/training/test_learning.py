"""Training learns: the loss after a fixed number of steps for ENAT and the models that it is compared with, and captions.

The token map is of scikit-learn's digits with a tokenizer of their own: 2 x 2 pixels are one of 32 centres of k-means, so that an
image is 4 x 4 codes. Groups are drawn as in the pipeline; the loop is the plain one, since that the pipeline trains what a plain
loop trains is tested elsewhere (test_train_loop.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from enat.config import ENATConfig
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from enat.text import load_text_encoder
from enat.training.loss import objective
from enat.training.masking import MaskingConfig
from material.tiny_clip import make_tiny_clip
from pipelines.data.token_map import TokenMap, TokenMapInfo
from pipelines.training.batches import draw_group
from pipelines.training.config import TrainConfig

NUM_CODES, NUM_STEPS = 32, 300
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 1, "embed_dim": 64, "num_heads": 4, "grid_size": 4}
RECIPE = TrainConfig(
    num_steps=NUM_STEPS,
    batch_size=128,
    num_groups=2,
    learning_rate=2e-3,
    warmup_steps=20,
    betas=(0.9, 0.99),
    flip=False,
    cond_drop_prob=0.1,
    ema_decay=0.98,
    sampler=SamplerConfig(),
    seed=0,
)


@dataclass(frozen=True)
class Digits:
    """The map, the centre of each code, pixels float (R, 64) in [0, 16] and labels of the images."""

    token_map: TokenMap
    centres: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """int64 (B, 16) -> float (B, 64)"""
        patches = self.centres[codes.numpy()].reshape(-1, 4, 4, 2, 2)
        return patches.transpose(0, 1, 3, 2, 4).reshape(-1, 64)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small are slower with two, and much slower where others want the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    loaded = load_digits()
    patches = loaded.data.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    clusters = KMeans(NUM_CODES, n_init=1, random_state=0).fit(patches)
    codes = clusters.labels_.reshape(-1, 16)
    info = TokenMapInfo(
        dataset="digits",
        resolution=8,
        grid_size=4,
        codebook_size=NUM_CODES,
        num_classes=10,
        tokenizer_digest="",
        num_captions=len(codes),
    )
    captions = np.stack([np.arange(len(codes)), np.ones(len(codes), np.int64)], axis=1)
    stored = np.stack([codes, codes], axis=1).astype(np.uint16)
    token_map = TokenMap(info, stored, loaded.target.astype(np.int32), captions)
    return Digits(token_map, clusters.cluster_centers_, loaded.data, loaded.target)


class Captions:
    """Features of one caption per image, "a handwritten three", by a small CLIP with random weights; -1 is the empty caption."""

    def __init__(self, encoder: Any, labels: Sequence[int]) -> None:
        features = encoder.encode([*(f"a handwritten {name}" for name in NAMES), ""])
        self.hidden, self.pooled, self._labels = features.hidden.numpy(), features.pooled.numpy(), np.asarray(labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.where(np.asarray(indices) < 0, len(NAMES), self._labels[indices])
        return self.hidden[rows], self.pooled[rows]

    def of_digits(self, digits: torch.Tensor) -> TextCondition:
        return TextCondition(torch.from_numpy(self.hidden)[digits], torch.from_numpy(self.pooled)[digits])


@pytest.fixture(scope="module")
def captions(digits, tmp_path_factory):
    encoder = load_text_encoder(make_tiny_clip(tmp_path_factory.mktemp("clip"), max_position_embeddings=32))
    return Captions(encoder, digits.labels.tolist())


@pytest.fixture(scope="module")
def learn(digits):
    """The EMA after NUM_STEPS steps, and the loss of each."""

    def learn(config: ENATConfig, recipe: TrainConfig = RECIPE, captions: Captions | None = None) -> tuple[ENAT, list[float]]:
        model = ENAT(config).initialize(torch.Generator().manual_seed(0)).train()
        if captions is not None:
            model.set_null_caption(torch.from_numpy(captions.hidden)[-1], torch.from_numpy(captions.pooled)[-1])
        ema, update = copy.deepcopy(model).eval().requires_grad_(False), get_ema_multi_avg_fn(recipe.ema_decay)
        optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
        losses = []
        for step in range(recipe.num_steps):
            step_losses = []
            for group in range(recipe.num_groups):
                batch = draw_group(recipe, digits.token_map, captions, step, group)  # type: ignore[arg-type]
                ((codes, condition, masked, dropout_mask),) = batch.microbatches(1, ema)
                loss, _ = objective(model, ema, codes, condition, masked, dropout_mask=dropout_mask, z_loss=recipe.z_loss)
                (loss / recipe.num_groups).backward()
                step_losses.append(loss.item())
            optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                update(list(ema.parameters()), list(model.parameters()), step + 1)
            losses.append(float(np.mean(step_losses)))
        return ema, losses

    return learn


def _judge(digits: Digits) -> Any:
    from sklearn.svm import SVC

    reconstructed = digits.decode(torch.from_numpy(digits.token_map.codes[:, 0].astype(np.int64)))
    return SVC(C=10.0).fit(reconstructed, digits.labels)


def _agreement(digits: Digits, codes: torch.Tensor, asked: torch.Tensor) -> float:
    return float((_judge(digits).predict(digits.decode(codes)) == asked.numpy()).mean())


VARIANTS: dict[str, dict[str, Any]] = {
    "enat": {},
    "nat": {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False},
    "disentangled": {"reuse": False},
    "mae": {"decoder_attention": "full"},
    "crossmae": {"decoder_attention": "cross"},
    "more-decoder": {"encoder_layers": 1, "decoder_layers": 2},
    "reuse-masked": {"reused_features": "masked"},
    "reuse-all": {"reused_features": "all"},
    "qk-norm": {"qk_norm": True},
}


def _loss_of_frequencies(digits: Digits) -> float:
    """Label-smoothed cross-entropy of a prediction that knows each position's frequencies of codes and nothing else."""
    total = 0.0
    for position in digits.token_map.codes[:, 0].T:
        frequency = np.bincount(position, minlength=NUM_CODES) + 0.1
        log_probs = np.log(frequency / frequency.sum())
        total += -0.9 * log_probs[position].mean() - 0.1 * log_probs.mean()
    return total / digits.token_map.codes.shape[2]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "enat" else pytest.mark.faults) for name in VARIANTS]
)
def test_model_learns_more_than_the_frequencies_of_codes(digits, learn, name):
    config = ENATConfig(**{**SIZES, "codebook_size": NUM_CODES, "num_classes": 10, **VARIANTS[name]})
    masking = MaskingConfig(reuse_probability=0.5 if config.reuse else 0.0)
    _, losses = learn(config, replace(RECIPE, masking=masking))
    assert np.mean(losses[-20:]) < 2.25 < 2.4 < _loss_of_frequencies(digits)


@pytest.mark.faults
def test_samples_agree_with_their_captions(digits, captions, learn):
    hidden = captions.hidden
    config = ENATConfig(
        **SIZES, codebook_size=NUM_CODES, num_classes=0, text_width=hidden.shape[2], num_text_tokens=hidden.shape[1]
    )
    model, _ = learn(config, RECIPE, captions)
    asked = torch.arange(10).repeat(20)
    settings = SamplerConfig(guidance_scale=3.0, sampling_temperature=1.0, remask_temperature=2.0)
    codes = sample(model, captions.of_digits(asked), settings, seeds=range(len(asked)))
    assert _agreement(digits, codes, asked) > 0.8
    # Without a caption the agreement is by chance.
    empty = model.null_condition(len(asked))
    assert _agreement(digits, sample(model, empty, settings, seeds=range(len(asked))), asked) < 0.3
