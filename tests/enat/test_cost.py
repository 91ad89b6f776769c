"""Cost: the published numbers, and the MACs that torch counts while the code runs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from enat.config import DECODER_ATTENTIONS, ENATConfig, MaskingConfig
from enat.cost import (
    decoder_macs,
    encoder_macs,
    generation_cost,
    mean_cost,
    mean_training_macs,
    num_parameters,
    num_vqgan_parameters,
    training_macs,
)
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from enat.tokenizer import VQGAN, VQGANConfig
from enat.training.loss import objective
from enat.training.masking import MaskedCodes, mask_codes
from material.small_models import ARCHITECTURES, TEXT, conditions, nested_tokens, pairwise_cases, small_config, small_enat

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


@pytest.mark.parametrize(("preset", "encoder", "decoder"), [("vqgan-256", 64.3, 93.3), ("vqgan-512", 257.3, 373.1)])
def test_published_costs_of_the_tokenizer(preset, encoder, decoder):
    config = VQGANConfig.preset(preset)
    assert encoder_macs(config) / 1e9 == pytest.approx(encoder, abs=0.05)
    assert decoder_macs(config) / 1e9 == pytest.approx(decoder, abs=0.05)


def test_variants_differ_as_published():
    """By decoder attention; and reuse of visible tokens saves most, whereas the plain stack costs most."""
    self_cross, cross, full, fresh, masked, both = (
        gmacs(ENATConfig.preset("enat-s", **overrides))
        for overrides in (
            *({"decoder_attention": kind} for kind in ("self_cross", "cross", "full")),
            {"reuse": False},
            *({"reused_features": kind} for kind in ("masked", "all")),
        )
    )
    assert (full - self_cross, cross - self_cross) == pytest.approx((1.9, -1.2), abs=0.3)
    assert self_cross < both < fresh < masked < gmacs(ENATConfig.preset("nat-s"))


def test_guidance_adds_as_many_macs_and_the_tokenizer_its_decoder():
    """Executed: as many except for the first step, which the ramp leaves unguided but for the condition."""
    config, tokenizer = ENATConfig.preset("enat-s"), VQGANConfig.preset("vqgan-256")
    one, guided = generation_cost(config, ONE_PASS), generation_cost(config, SamplerConfig(), tokenizer)
    assert guided.macs_per_step == tuple(2 * macs for macs in one.macs_per_step)
    assert guided.one_pass_macs == guided.guidance_macs == one.transformer_macs == one.one_pass_macs
    assert guided.executed_one_pass_macs == one.executed_transformer_macs
    of_condition = 8 * config.embed_dim**2 * (config.encoder_layers + config.decoder_layers)
    first_step = one.executed_macs_per_step[0] - of_condition
    assert guided.executed_guidance_macs == one.executed_transformer_macs - first_step > 0
    assert one.guidance_macs == one.executed_guidance_macs == one.decoder_macs == 0
    assert guided.decoder_macs == decoder_macs(tokenizer)
    assert guided.total_macs == 2 * one.transformer_macs + decoder_macs(tokenizer)
    assert guided.executed_total_macs == sum(guided.executed_macs_per_step) + decoder_macs(tokenizer)
    lists = {"num_steps": 3, "mask_ratios": (0.9, 0.5, 0.0)}
    one, guided = (generation_cost(config, SamplerConfig(guidance_scales=s, **lists)) for s in ((1, 1, 1), (1, 1, 2)))
    assert guided.macs_per_step == tuple(2 * macs for macs in one.macs_per_step)
    unconditional = ENATConfig.preset("enat-s", num_classes=0)
    assert generation_cost(unconditional, SamplerConfig()) == generation_cost(unconditional, ONE_PASS)
    with pytest.raises(ValueError, match="num_given is 256; of 256 tokens 0 to 255 can be given"):
        generation_cost(config, ONE_PASS, num_given=256)


class Products(TorchDispatchMode):
    """Counts by the formulas of torch's FlopCounterMode, without its table of modules, which takes most of its time."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        return made


def counted_macs_per_call(model, run):
    """MACs of each forward pass of the model inside run(), as torch counts them."""
    totals, local = [], model.forward_local

    def forward_local(*arguments, **options):
        output = local(*arguments, **options)
        totals.append(counter.flops)
        return output

    model.forward_local = forward_local  # of which hooks know nothing
    # The counter knows the products of plain attention, not the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), Products() as counter:
        handle = model.register_forward_hook(lambda *_: totals.append(counter.flops))
        run()
        handle.remove()
        assert counter.flops == totals[-1]  # nothing outside the model multiplies
    return tuple((after - before) / 2 for before, after in zip([0, *totals], totals, strict=False))


SETTINGS = [
    {},
    {"reuse": False},
    {"guidance_scale": 1.0, "reveal_order": "halton", "remask_temperature": 0.0},
    {"guidance_schedule": "constant", "top_k": 3, "top_p": 0.9, "mask_schedule": "square_root"},
    {"guidance_scales": (1.0, 1.0, 2.0, 3.0, 1.0, 1.0), "mask_ratios": (0.9, 0.8, 0.5, 0.2, 0.1, 0.0)},
    {"guidance_scales": (1.0, 1.0, 2.0, 1.0, 1.0, 1.0), "reuse": False},
    {"mask_schedule": "arccos", "guidance_schedule": "power_cosine", "guidance_power": 2.0},
    {"guidance_interval": (0.4, 0.7), "remask_ratio": 0.0},
    {"remask_ratio": 0.4, "reuse": False},
]
_PLAIN = {"encoder_layers": 0, "decoder_layers": 4, "decoder_attention": "full", "reuse": False}
GUIDES = [
    ({**architecture, **more}, {"guide_layers": 1, "guidance_schedule": "constant", **options}, given)
    for architecture in (_PLAIN, *({"decoder_attention": kind} for kind in DECODER_ATTENTIONS), {"reused_features": "all"})
    for more, options, given in (({}, {}, 0), (TEXT, {"num_steps": 20}, 7), ({"num_classes": 0}, {"reuse": False}, 0))
]
LOCAL_STEPS = [
    ({**_PLAIN, **more}, {"num_steps": 8, "local_steps": 2, **options}, given)
    for more, options, given in (
        ({}, {}, 0),
        (TEXT, {"local_tokens": "masked", "guidance_interval": (0.3, 0.5)}, 0),
        ({}, {"guidance_scale": 1.0, "local_start": 3}, 7),
        (TEXT, {"guide_layers": 3, "num_steps": 30, "local_steps": 4}, 0),
        ({"num_classes": 0, "qk_norm": True}, {"guide_layers": 1, "guidance_schedule": "constant"}, 0),
    )
]
OTHER_SIZES = {"encoder_layers": 3, "decoder_layers": 1, "embed_dim": 48, "grid_size": 5, "mlp_ratio": 2}


@pytest.mark.parametrize(
    ("architecture", "settings", "num_given"),
    [
        pytest.param({**a, **b, **c, **d}, settings, given, marks=pytest.mark.slow if place % 4 else ())
        for place, (a, b, c, d, settings, given) in enumerate(pairwise_cases(*ARCHITECTURES, SETTINGS, [0, 1, 11, 15]))
    ]
    + [(OTHER_SIZES, {}, 9), *LOCAL_STEPS]
    + [pytest.param(*case, marks=pytest.mark.slow if place % 4 else ()) for place, case in enumerate(GUIDES)]
    + [({}, {"remask_ratio": 0.4}, 0), ({"decoder_attention": "full"}, {"remask_ratio": 0.2}, 5)]
    + [({"grid_size": 2, "decoder_attention": kind}, {}, 0) for kind in DECODER_ATTENTIONS],  # the last step finds nothing masked
    ids=str,
)
def test_executed_macs_are_those_of_a_run_of_the_sampler(architecture, settings, num_given):
    model = ENAT(small_config(**architecture)).eval().requires_grad_(False)
    config = SamplerConfig(**{"num_steps": 8 if model.config.grid_size == 2 else 6, **settings})
    (start,) = nested_tokens(model.config, [model.config.num_tokens - num_given], num_images=1)
    counted = counted_macs_per_call(model, lambda: sample(model, conditions(model, 1), config, seeds=[0], start=start))
    expected = generation_cost(model.config, config, num_given=num_given).executed_macs_per_step
    assert counted == tuple(macs for macs in expected if macs or not config.local_steps)  # which are left out where nothing is left


@pytest.mark.parametrize(
    ("architecture", "of_guide", "settings"),
    [
        ({}, {"encoder_layers": 1, "embed_dim": 16}, {}),
        ({}, {"reuse": False}, {"guidance_schedule": "constant"}),
        ({"reuse": False}, {}, {"guidance_scale": 1.0}),
        ({"num_classes": 0}, {"num_classes": 0, "embed_dim": 48}, {"guidance_interval": (0.3, 0.8)}),
        (_PLAIN, {**_PLAIN, "decoder_layers": 2}, {"local_steps": 2, "guidance_scales": (1.0, 1.0, 2.0, 1.0, 1.0, 1.0)}),
    ],
    ids=str,
)
def test_executed_macs_with_a_guide_are_those_of_both_models(architecture, of_guide, settings):
    model, guide = small_enat(**architecture), small_enat(**of_guide)
    config = SamplerConfig(**{"num_steps": 6, **settings})
    with sdpa_kernel(SDPBackend.MATH), Products() as counter:
        sample(model, conditions(model, 1), config, seeds=[0], guide=guide)
    cost = generation_cost(model.config, config, guide=guide.config)
    assert counter.flops == 2 * cost.executed_transformer_macs
    alone = generation_cost(model.config, config.unguided())
    assert cost.one_pass_macs == alone.one_pass_macs and (cost.guidance_macs > 0) == config.is_guided
    if of_guide == architecture:
        assert cost.macs_per_step == generation_cost(model.config, config).macs_per_step


BOUNDED = {"num_steps": 6, "entropy_bound": 3.0}


_OF_BOUNDS = [{}, {"reuse": False}, {"guidance_scale": 1.0}, {"guide_layers": 1}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options", "num_given"),
    [({**a, **b, **c, **d}, s, given) for a, b, c, d, s, given in pairwise_cases(*ARCHITECTURES, _OF_BOUNDS, [0, 5])],
    ids=str,
)
def test_executed_macs_of_an_entropy_bound_are_those_of_each_image(architecture, options, num_given):
    """And no image costs more than the upper bound."""
    model, config = small_enat(**architecture), SamplerConfig(**BOUNDED, **options)
    costs = []
    for seed in range(3):
        (start,) = nested_tokens(model.config, [16 - num_given], num_images=1, seed=seed)
        made = {}

        def run(made=made, start=start, seed=seed):
            made["states"] = sample(model, conditions(model, 1), config, seeds=[seed], start=start, return_trajectory=True)[1]

        counted = counted_macs_per_call(model, run)
        num_masked = [int((state == model.config.mask_id).sum()) for state in made["states"]]
        cost = generation_cost(model.config, config, num_given=num_given, num_masked=num_masked)
        assert counted == tuple(macs for macs in cost.executed_macs_per_step if macs)
        costs.append(cost)
    most = generation_cost(model.config, config, num_given=num_given)
    assert all(cost.executed_total_macs <= most.executed_total_macs for cost in costs)
    mean = mean_cost(costs, [1, 2, 1])
    assert mean.executed_total_macs == pytest.approx(np.average([c.executed_total_macs for c in costs], weights=[1, 2, 1]), abs=6)
    assert mean.total_macs == sum(mean.macs_per_step)


@pytest.mark.parametrize("architecture", [{}, {"reuse": False}, {"encoder_layers": 0}, {"reused_features": "all"}], ids=str)
@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.0}, {"guidance_scales": (1.0, 2.0, 1.0, 1.0)}, {"guide_layers": 1}], ids=str
)
def test_upper_bound_is_the_most_that_any_image_costs(architecture, options):
    """Of all ways to reveal 9 tokens in at most 4 steps."""
    model, config = small_config(grid_size=3, **architecture), SamplerConfig(num_steps=4, entropy_bound=1.0, **options)
    ways = [(9, *falling, *[0] * (3 - len(falling))) for k in range(4) for falling in combinations(range(8, 0, -1), k)]
    costs = [generation_cost(model, config, num_masked=way).executed_total_macs for way in ways]
    assert generation_cost(model, config).executed_total_macs == max(costs) > min(costs)


def test_local_steps_cost_less_and_the_published_ones_are_counted():
    """At 8 full and 8 alternating steps, nat-s at 256 px: a local step computes its group in every layer, and the head for it."""
    config, full = ENATConfig.preset("nat-s"), SamplerConfig(num_steps=16, guidance_scale=1.0, reuse=False)
    local = full.replaced(local_steps=1, local_start=8)
    steps, cheap = generation_cost(config, full), generation_cost(config, local)
    assert cheap.macs_per_step[:9] == steps.macs_per_step[:9] and cheap.macs_per_step[10] == steps.macs_per_step[10]
    dim, group = config.embed_dim, local.num_computed_at(9, 256)
    assert group == local.num_masked_at(8, 256) - local.num_masked_at(10, 256)
    per_layer = 12 * dim * dim * group + 2 * dim * group * 256 + 6 * dim * dim
    assert cheap.macs_per_step[9] == 16 * per_layer + group * dim * (dim + 1025)
    assert cheap.total_macs < 0.8 * steps.total_macs


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        *(small_config(decoder_attention=kind) for kind in DECODER_ATTENTIONS),
        *(pytest.param(ENATConfig.preset(name), marks=pytest.mark.slow) for name in ("enat-s", "enat-l")),
    ],
    ids=str,
)
def test_published_macs_are_those_of_one_forward_pass_a_step(config, reuse):
    """On tensors without values, where a full-sized model costs nothing to count."""
    sampler = SamplerConfig(guidance_scale=1.0, reuse=reuse)
    counts = [sampler.num_masked_at(step, config.num_tokens) for step in range(8)]
    with torch.device("meta"):
        model = ENAT(config).eval().requires_grad_(False)
        tokens, labels = torch.zeros(1, config.num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def run(previous=None):
        for num_masked in counts:
            previous = model(tokens, labels, previous if reuse else None, num_masked=num_masked)

    mask_column = config.num_tokens * config.embed_dim  # the published head also scores the mask id, and cuts it off
    expected = generation_cost(config, sampler).macs_per_step
    assert tuple(macs + mask_column for macs in counted_macs_per_call(model, run)) == expected


MASKS = [(12, None), (7, 13), (7, 16), (7, 7), (1, 1), (15, 16)]


@pytest.mark.parametrize(
    ("architecture", "masks"),
    [
        pytest.param({**a, **b, **c, **d}, masks, marks=pytest.mark.slow if place % 3 else ())
        for place, (a, b, c, d, masks) in enumerate(pairwise_cases(*ARCHITECTURES, MASKS))
    ],
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
    with sdpa_kernel(SDPBackend.MATH), Products() as counter:
        objective(model, teacher, codes, conditions(model, 1), masked, z_loss=1e-4)[0].backward()
    assert counter.flops == 2 * training_macs(model.config, num_masked, previous_num_masked)


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
def test_tokenizer_macs_equal_the_counted_ones(config):
    with torch.device("meta"):
        vqgan, images = VQGAN(config), torch.zeros(1, 3, config.resolution, config.resolution)
    with FlopCounterMode(display=False) as counter:
        latents = vqgan.encode_latents(images)
    assert counter.get_total_flops() == 2 * encoder_macs(config)
    with FlopCounterMode(display=False) as counter:
        vqgan.decode_latents(latents)
    assert counter.get_total_flops() == 2 * decoder_macs(config)


@pytest.mark.parametrize("masking", [MaskingConfig(), MaskingConfig(alpha=2, beta=5, reuse_probability=0.9)])
@pytest.mark.parametrize("architecture", [{}, {"reused_features": "all"}, {"reuse": False}])
def test_mean_training_macs_are_those_of_many_draws(masking, architecture):
    config = small_config(grid_size=8, **architecture)
    rng = np.random.default_rng(0)
    macs = []
    for _ in range(4000):
        drawn = mask_codes(torch.zeros(1, config.num_tokens, dtype=torch.int64), config.mask_id, masking, rng)
        is_reuse = drawn.previous_tokens is not None and config.reuse
        macs.append(training_macs(config, drawn.num_masked, drawn.previous_num_masked if is_reuse else None))
    assert mean_training_macs(config, masking) == pytest.approx(np.mean(macs), abs=4 * np.std(macs) / 4000**0.5, rel=1e-3)


@pytest.mark.parametrize(
    "architecture",
    [
        *({**a, **b, **c, **d} for a, b, c, d in pairwise_cases(*ARCHITECTURES)),
        {"mlp_ratio": 2},
    ],
    ids=str,
)
def test_parameters_are_counted_without_a_model(architecture):
    config = small_config(**architecture)
    assert num_parameters(config) == sum(parameter.numel() for parameter in ENAT(config).parameters())


@pytest.mark.parametrize("preset", ["vqgan-small", "vqgan-256"])
def test_parameters_of_a_tokenizer_are_those_of_its_convolutions_and_codes(preset):
    config = VQGANConfig.preset(preset)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in VQGAN(config).parameters())
    assert num_vqgan_parameters(config) == pytest.approx(counted, rel=0.01) and num_vqgan_parameters(config) <= counted
