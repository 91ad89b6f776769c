"""Training a small tokenizer: it learns, its codebook stays in use, and the seed decides all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from enat.tokenizer import VQGAN, VQGANConfig
from enat.training.tokenizer import TokenizerRecipe, code_usage, initialize_codebook, revive_unused, train_tokenizer
from material.small_models import randomize, small_vqgan


def tiles(num_images, seed=0):
    """float (N, 3, 8, 8): black and white tiles of 2 x 2 pixels, one for each code of the grid."""
    drawn = torch.randint(0, 2, (num_images, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    return F.interpolate(drawn, scale_factor=2).expand(-1, 3, -1, -1).contiguous()


def new_vqgan():
    """8 px to a 4 x 4 grid of 32 codes; torch's own initialisation, from a fixed seed."""
    config = VQGANConfig(
        base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_dim=8, codebook_size=32, resolution=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQGAN(config)


@torch.no_grad()
def mean_squared_error(vqgan, images):
    return (vqgan.decode(vqgan.encode(images)) - images).square().mean().item()


@pytest.mark.slow
def test_training_learns_and_keeps_the_codebook_in_use():
    images, vqgan = tiles(64), new_vqgan()
    untrained = mean_squared_error(vqgan, images)
    recipe = TokenizerRecipe(num_steps=80, batch_size=16, revive_every=10)
    steps = list(train_tokenizer(vqgan, images, recipe, torch.Generator().manual_seed(0)))

    assert [step.step for step in steps] == list(range(1, 81))
    assert [step.is_quantized for step in steps] == [False] * 16 + [True] * 64
    assert all(math.isfinite(step.loss) for step in steps)
    assert not vqgan.training
    # The variance is the error of painting all images in the mean colour, as a collapsed codebook does.
    trained = mean_squared_error(vqgan, images)
    assert trained < 0.2 * images.var().item()
    assert trained < 0.1 * untrained
    share, perplexity = code_usage(vqgan.encode(images), 32)
    assert share > 0.8
    assert perplexity > 16


@pytest.mark.slow
def test_same_seed_gives_the_same_weights():
    images, recipe = tiles(32), TokenizerRecipe(num_steps=6, batch_size=4, revive_every=2, warmup_share=0.4)

    def trained(seed):
        vqgan = new_vqgan()
        list(train_tokenizer(vqgan, images, recipe, torch.Generator().manual_seed(seed)))
        return torch.cat([weight.flatten() for weight in vqgan.state_dict().values()])

    first, again, other = trained(0), trained(0), trained(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_quantized_training_initialises_the_codebook_and_moves_unused_entries():
    vqgan, images = new_vqgan(), tiles(16)
    # Nearly no learning rate: only the codebook's own rules move anything.
    recipe = TokenizerRecipe(num_steps=10, batch_size=8, warmup_share=0.2, revive_every=2, learning_rate=1e-9)
    entries = vqgan.codebook.weight.data
    steps = train_tokenizer(vqgan, images, recipe, torch.Generator().manual_seed(0))

    def run_two_steps_after_killing(count):
        entries[:count] = 1e3
        next(steps)
        return next(steps).is_quantized

    assert not run_two_steps_after_killing(32)
    assert (entries > 900).all()
    assert run_two_steps_after_killing(32)  # the codebook starts from latents, not from its initial values
    assert (entries < 100).all()
    assert run_two_steps_after_killing(10)
    assert (entries < 100).all()
    run_two_steps_after_killing(0)
    run_two_steps_after_killing(10)  # the last fifth
    assert (entries[:10] > 900).all()


def test_unused_entries_move_onto_latents_and_used_ones_stay():
    vqgan = small_vqgan()
    before = vqgan.codebook.weight.detach().clone()
    used = torch.zeros(24, dtype=torch.bool)
    used[:5] = True
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    revive_unused(vqgan, used, latents, torch.Generator().manual_seed(1))
    after = vqgan.codebook.weight.detach()
    assert torch.equal(after[:5], before[:5])
    pixels = {tuple(latent.tolist()) for latent in latents.permute(0, 2, 3, 1).flatten(0, 2)}
    assert {tuple(entry.tolist()) for entry in after[5:]} <= pixels


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_usage_counts_codes_and_their_entropy(codes):
    share, perplexity = code_usage(torch.tensor(codes), 10)
    probs = [codes.count(code) / len(codes) for code in set(codes)]
    assert share == pytest.approx(len(set(codes)) / 10)
    assert perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in probs)))


def test_gradients_pass_the_quantizer():
    """Straight-through: the encoder learns from the first quantized step on."""
    vqgan = randomize(new_vqgan(), std=0.05)
    before = vqgan.encoder.conv_in.weight.detach().clone()
    recipe = TokenizerRecipe(num_steps=1, batch_size=4, warmup_share=0, commitment=0)
    list(train_tokenizer(vqgan, tiles(8), recipe, torch.Generator().manual_seed(0)))
    # AdamW's first step has the size of the learning rate wherever there is a gradient; decay alone moves far less.
    assert (vqgan.encoder.conv_in.weight - before).abs().median() > 0.5 * recipe.learning_rate / 20


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"revive_every": 0}, "revive_every is 0"),
        ({"warmup_share": 1.0}, "warmup_share is 1.0"),
    ],
)
def test_impossible_recipe_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(**overrides)


def test_codebook_starts_at_centres_of_the_latents():
    images, vqgan = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)), small_vqgan()
    with torch.no_grad():
        latents = vqgan.encode_latents(images).permute(0, 2, 3, 1).flatten(0, 2)

    def error():
        return torch.cdist(latents, vqgan.codebook.weight).min(dim=1).values.square().mean().item()

    # Entries that were latents at random are a fair start; k-means is better still.
    vqgan.codebook.weight.data.copy_(latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(1))[:24]])
    drawn = error()
    initialize_codebook(vqgan, images, torch.Generator().manual_seed(0))
    assert error() < 0.9 * drawn
    assert code_usage(vqgan.encode(images), 24)[0] > 0.9
