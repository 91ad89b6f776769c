"""Cost: the published numbers, and the MACs that torch counts while the code runs."""

import pytest
import torch
from small_models import ARCHITECTURES, TEXT, conditions, nested_tokens, pairwise_cases, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from enat.config import ENATConfig
from enat.cost import decoder_macs, encoder_macs, generation_cost, head_macs, step_macs, training_macs
from enat.loss import objective
from enat.masking import MaskedCodes
from enat.model import ENAT
from enat.sampler import sample
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGAN, VQGANConfig

ONE_PASS = SamplerConfig(guidance_scale=1.0)


def gmacs(config, sampler=ONE_PASS):
    return generation_cost(config, sampler).transformer_macs / 1e9


@pytest.mark.parametrize(
    ("preset", "overrides", "sampler", "expected"),
    [
        ("enat-s", {}, ONE_PASS, 21.3),
        ("enat-b", {}, ONE_PASS, 46.6),
        ("enat-l", {}, ONE_PASS, 126.9),
        ("enat-xl", {}, ONE_PASS, 219.1),
        ("enat-l", {}, SamplerConfig(guidance_scale=1.0, reuse=False), 222.4),
        ("enat-l", {"grid_size": 32}, ONE_PASS, 533.6),
    ],
)
def test_published_costs_of_the_transformer(preset, overrides, sampler, expected):
    assert gmacs(ENATConfig.preset(preset, **overrides), sampler) == pytest.approx(expected, rel=0.002)


def test_decoder_attentions_differ_as_published():
    self_cross, cross, full = (
        gmacs(ENATConfig.preset("enat-s", decoder_attention=kind)) for kind in ("self_cross", "cross", "full")
    )
    assert full - self_cross == pytest.approx(1.9, abs=0.3)
    assert cross - self_cross == pytest.approx(-1.2, abs=0.3)


@pytest.mark.parametrize(("preset", "encoder", "decoder"), [("vqgan-256", 64.3, 93.3), ("vqgan-512", 257.3, 373.1)])
def test_published_costs_of_the_tokenizer(preset, encoder, decoder):
    config = VQGANConfig.preset(preset)
    assert encoder_macs(config) / 1e9 == pytest.approx(encoder, abs=0.05)
    assert decoder_macs(config) / 1e9 == pytest.approx(decoder, abs=0.05)


def test_guidance_doubles_and_the_tokenizer_adds():
    config, tokenizer = ENATConfig.preset("enat-s"), VQGANConfig.preset("vqgan-256")
    one, guided = generation_cost(config, ONE_PASS), generation_cost(config, SamplerConfig(), tokenizer)
    assert guided.macs_per_step == tuple(2 * macs for macs in one.macs_per_step)
    assert guided.decoder_macs == decoder_macs(tokenizer)
    assert guided.total_macs == 2 * one.transformer_macs + decoder_macs(tokenizer)
    assert guided.executed_total_macs == sum(guided.executed_macs_per_step) + decoder_macs(tokenizer)
    assert one.decoder_macs == 0
    assert guided.executed_transformer_macs < guided.transformer_macs


def test_what_guidance_adds_is_told_apart():
    """Published: as much again. Executed: as much again but for the first step, which the ramp leaves unguided."""
    config = ENATConfig.preset("enat-s")
    one, guided = generation_cost(config, ONE_PASS), generation_cost(config, SamplerConfig())
    assert guided.one_pass_macs == guided.guidance_macs == one.transformer_macs == one.one_pass_macs
    assert guided.executed_one_pass_macs == one.executed_transformer_macs
    assert guided.executed_guidance_macs == one.executed_transformer_macs - one.executed_macs_per_step[0] > 0
    assert one.guidance_macs == one.executed_guidance_macs == 0


def counted_macs_per_call(model, run):
    """MACs of each forward pass of the model inside run(), as torch counts them."""
    totals = []
    # The counter knows the products of plain attention, not the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        handle = model.register_forward_hook(lambda *_: totals.append(counter.get_total_flops()))
        run()
        handle.remove()
        assert counter.get_total_flops() == totals[-1]  # nothing outside the model multiplies
    return tuple((after - before) / 2 for before, after in zip([0, *totals], totals, strict=False))


SETTINGS = [
    {},
    {"reuse": False},
    {"guidance_scale": 1.0, "reveal_order": "halton", "remask_temperature": 0.0},
    {"guidance_schedule": "constant", "top_k": 3, "top_p": 0.9, "mask_schedule": "square_root"},
    {"guidance_scales": (1.0, 1.0, 2.0, 3.0, 1.0, 1.0), "mask_ratios": (0.9, 0.8, 0.5, 0.2, 0.1, 0.0)},
    {"guidance_scales": (1.0, 1.0, 2.0, 1.0, 1.0, 1.0), "reuse": False},
    {"mask_schedule": "arccos", "guidance_schedule": "power_cosine", "guidance_power": 2.0},
]
OTHER_SIZES = {"encoder_layers": 3, "decoder_layers": 1, "embed_dim": 48, "grid_size": 5, "mlp_ratio": 2}


@pytest.mark.parametrize(
    ("architecture", "settings", "num_given"),
    [
        ({**a, **b, **c, **d}, settings, given)
        for a, b, c, d, settings, given in pairwise_cases(*ARCHITECTURES, SETTINGS, [0, 1, 11, 15])
    ]
    + [(OTHER_SIZES, {}, 0), (OTHER_SIZES, {}, 9)],
    ids=str,
)
def test_executed_macs_are_those_of_a_run_of_the_sampler(architecture, settings, num_given):
    model = ENAT(small_config(**architecture)).eval().requires_grad_(False)
    config = SamplerConfig(num_steps=6, **settings)
    (start,) = nested_tokens(model.config, [model.config.num_tokens - num_given], num_images=1)
    counted = counted_macs_per_call(model, lambda: sample(model, conditions(model, 1), config, seeds=[0], start=start))
    assert counted == generation_cost(model.config, config, num_given=num_given).executed_macs_per_step


def test_given_tokens_are_encoded_once():
    config, fresh = ENATConfig.preset("enat-s"), SamplerConfig(guidance_scale=1.0, reuse=False)
    for num_given in (64, 128, 255):
        saved = [generation_cost(config, sampler, num_given=num_given).macs_per_step for sampler in (fresh, ONE_PASS)]
        assert saved[0][0] == saved[1][0]
        assert all(without > 1.5 * with_reuse for without, with_reuse in list(zip(*saved, strict=True))[1:])
    with pytest.raises(ValueError, match="num_given is 256; of 256 tokens 0 to 255 can be given"):
        generation_cost(config, ONE_PASS, num_given=256)


def test_lists_of_guidance_scales_decide_on_published_passes():
    config, lists = ENATConfig.preset("enat-s"), {"num_steps": 3, "mask_ratios": (0.9, 0.5, 0.0)}
    one, guided = (generation_cost(config, SamplerConfig(guidance_scales=s, **lists)) for s in ((1, 1, 1), (1, 1, 2)))
    assert guided.macs_per_step == tuple(2 * macs for macs in one.macs_per_step)
    assert guided.executed_macs_per_step[0] == one.executed_macs_per_step[0]


@pytest.mark.parametrize("decoder_attention", ["self_cross", "cross", "full"])
@pytest.mark.parametrize("extension", [{}, {"reused_features": "all", **TEXT}], ids=str)
def test_executed_macs_of_steps_that_find_nothing_masked(decoder_attention, extension):
    model = ENAT(small_config(grid_size=2, decoder_attention=decoder_attention, **extension)).eval().requires_grad_(False)
    config = SamplerConfig(num_steps=8)
    assert config.num_masked_at(7, 4) == 0
    counted = counted_macs_per_call(model, lambda: sample(model, conditions(model, 1), config, seeds=[0]))
    assert counted == generation_cost(model.config, config).executed_macs_per_step


def published_run(model, tokens_per_step, reuse, num_masked_per_step):
    labels = torch.zeros(len(tokens_per_step[0]), dtype=torch.int64, device=tokens_per_step[0].device)
    previous = None
    for tokens, num_masked in zip(tokens_per_step, num_masked_per_step, strict=True):
        previous = model(tokens, labels, previous if reuse else None, num_masked=num_masked)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("decoder_attention", ["self_cross", "full", "cross"])
def test_published_macs_are_those_of_one_forward_pass_a_step(decoder_attention, reuse):
    model = ENAT(small_config(decoder_attention=decoder_attention)).eval().requires_grad_(False)
    config = SamplerConfig(guidance_scale=1.0, reuse=reuse, num_steps=5)
    counts = [config.num_masked_at(step, 16) for step in range(5)]
    tokens = nested_tokens(model.config, counts, num_images=1)
    counted = counted_macs_per_call(model, lambda: published_run(model, tokens, reuse, counts))
    mask_column = 16 * model.config.embed_dim  # the published head also scores the mask id, and cuts it off
    assert tuple(macs + mask_column for macs in counted) == generation_cost(model.config, config).macs_per_step


def test_reusing_visible_tokens_saves_and_the_plain_stack_costs_most():
    enat, nat = gmacs(ENATConfig.preset("enat-s")), gmacs(ENATConfig.preset("nat-s"))
    fresh, masked, both = (
        gmacs(ENATConfig.preset("enat-s", **overrides))
        for overrides in ({"reuse": False}, {"reused_features": "masked"}, {"reused_features": "all"})
    )
    assert enat < both < fresh < masked < nat


def test_an_unconditional_model_is_never_guided():
    config = ENATConfig.preset("enat-s", num_classes=0)
    assert generation_cost(config, SamplerConfig()) == generation_cost(config, ONE_PASS)


MASKS = [(12, None), (7, 13), (7, 16), (7, 7), (1, 1), (15, 16)]


@pytest.mark.parametrize(
    ("architecture", "masks"),
    [({**a, **b, **c, **d}, masks) for a, b, c, d, masks in pairwise_cases(*ARCHITECTURES, MASKS)],
    ids=str,
)
def test_training_macs_are_those_of_a_step_of_the_objective(architecture, masks):
    num_masked, previous_num_masked = masks
    model, teacher = ENAT(small_config(**architecture)).train(), ENAT(small_config(**architecture)).eval()
    if previous_num_masked is not None and not model.config.reuse:
        with pytest.raises(ValueError, match="reuse=False"):
            training_macs(model.config, num_masked, previous_num_masked)
        previous_num_masked = None
    codes, before, now = nested_tokens(model.config, [0, previous_num_masked or 16, num_masked], num_images=1)
    masked = MaskedCodes(now, num_masked, before if previous_num_masked is not None else None, previous_num_masked or 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(model, teacher, codes, conditions(model, 1), masked, z_loss=1e-4)[0].backward()
    assert counter.get_total_flops() == 2 * training_macs(model.config, num_masked, previous_num_masked)


@pytest.mark.parametrize("preset", ["enat-s", "enat-l", "nat-s"])
def test_a_training_step_is_nearly_three_forward_passes(preset):
    config = ENATConfig.preset(preset)
    forward = step_macs(config, 205) + head_macs(config, 205, config.codebook_size)
    assert training_macs(config, 205) / forward == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("preset", ["enat-s", "enat-l"])
def test_published_macs_of_a_published_size(preset):
    """On tensors without values: a full-sized model costs nothing to count."""
    with torch.device("meta"):
        model = ENAT(ENATConfig.preset(preset)).eval().requires_grad_(False)
        tokens = [torch.zeros(1, 256, dtype=torch.int64)] * 8
    counts = [ONE_PASS.num_masked_at(step, 256) for step in range(8)]
    counted = counted_macs_per_call(model, lambda: published_run(model, tokens, True, counts))
    assert sum(counted) + 8 * 256 * model.config.embed_dim == generation_cost(model.config, ONE_PASS).transformer_macs


@pytest.mark.parametrize(
    "config",
    [
        VQGANConfig(),
        VQGANConfig.preset("vqgan-small"),
        VQGANConfig(base_channels=32, channel_multipliers=(2, 1, 3), num_res_blocks=3, latent_dim=7, resolution=24),
        VQGANConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, latent_dim=4, resolution=8),
    ],
    ids=str,
)
def test_tokenizer_macs_are_those_that_run(config):
    with torch.device("meta"):
        vqgan, images = VQGAN(config), torch.zeros(1, 3, config.resolution, config.resolution)
    with FlopCounterMode(display=False) as counter:
        latents = vqgan.encode_latents(images)
    assert counter.get_total_flops() == 2 * encoder_macs(config)
    with FlopCounterMode(display=False) as counter:
        vqgan.decode_latents(latents)
    assert counter.get_total_flops() == 2 * decoder_macs(config)
