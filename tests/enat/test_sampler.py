"""Sampling: equal to the published run and to the plain loop, and what holds for every run."""

import plain
import pytest
import torch
from small_models import TEXT, captions, conditions, golden, golden_enat, small_enat

from enat.sampler import sample
from enat.sampler_config import SamplerConfig

GREEDY = {"sampling_temperature": 0.0, "remask_temperature": 0.0}


def test_a_greedy_run_equals_the_published_code():
    arrays = golden("enat_tiny")
    model, meta = golden_enat(arrays), arrays["meta"]
    # The published guidance strength s is w = 1 + s here.
    config = SamplerConfig(num_steps=meta["steps"], guidance_scale=1 + meta["cfg_scale"], **GREEDY)
    codes, trajectory = sample(model, arrays["labels"], config, seeds=range(len(arrays["labels"])), return_trajectory=True)
    assert torch.equal(torch.stack(trajectory), arrays["sample/inputs_per_step"])
    assert torch.equal(codes, arrays["sample/final_tokens"].flatten(1))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ({}, {}),
        ({}, {"reuse": False}),
        ({"reuse": False}, {}),
        ({"decoder_attention": "cross"}, {}),
        ({"decoder_attention": "full"}, {}),
        ({}, {"guidance_scale": 1.0}),
        ({}, {"guidance_scale": 0.5}),
        ({}, {"guidance_schedule": "constant", "guidance_scale": 2.0}),
        ({}, {"sampling_temperature": 0.0}),
        ({}, {"sampling_temperature": 1.0, "remask_temperature": 0.0}),
        ({}, {"num_steps": 1}),
        ({"grid_size": 2}, {"num_steps": 11}),  # more steps than tokens: some reveal none, the last find nothing masked
    ],
    ids=str,
)
def test_the_sampler_equals_the_plain_one(architecture, settings):
    model = small_enat(**architecture)
    labels, seeds = [3, 0, 4, 3], [11, 12, 13, 14]
    config = SamplerConfig(**settings)
    assert torch.equal(sample(model, torch.tensor(labels), config, seeds=seeds), plain.sample(model, labels, config, seeds))


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.0}, {"guidance_schedule": "constant", "guidance_scale": 2.0}, {"reuse": False}], ids=str
)
@pytest.mark.parametrize(
    "architecture",
    [
        TEXT,
        {"decoder_attention": "cross", **TEXT},
        {"decoder_attention": "full", "encoder_layers": 0, "reuse": False, **TEXT},
        {"reused_features": "masked"},
        {"reused_features": "all"},
        {"reused_features": "all", "qk_norm": True, **TEXT},
        {"num_classes": 0},
        {"num_classes": 0, "reused_features": "masked"},
    ],
    ids=str,
)
def test_the_sampler_of_other_architectures_equals_the_plain_one(architecture, settings):
    model, seeds = small_enat(**architecture), [11, 12, 13]
    labels, config = conditions(model), SamplerConfig(**settings)
    assert torch.equal(sample(model, labels, config, seeds=seeds), plain.sample(model, plain.rows(labels), config, seeds))


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": 1.0}, {"reuse": False}, {"sampling_temperature": 1.0}, {"remask_temperature": 30.0}], ids=str
)
def test_every_setting_matters(settings):
    """Otherwise the comparisons above would not see it being ignored."""
    model, labels = small_enat(), torch.arange(4)
    changed = sample(model, labels, SamplerConfig(**settings), seeds=range(4))
    assert not torch.equal(changed, sample(model, labels, SamplerConfig(), seeds=range(4)))


@pytest.mark.parametrize("num_steps", [1, 2, 8, 30])
def test_codes_are_revealed_once_and_completely(num_steps):
    model = small_enat()
    config = SamplerConfig(num_steps=num_steps)
    codes, trajectory = sample(model, torch.tensor([0, 1, 5]), config, seeds=[1, 2, 3], return_trajectory=True)
    assert codes.shape == (3, 16)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < model.config.codebook_size
    assert len(trajectory) == num_steps
    assert (trajectory[0] == model.config.mask_id).all()
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        visible = tokens != model.config.mask_id
        assert torch.equal(following[visible], tokens[visible])
        assert ((~visible).sum(dim=1) == config.num_masked_at(step, 16)).all()


def test_the_published_numbers_of_masked_tokens():
    model = small_enat(grid_size=16, encoder_layers=1, decoder_layers=1)
    codes, trajectory = sample(model, torch.tensor([0]), SamplerConfig(), seeds=[0], return_trajectory=True)
    counts = [int((tokens == model.config.mask_id).sum()) for tokens in [*trajectory, codes]]
    assert counts == [256, 251, 236, 212, 181, 142, 97, 49, 0]


def test_an_image_depends_on_its_seed_and_label_only():
    model = small_enat()
    labels, seeds = torch.tensor([0, 1, 2, 3, 4, 5, 0]), [7, 2**40, 0, 3, -5, 2, 8]
    together = sample(model, labels, SamplerConfig(), seeds=seeds)
    alone = [sample(model, labels[i : i + 1], SamplerConfig(), seeds=[seeds[i]])[0] for i in range(7)]
    assert torch.equal(together, torch.stack(alone))
    order = [4, 2, 6, 0, 1, 5, 3]
    assert torch.equal(sample(model, labels[order], SamplerConfig(), seeds=[seeds[i] for i in order]), together[order])
    assert not torch.equal(together[0], together[6])  # one label, two seeds
    assert not torch.equal(together[0], sample(model, torch.tensor([1]), SamplerConfig(), seeds=[7])[0])


def test_the_global_generator_is_neither_read_nor_moved():
    model, labels = small_enat(), torch.tensor([0, 1])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(model, labels, SamplerConfig(), seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sample(model, labels, SamplerConfig(), seeds=[1, 2]), first)


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({"guidance_scale": 1.0}, [3, 3, 3, 3]),
        ({"guidance_scale": 3.5}, [3, 6, 6, 6]),  # the ramp starts unguided, where an unconditional pass leaves nothing to reuse
        ({"guidance_scale": 3.5, "guidance_schedule": "constant"}, [6, 6, 6, 6]),
    ],
    ids=str,
)
def test_unconditional_passes_run_where_they_count(settings, batches):
    model = small_enat()
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    sample(model, torch.arange(3), SamplerConfig(num_steps=4, **settings), seeds=range(3))
    assert seen == batches


def test_features_of_masked_tokens_need_both_passes_from_the_first_step():
    model = small_enat(reused_features="masked")
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append((len(arguments[0]), arguments[2] is not None)))
    sample(model, torch.arange(3), SamplerConfig(num_steps=3), seeds=range(3))
    sample(model, torch.arange(3), SamplerConfig(num_steps=3, reuse=False), seeds=range(3))
    assert seen == [(6, False), (6, True), (6, True), (3, False), (6, False), (6, False)]


def test_an_unconditional_model_has_nothing_to_be_guided_away_from():
    model = small_enat(num_classes=0)
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    guided, unguided = (
        sample(model, torch.zeros(3, dtype=torch.int64), SamplerConfig(guidance_scale=scale), seeds=range(3))
        for scale in (3.5, 1.0)
    )
    assert torch.equal(guided, unguided)
    assert set(seen) == {3}


def test_an_image_depends_on_its_seed_and_caption_only():
    model, seeds = small_enat(**TEXT), [7, 1, 0, 3]
    text = captions(model.config, 4)
    together = sample(model, text, SamplerConfig(), seeds=seeds)
    alone = [sample(model, text[i : i + 1], SamplerConfig(), seeds=[seeds[i]])[0] for i in range(4)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], sample(model, text[1:2], SamplerConfig(), seeds=seeds[:1])[0])


def test_captions_are_guided_away_from_the_empty_one():
    model = small_enat(**TEXT)
    text, config = captions(model.config, 4), SamplerConfig(guidance_scale=1.0)
    codes, guided = (sample(model, text, c, seeds=range(4)) for c in (config, SamplerConfig()))
    model.set_null_caption(torch.zeros(3, 12), torch.ones(12))
    assert torch.equal(sample(model, text, config, seeds=range(4)), codes)
    assert not torch.equal(sample(model, text, SamplerConfig(), seeds=range(4)), guided)


def test_guidance_scale_1_is_the_conditional_model():
    model, labels = small_enat(), torch.arange(4)
    config = SamplerConfig(guidance_scale=1.0)
    codes, guided = (sample(model, labels, c, seeds=range(4)) for c in (config, SamplerConfig()))
    with torch.no_grad():
        model.label_embedding.weight[model.config.null_label] += 3.0
    assert torch.equal(sample(model, labels, config, seeds=range(4)), codes)
    assert not torch.equal(sample(model, labels, SamplerConfig(), seeds=range(4)), guided)


def test_temperature_0_takes_the_most_likely_code():
    model, labels = small_enat(), torch.arange(5)
    config = SamplerConfig(sampling_temperature=0.0)
    _, trajectory = sample(model, labels, config, seeds=range(5), return_trajectory=True)
    with torch.no_grad():
        best = model(trajectory[0], labels).logits.argmax(dim=-1)  # the first step is unguided
    revealed = trajectory[1] != model.config.mask_id
    assert torch.equal(trajectory[1][revealed], best[revealed])


def test_temperature_0_is_an_argmax_and_no_low_temperature():
    """One code is a little more likely than all others, by less than any temperature could tell."""
    model = small_enat()
    with torch.no_grad():
        model.head.norm_out.weight.zero_()
        model.head.norm_out.bias.zero_()
        model.head.bias.zero_()
        model.head.bias[17] = 1e-5
    assert (sample(model, torch.arange(4), SamplerConfig(sampling_temperature=0.0), seeds=range(4)) == 17).all()


def test_without_any_temperature_seeds_do_not_matter():
    model, labels = small_enat(), torch.arange(4)
    config = SamplerConfig(**GREEDY)
    assert torch.equal(sample(model, labels, config, seeds=range(4)), sample(model, labels, config, seeds=range(4, 8)))


def test_codes_and_positions_are_drawn_from_their_distributions():
    """Noise beyond all confidence makes the choice of positions uniform and independent of the codes drawn there."""
    model, count = small_enat(), 4000
    config = SamplerConfig(num_steps=2, sampling_temperature=3.0, remask_temperature=1e6)
    _, trajectory = sample(model, torch.zeros(count, dtype=torch.int64), config, seeds=range(count), return_trajectory=True)
    revealed = trajectory[1] != model.config.mask_id
    share = (16 - 11) / 16  # floor(16 cos(pi / 4)) = 11 stay masked
    assert (revealed.double().mean(dim=0) - share).abs().max() < 4 * (share * (1 - share) / count) ** 0.5

    probs = (plain.forward(model, trajectory[0][0], 0).logits.double() / 1.5).softmax(dim=-1)  # half way: 3.0 / 2
    drawn = torch.zeros_like(probs)
    for position in range(16):
        drawn[position] = torch.bincount(trajectory[1][revealed[:, position], position], minlength=24)
    num_drawn = drawn.sum(dim=1, keepdim=True)
    deviation = (drawn - num_drawn * probs) / (num_drawn * probs * (1 - probs)).sqrt()
    assert deviation.abs().max() < 5
    assert deviation.std().item() == pytest.approx(1, abs=0.15)


def test_reuse_starts_to_act_at_the_third_step():
    """Nothing is visible in the first step, so the second has nothing to reuse: its result is still the same."""
    model, labels = small_enat(), torch.arange(4)
    (codes, trajectory), (fresh_codes, fresh) = (
        sample(model, labels, SamplerConfig(reuse=reuse), seeds=range(4), return_trajectory=True) for reuse in (True, False)
    )
    assert all(torch.equal(trajectory[step], fresh[step]) for step in range(3))
    assert not torch.equal(codes, fresh_codes)


def test_a_model_without_reuse_ignores_the_setting():
    model, labels = small_enat(reuse=False), torch.arange(4)
    with_reuse, without = (sample(model, labels, SamplerConfig(reuse=reuse), seeds=range(4)) for reuse in (True, False))
    assert torch.equal(with_reuse, without)


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([0, 1], [1], "1 seeds for 2 labels"),
        ([], [], "labels is empty"),
        ([0, 6], [1, 2], "labels range from 0 to 6; .* 0 to 5"),
        ([-1, 0], [1, 2], "labels range from -1 to 0"),
    ],
)
def test_wrong_requests_are_refused(labels, seeds, message):
    with pytest.raises(ValueError, match=message):
        sample(small_enat(), torch.tensor(labels), SamplerConfig(), seeds=seeds)


def test_conditions_that_do_not_fit_the_model_are_refused():
    model = small_enat(**TEXT)
    text = captions(model.config, 2)
    with pytest.raises(ValueError, match="takes a TextCondition, not labels"):
        sample(model, torch.tensor([0, 0]), SamplerConfig(), seeds=[1, 2])
    with pytest.raises(ValueError, match="takes labels, not a TextCondition"):
        sample(small_enat(), text, SamplerConfig(), seeds=[1, 2])
    with pytest.raises(ValueError, match="3 seeds for 2 labels"):
        sample(model, text, SamplerConfig(), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="labels range from 1 to 1"):
        sample(small_enat(num_classes=0), torch.tensor([1]), SamplerConfig(), seeds=[1])


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        sample(small_enat().train(), torch.tensor([0]), SamplerConfig(), seeds=[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"sampling_temperature": float("nan")}, "sampling_temperature is nan"),
        ({"remask_temperature": float("inf")}, "remask_temperature is inf"),
        ({"mask_schedule": "sine"}, "choose one of cosine"),
        ({"guidance_schedule": "cosine"}, "choose one of linear, constant"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)
