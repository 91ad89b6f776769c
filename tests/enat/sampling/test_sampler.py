"""Sampling: equal to the published run and to a slow sampler, and what holds for every setting and every start.

Which settings are refused: test_sampler_config.py.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import decode_steps, sample
from enat.schedule import GUIDANCE_SCHEDULES, MASK_SCHEDULES, TEMPERATURE_SCHEDULES
from enat.training.masking import box_mask
from material.small_models import TEXT, captions, conditions, golden, golden_enat, small_config, small_enat
from references.slow_sampler import (
    BOUNDED,
    HALTON,
    LOCAL,
    MOMENT,
    PLAIN,
    RANDOM,
    REMASKED,
    SEARCHED,
    halton,
    reference_sample,
    some_start,
)

GREEDY = {"sampling_temperature": 0.0, "remask_temperature": 0.0}
MODEL = small_enat()
MASK_ID = MODEL.config.mask_id


def sampled(model=MODEL, labels=None, seeds=range(4), start=None, **options):
    """Codes of labels 0 to 3, unless others are given."""
    labels = torch.arange(4) if labels is None else labels
    return sample(model, labels, SamplerConfig(**options), seeds=seeds, start=start)


def test_greedy_run_equals_the_published_code():
    arrays = golden("enat_tiny")
    model, meta = golden_enat(arrays), arrays["meta"]
    # The published guidance strength s is w = 1 + s here.
    config = SamplerConfig(num_steps=meta["steps"], guidance_scale=1 + meta["cfg_scale"], **GREEDY)
    codes, trajectory = sample(model, arrays["labels"], config, seeds=range(len(arrays["labels"])), return_trajectory=True)
    assert torch.equal(torch.stack(trajectory), arrays["sample/inputs_per_step"])
    assert torch.equal(codes, arrays["sample/final_tokens"].flatten(1))


OPTIONS = [
    *({"mask_schedule": name} for name in MASK_SCHEDULES),
    *({"guidance_schedule": name} for name in GUIDANCE_SCHEDULES),
    {"guidance_schedule": "power_cosine", "guidance_power": 2.5, "guidance_scale": 6.0},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.5},
    {"sampling_temperature_schedule": "constant", "sampling_temperature": 0.8},
    {"sampling_temperature": 0.0},
    {"remask_temperature_schedule": "constant"},
    {"remask_temperature": 0.0},
    {"reuse": False},
    {"num_steps": 1},
    {"num_steps": 30},  # more steps than tokens: some reveal none, the last find nothing masked
    HALTON,
    RANDOM,
    {"top_k": 3},
    {"top_k": 24},  # all codes
    {"top_p": 0.7, "sampling_temperature": 1.0},
    {"top_k": 9, "top_p": 0.6},
    {"guidance_scales": (1.0, 1.0, 3.0, 1.0, 1.0), "num_steps": 5},  # guidance in an interval
    {"guidance_scales": (1.0, 1.0, 3.0, 1.0, 1.0), "num_steps": 5, "reuse": False},
    {**SEARCHED, "reuse": False, "top_p": 0.8},
    MOMENT,
    {**MOMENT, "num_steps": 5, "top_k": 5, "remask_temperature_schedule": "constant", "remask_temperature": 0.6},
    {**MOMENT, "sampling_temperature": 0.0},
    {**HALTON, "halton_shift": True},
    {"guidance_interval": (0.3, 0.8), "guidance_schedule": "constant"},
    {"guidance_interval": (0.3, 0.8), "reuse": False},
    REMASKED,
    {**REMASKED, "reuse": False},
    {**REMASKED, **RANDOM, "remask_ratio": 0.9},
    BOUNDED,
    {**BOUNDED, "reuse": False, "guidance_scales": (1.0, 1.0, 3.0, 1.0, 2.0, 1.0)},
    {**BOUNDED, **HALTON, "mask_schedule": "cosine", "entropy_bound": 0.0},
    {**BOUNDED, **MOMENT, "entropy_bound": 3.0, "top_k": 5},
    {"guide_layers": 1},
    {"guide_layers": 1, "guidance_schedule": "constant", "reuse": False},
    {"guide_layers": 1, "num_steps": 30, "guidance_interval": (0.2, 0.9)},
    {**BOUNDED, "guide_layers": 1},
    {**REMASKED, "guide_layers": 1},
]
ARCHITECTURES = [
    TEXT,
    {"num_classes": 0},
    {"reuse": False},
    {"decoder_attention": "cross"},
    {"decoder_attention": "full", **TEXT},
    {"encoder_layers": 0, "decoder_attention": "full", "reuse": False},
    {"reused_features": "masked"},
    {"num_classes": 0, "reused_features": "masked"},
    {"reused_features": "all", "qk_norm": True, **TEXT},
]
_OF_LOCAL_STEPS = [
    ({**PLAIN, **more}, {**LOCAL, **options}, given)
    for more, options, given in (
        ({}, {}, 0),
        ({}, {"guidance_scale": 1.0, "local_start": 3}, 7),
        (TEXT, {"local_tokens": "masked", "guidance_schedule": "linear"}, 0),
        ({"num_classes": 0, "qk_norm": True}, {"local_steps": 1, "guide_layers": 2}, 0),
        ({"qk_norm": True}, {"local_steps": 6, "guidance_interval": (0.2, 0.7)}, 0),
        (TEXT, {**RANDOM, "local_tokens": "masked"}, 7),
        ({}, {**HALTON, "num_steps": 20, "local_steps": 3}, 0),
        ({}, {**MOMENT, "num_steps": 20, "local_steps": 3, "local_tokens": "masked"}, 3),
    )
]
_OF_GUIDES = [
    ({**architecture, **more}, {"guide_layers": layers, "guidance_schedule": schedule, "reuse": "reuse" not in architecture})
    for architecture, layers in ((PLAIN, 2), ({"decoder_attention": "full"}, 1), ({"decoder_attention": "cross"}, 1))
    for more, schedule in (({}, "constant"), (TEXT, "linear"), ({"num_classes": 0}, "constant"))
]


_OF_OPTIONS = [({}, options) for options in OPTIONS]
_OF_ARCHITECTURES = [
    (architecture, options) for architecture in ARCHITECTURES for options in ({}, SEARCHED, {**HALTON, "guidance_scale": 1.0})
]


@pytest.mark.parametrize(
    ("architecture", "options", "num_given"),
    [pytest.param(*case, 0, marks=pytest.mark.slow if place % 2 else ()) for place, case in enumerate(_OF_OPTIONS)]
    + [pytest.param(*case, 0, marks=pytest.mark.slow if place % 4 else ()) for place, case in enumerate(_OF_GUIDES)]
    + [pytest.param(*case, marks=pytest.mark.slow if place % 2 else ()) for place, case in enumerate(_OF_LOCAL_STEPS)]
    + [pytest.param(*case, 7, marks=() if case[1] is SEARCHED else pytest.mark.slow) for case in _OF_ARCHITECTURES]
    + [pytest.param(*case, 7, marks=pytest.mark.slow) for case in (*_OF_OPTIONS, *_OF_GUIDES)[::2]]
    + [pytest.param(*case, 0, marks=pytest.mark.slow) for case in _OF_ARCHITECTURES[::3]],
    ids=str,
)
def test_sampler_equals_the_slow_one(architecture, options, num_given):
    model, config, seeds = small_enat(**architecture), SamplerConfig(**options), [5, 6, 2**40]
    labels, start = conditions(model), some_start(model.config, num_given)
    expected = reference_sample(model, labels, config, seeds, start)
    assert torch.equal(sample(model, labels, config, seeds=seeds, start=start), expected)
    if not num_given:
        assert torch.equal(sample(model, labels, config, seeds=seeds), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"reuse": False},
        {"sampling_temperature": 1.0},
        {"remask_temperature": 30.0},
        {"seeds": range(4, 8)},
        {"labels": torch.tensor([3, 3, 3, 5])},
        {"reveal_order": "moment"},
        {"guidance_interval": (0.0, 0.5)},
        {"remask_ratio": 0.2},
        {"entropy_bound": 4.0},
        {"guide_layers": 1},
    ],
    ids=str,
)
def test_every_setting_has_an_effect(options):
    """Otherwise the comparison above could not tell whether a setting is ignored."""
    assert not torch.equal(sampled(**options), sampled())


@st.composite
def configs(draw):
    num_steps = draw(st.integers(1, 9))
    numbers = st.floats(0, 8, allow_nan=False)
    options = {
        "num_steps": num_steps,
        "reuse": draw(st.booleans()),
        "top_k": draw(st.none() | st.integers(1, 30)),
        "top_p": draw(st.just(1.0) | st.floats(0.01, 1)),
    }
    falling = sorted(draw(st.sets(st.floats(0.001, 0.999), min_size=num_steps - 1, max_size=num_steps - 1)), reverse=True)
    options |= draw(st.sampled_from([{"mask_ratios": (*falling, 0.0)}, *({"mask_schedule": name} for name in MASK_SCHEDULES)]))
    for scalar, schedule, names in (
        ("guidance_scale", "guidance_schedule", GUIDANCE_SCHEDULES),
        ("sampling_temperature", "sampling_temperature_schedule", TEMPERATURE_SCHEDULES),
    ):
        if draw(st.booleans()):
            options[f"{scalar}s"] = tuple(draw(numbers) for _ in range(num_steps))
        else:
            options |= {scalar: draw(numbers), schedule: draw(st.sampled_from(names))}
    if not any(options.get("sampling_temperatures", (options.get("sampling_temperature"),))):
        options |= {"top_k": None, "top_p": 1.0}  # which would be refused
    if draw(st.booleans()) and "mask_ratios" not in options:
        options |= {"entropy_bound": draw(st.floats(0, 20)), "mask_schedule": "cosine"}
    options["reveal_order"] = draw(st.sampled_from(["confidence", "random", "halton"]))
    options["remask_temperature"] = draw(numbers) if options["reveal_order"] == "confidence" else 0.0
    return SamplerConfig(**options)


@settings(max_examples=60, deadline=None)
@given(config=configs(), num_given=st.integers(0, 15), seed=st.integers(0, 2**40))
def test_every_token_is_revealed_once_and_given_ones_stay(config, num_given, seed):
    start = some_start(MODEL.config, num_given, seed=seed)
    before = start.clone()
    codes, trajectory = sample(MODEL, torch.tensor([0, 3, 5]), config, seeds=[seed, 1, 2], start=start, return_trajectory=True)
    assert torch.equal(trajectory[0], start) and torch.equal(start, before)
    assert len(trajectory) == config.num_steps
    assert codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < MASK_ID
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        visible = tokens != MASK_ID
        assert torch.equal(following[visible], tokens[visible])
        if config.entropy_bound is not None:
            num_masked = (~visible).sum(dim=1)
            assert (num_masked <= config.num_masked_at(step, 16, num_given)).all()
            assert ((following == MASK_ID).sum(dim=1) < num_masked.clamp_min(1)).all(), "each pass reveals at least one"
        else:
            assert ((~visible).sum(dim=1) == config.num_masked_at(step, 16, num_given)).all()


@settings(max_examples=15, deadline=None)
@given(config=configs(), num_given=st.integers(0, 15))
def test_image_depends_on_its_own_seed_label_and_start_only(config, num_given):
    labels, seeds, start = torch.tensor([0, 3, 5, 3]), [3, 9, -1, 4], some_start(MODEL.config, num_given, num_images=4)
    together = sample(MODEL, labels, config, seeds=seeds, start=start)
    order = [2, 0, 3]
    assert torch.equal(sample(MODEL, labels[order], config, seeds=[-1, 3, 4], start=start[order]), together[order])
    assert torch.equal(sample(MODEL, labels[1:2], config, seeds=[9], start=start[1:2])[0], together[1])


def test_global_generator_is_neither_read_nor_changed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampled()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sampled(), first)


class _NothingFromTheHost(TorchFunctionMode):
    """Within it no tensor is made from values of Python, which would be copied to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "num_given"),
    [
        (SEARCHED, 7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [({}, 0), ({"reuse": False}, 7), (HALTON, 0), (RANDOM, 7), ({"top_k": 5, "top_p": 0.9}, 0)]
        ),
    ],
    ids=str,
)
def test_loop_never_reads_a_value_from_the_device(options, num_given):
    """On tensors without values, where an operation that waits for a device raises an error."""
    config = SamplerConfig(**options)
    with torch.device("meta"):
        model = ENAT(small_config()).eval()
        labels, tokens = torch.zeros(6, dtype=torch.int64), torch.zeros((3, 16), dtype=torch.int64)
        uniforms = torch.zeros(3, config.num_steps, 2, 16)
        rank = torch.zeros(16, dtype=torch.int64) if config.reveal_order == "halton" else None
    with _NothingFromTheHost():
        states = decode_steps(model, labels, tokens, uniforms, config, num_given=num_given, halton_rank=rank)
    assert [state.shape for state in states] == [(3, 16)] * (config.num_steps + 1)


# Guidance and reuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_given", [0, 7])
@pytest.mark.parametrize(
    ("options", "passes", "passes_with_given"),
    [
        ({"num_steps": 4}, [1, 2, 2, 2], [2, 2, 2, 2]),  # unguided, but the features of given tokens are reused
        ({"num_steps": 4, "reuse": False}, [1, 2, 2, 2], [1, 2, 2, 2]),
        ({"num_steps": 4, "guidance_scale": 1.0}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ({"num_steps": 4, "guidance_scales": (1.0, 1.0, 2.0, 1.0)}, [1, 2, 2, 1], [2, 2, 2, 1]),
        ({"num_steps": 4, "guidance_scales": (1.0, 1.0, 2.0, 1.0), "reuse": False}, [1, 1, 2, 1], [1, 1, 2, 1]),
        ({"num_steps": 4, "guidance_scales": (3.0, 1.0, 1.0, 1.0)}, [2, 1, 1, 1], [2, 1, 1, 1]),
        ({"num_steps": 4, "guide_layers": 1}, [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_unconditional_passes_run_only_where_they_matter(options, passes, passes_with_given, num_given):
    model, config = small_enat(), SamplerConfig(**options)
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(math.ceil(len(arguments[0]) / 3)))
    start = some_start(model.config, num_given) if num_given else None
    sample(model, torch.arange(3), config, seeds=range(3), start=start)
    assert seen == (passes_with_given if num_given else passes)
    assert seen == [config.num_passes_at(step, model.config, num_given) for step in range(4)]


def test_reused_features_of_masked_tokens_need_both_passes_from_the_first_step():
    model, seen = small_enat(reused_features="masked"), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append((len(arguments[0]), arguments[2] is not None)))
    sampled(model, num_steps=3)
    sampled(model, num_steps=3, reuse=False)
    assert seen == [(5, False), (8, True), (8, True), (4, False), (8, False), (8, False)]  # of the null label, one stands for all


@pytest.mark.parametrize(
    ("options", "num_first"),
    [({}, 2), ({"guidance_schedule": "constant"}, 3), ({"guidance_schedule": "constant", "reuse": False}, 3)],
    ids=str,
)
@pytest.mark.parametrize("reused_features", ["visible", "all"])
def test_images_of_one_label_share_the_first_step(options, num_first, reused_features):
    model, seen, labels = small_enat(reused_features=reused_features), [], torch.tensor([2, 0, 2, 2, 0])
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    codes = sampled(model, labels, range(5), **options)
    needs_features = reused_features == "all" and options.get("reuse", True)
    assert seen[:2] == [3 if needs_features else num_first, 10]
    alone = [sampled(model, labels[index : index + 1], [index], **options) for index in range(5)]
    assert torch.equal(codes, torch.cat(alone))


def test_unconditional_model_runs_one_pass_and_ignores_guidance():
    model, seen = small_enat(num_classes=0), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    labels = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(sampled(model, labels, guidance_scale=3.5), sampled(model, labels, guidance_scale=1.0))
    assert set(seen[1:8]) == {4}
    assert seen[0] == 1  # which stands for all


def test_features_of_tokens_that_are_masked_again_are_not_reused():
    """Where a step has masked tokens, features that are not a number change nothing."""
    model, config = small_enat(), SamplerConfig(**REMASKED)
    expected, counts = sample(model, torch.arange(4), config, seeds=range(4)), []

    def spoil(_, arguments):
        tokens, labels, previous = arguments
        if previous is None:
            return None
        is_masked = tokens == MASK_ID
        counts.append(int((is_masked & ~(previous.features[..., 0].isnan()))[0].sum()))
        assert bool((previous.mask | ~is_masked).all()), "what is masked now counts as never visible"
        return tokens, labels, dataclasses.replace(previous, features=previous.features.masked_fill(is_masked[..., None], math.nan))

    model.register_forward_pre_hook(spoil)
    assert torch.equal(sample(model, torch.arange(4), config, seeds=range(4)), expected)
    assert counts == [config.num_masked_at(step, 16) for step in range(1, 6)][-len(counts) :] and len(counts) >= 4


def test_local_steps_that_compute_all_tokens_are_full_ones():
    """Where nothing is visible at the full step, every token is masked there and computed again."""
    model, options = small_enat(**PLAIN), {"num_steps": 4, "reuse": False}
    local = sampled(model, local_steps=3, local_tokens="masked", **options)
    assert torch.equal(local, sampled(model, **options))
    assert not torch.equal(sampled(model, local_steps=3, **options), local)


def test_local_steps_compute_the_group_alone():
    model, config, seen = small_enat(**PLAIN), SamplerConfig(num_steps=8, local_steps=1, local_start=2), []
    model.decoder[0].register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape[:2])))
    assert [config.num_masked_at(step, 16) for step in range(9)] == [16, 15, 14, 13, 11, 8, 6, 3, 0]
    codes, trajectory = sample(model, torch.arange(4), config, seeds=range(4), return_trajectory=True)
    assert seen == [(4, 16), (8, 16), (8, 16), (8, 3), (8, 16), (8, 5), (8, 16), (8, 6)]
    model.decoder[0].attention.query.weight.data.mul_(3.0)
    assert not torch.equal(sample(model, torch.arange(4), config, seeds=range(4)), codes)
    assert [int((tokens == MASK_ID).sum(dim=1).unique()) for tokens in trajectory] == [16, 15, 14, 13, 11, 8, 6, 3]


SMALLER = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 16, "num_heads": 2}


@pytest.mark.parametrize("num_given", [0, 7])
@pytest.mark.parametrize(
    ("architecture", "of_guide", "options"),
    [
        ({}, SMALLER, {}),
        ({}, {"reuse": False, **SMALLER}, {"guidance_schedule": "constant"}),
        ({"reuse": False}, {"reused_features": "all"}, {**SEARCHED}),
        ({"num_classes": 0}, {"num_classes": 0, **SMALLER}, {"guidance_interval": (0.3, 0.8)}),
        (TEXT, TEXT, REMASKED),
        (PLAIN, {**PLAIN, "decoder_layers": 2}, LOCAL),
        ({}, SMALLER, BOUNDED),
    ],
    ids=str,
)
def test_another_model_guides_as_in_the_slow_sampler(architecture, of_guide, options, num_given):
    model, guide, config = small_enat(**architecture), small_enat(seed=1, **of_guide), SamplerConfig(**options)
    labels, start, seeds = conditions(model), some_start(model.config, num_given), [5, 6, 2**40]
    expected = reference_sample(model, labels, config, seeds, start, guide)
    codes = sample(model, labels, config, seeds=seeds, start=start, guide=guide)
    assert torch.equal(codes, expected)
    if not num_given:
        assert torch.equal(sample(model, labels, config, seeds=seeds, guide=guide), expected)
    assert not torch.equal(codes, sample(model, labels, config, seeds=seeds, start=start))


@pytest.mark.parametrize(
    ("of_guide", "options", "message"),
    [
        ({"codebook_size": 25}, {}, "the guide has codebook_size 25, and the model 24; a guide predicts the same codes"),
        ({"num_classes": 4}, {}, "the guide has num_classes 4, and the model 5"),
        ({}, {"guide_layers": 1}, "guide_layers and a guide model are both given"),
        ({"reused_features": "all"}, {"remask_ratio": 0.1}, "this model reuses features of masked tokens"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(of_guide, options, message):
    with pytest.raises(ValueError, match=message):
        sample(MODEL, torch.arange(2), SamplerConfig(**options), seeds=[0, 1], guide=small_enat(**of_guide))
    with pytest.raises(ValueError, match="the guide is in training mode"):
        sample(MODEL, torch.arange(2), SamplerConfig(), seeds=[0, 1], guide=small_enat().train())


def test_self_guidance_decodes_twice_where_new_tokens_are_encoded():
    """And does not depend on the null label, also in a model without labels."""
    model, decoded = small_enat(), []
    model.decoder[0].register_forward_pre_hook(lambda _, arguments: decoded.append(len(arguments[0])))
    codes = sampled(model, torch.tensor([0, 1]), range(2), guide_layers=1, guidance_schedule="constant", num_steps=4)
    assert decoded == [2] * 7, "nothing is visible at the first step"
    model.label_embedding.weight.data[model.config.null_label] += 3.0
    assert torch.equal(
        sampled(model, torch.tensor([0, 1]), range(2), guide_layers=1, guidance_schedule="constant", num_steps=4), codes
    )
    unconditional, labels = small_enat(num_classes=0), torch.zeros(2, dtype=torch.int64)
    guided = sampled(unconditional, labels, range(2), guide_layers=1)
    assert not torch.equal(guided, sampled(unconditional, labels, range(2)))
    assert torch.equal(sampled(model, guide_layers=1, guidance_scale=1.0), sampled(model, guidance_scale=1.0))


@torch.no_grad()
def test_the_entropy_bound_is_kept_and_used_up():
    """At each step the revealed tokens keep the bound, and with the next one they would not. Also images of one batch differ."""
    config = SamplerConfig(**BOUNDED, guidance_scale=1.0, reveal_order="random", remask_temperature=0.0)
    labels, seeds = torch.arange(4), range(4)
    codes, trajectory = sample(MODEL, labels, config, seeds=seeds, return_trajectory=True)
    noise = torch.stack([torch.rand(6, 2, 16, generator=torch.Generator().manual_seed(seed))[0, 1] for seed in seeds])
    order, counts, previous = noise.argsort(dim=1, descending=True), [], [None] * 4
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        counts.append([])
        for image in range(4):
            left = [p for p in order[image].tolist() if tokens[image, p] == MASK_ID]
            revealed = [p for p in left if following[image, p] != MASK_ID]
            if not left:
                continue
            previous[image] = MODEL(tokens[image : image + 1], labels[image : image + 1], previous[image])
            probs = previous[image].logits[0].double().softmax(dim=-1)
            entropies = -(probs * probs.log()).sum(dim=-1)[left]
            assert revealed == left[: len(revealed)] and revealed
            total = entropies.cumsum(0) - entropies.cummax(0).values
            if step == 5:  # the last one reveals all that remain
                continue
            assert total[len(revealed) - 1] <= 8.0 + 1e-4
            assert len(revealed) == len(left) or total[len(revealed)] > 8.0 - 1e-4
            counts[-1].append(len(revealed))
    assert any(len(set(each)) > 1 for each in counts), "otherwise images of a batch would not be told apart"
    assert max(map(max, filter(None, counts[:-1]))) > 1


def test_images_that_the_bound_finishes_need_no_more_passes():
    model, seen = small_enat(), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    codes, trajectory = sample(
        model, torch.arange(4), SamplerConfig(entropy_bound=1e3, guidance_scale=1.0), seeds=range(4), return_trajectory=True
    )
    assert seen == [1] * 4 and len(trajectory) == 8 and all(torch.equal(tokens, codes) for tokens in trajectory[1:])


def test_a_recorded_loop_is_refused_with_an_entropy_bound():
    with pytest.raises(ValueError, match="entropy_bound chooses at each step how many tokens it reveals"):
        sample(MODEL, torch.arange(2), SamplerConfig(entropy_bound=1.0), seeds=[0, 1], loop=decode_steps)


def test_halton_orders_are_shifted_by_each_image():
    orders = []
    for shift in (False, True):
        _, trajectory = sample(
            MODEL,
            torch.arange(4),
            SamplerConfig(**{**HALTON, "mask_schedule": "linear", "num_steps": 16, "halton_shift": shift}),
            seeds=range(4),
            return_trajectory=True,
        )
        orders.append((torch.stack(trajectory) == MASK_ID).sum(dim=0))
    plain, shifted = orders
    assert (plain == plain[0]).all() and not (shifted == shifted[0]).all()
    for image in shifted:
        moved = [plain[0].view(4, 4).roll((down, right), (0, 1)).flatten() for down in range(4) for right in range(4)]
        assert any(torch.equal(image, each) for each in moved)


def test_a_moment_chooses_positions():
    """With both temperatures at 1, one token is revealed at each position with a probability proportional to the sum of squared
    probabilities there. Checked by frequencies."""
    model, num_seeds = small_enat(num_classes=0), 4000
    config = SamplerConfig(
        num_steps=2,
        mask_ratios=(15.01 / 16, 0.0),
        reveal_order="moment",
        sampling_temperatures=(1.0, 1.0),
        remask_temperatures=(1.0, 1.0),
    )
    labels = torch.zeros(num_seeds, dtype=torch.int64)
    _, trajectory = sample(model, labels, config, seeds=range(num_seeds), return_trajectory=True)
    positions = (trajectory[1] != MASK_ID).nonzero()[:, 1]
    assert len(positions) == num_seeds
    moments = model(torch.full((1, 16), MASK_ID), labels[:1]).logits[0].softmax(dim=-1).square().sum(dim=-1)
    expected = moments / moments.sum()
    assert expected.max() > 1.5 * expected.min(), "otherwise any order would pass"
    frequencies = torch.bincount(positions, minlength=16) / num_seeds
    assert (frequencies - expected).abs().max() < 4 * (expected.max() / num_seeds) ** 0.5


@pytest.mark.parametrize("is_text", [False, True])
def test_guidance_leads_away_from_the_null_condition_and_scale_1_ignores_it(is_text):
    model = small_enat(**(TEXT if is_text else {}))
    condition = captions(model.config, 4) if is_text else torch.arange(4)
    unguided, guided = sampled(model, condition, guidance_scale=1.0), sampled(model, condition)
    if is_text:
        model.set_null_caption(torch.zeros(3, 12), torch.ones(12))
    else:
        model.label_embedding.weight.data[model.config.null_label] += 3.0
    assert torch.equal(sampled(model, condition, guidance_scale=1.0), unguided)
    assert not torch.equal(sampled(model, condition), guided)


def test_reuse_takes_effect_from_the_third_step():
    """Nothing is visible in the first step, so the second has nothing to reuse and gives the same result."""
    (codes, trajectory), (fresh_codes, fresh) = (
        sample(MODEL, torch.arange(4), SamplerConfig(reuse=reuse), seeds=range(4), return_trajectory=True)
        for reuse in (True, False)
    )
    assert all(torch.equal(trajectory[step], fresh[step]) for step in range(3))
    assert not torch.equal(codes, fresh_codes)


def test_given_codes_are_encoded_once_and_then_reused():
    model, start, encoded = small_enat(), some_start(MODEL.config, 7), []
    model.encoder[0].register_forward_pre_hook(lambda _, arguments: encoded.append(tuple(arguments[0].shape[:2])))
    sampled(model, torch.arange(3), range(3), start, num_steps=4, guidance_scale=2.0)
    config = SamplerConfig(num_steps=4)
    assert [config.num_masked_at(step, 16, num_given=7) for step in range(5)] == [9, 8, 6, 3, 0]
    assert encoded == [(6, 7), (6, 1), (6, 2), (6, 3)]


def test_given_codes_and_label_both_determine_the_result():
    codes = sampled()
    inside = box_mask(4, top=1, left=0, height=2, width=3)
    start = codes.masked_fill(inside, MASK_ID)
    again, edited = sampled(start=start), sampled(labels=torch.arange(2, 6), start=start)
    assert torch.equal(again[:, ~inside], codes[:, ~inside])
    assert not torch.equal(edited[:, inside], again[:, inside])
    assert not torch.equal(sampled(start=start.flip(0))[:, inside], again[:, inside])


# Drawing ---------------------------------------------------------------------------------------------------------------------


def model_with_bias(codes, value):
    """All codes are equally likely but for these."""
    model = small_enat()
    for parameter in (model.head.norm_out.weight, model.head.norm_out.bias, model.head.bias):
        parameter.data.zero_()
    model.head.bias.data[codes] = value
    return model


def test_temperature_0_takes_the_most_likely_code_whatever_the_seed():
    """One code is a little more likely than all others, by less than a low temperature could tell."""
    assert (sampled(model_with_bias(17, 1e-5), sampling_temperature=0.0) == 17).all()
    assert torch.equal(sampled(**GREEDY), sampled(seeds=range(4, 8), **GREEDY))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_filter_that_leaves_one_code_takes_the_most_likely(options):
    assert torch.equal(sampled(**options), sampled(sampling_temperature=0.0))


def test_top_k_keeps_the_lowest_of_equally_likely_codes():
    model = model_with_bias(slice(20, None), -1.0)
    assert sampled(model, torch.zeros(50, dtype=torch.int64), range(50), top_k=3).unique().tolist() == [0, 1, 2]
    assert (sampled(model, top_k=1) == 0).all()


def test_halton_order_is_the_same_for_all_images():
    config = SamplerConfig(num_steps=16, **{**HALTON, "mask_schedule": "linear"})  # one token a step
    codes, trajectory = sample(MODEL, torch.arange(4), config, seeds=range(4), return_trajectory=True)
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        assert (tokens != following).nonzero()[:, 1].tolist() == [halton(4)[step]] * 4


def test_random_order_depends_on_the_seed_alone_and_is_uniform():
    count, config = 2000, SamplerConfig(num_steps=4, mask_schedule="linear", **RANDOM)
    _, trajectory = sample(MODEL, torch.zeros(count, dtype=torch.int64), config, seeds=range(count), return_trajectory=True)
    revealed = trajectory[1] != MASK_ID
    assert len(revealed.unique(dim=0)) > 900  # of 1820 ways to choose 4 of 16
    assert (revealed.double().mean(dim=0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / count) ** 0.5
    _, other = sample(MODEL, torch.tensor([4, 4]), config, seeds=[0, 1], return_trajectory=True)
    assert torch.equal(other[1] != MASK_ID, revealed[:2])


# Refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "labels", "seeds", "message"),
    [
        ({}, [0, 1], [1], "1 seeds for 2 labels"),
        ({}, [], [], "labels is empty"),
        ({}, [0.0, 1.0], [1, 2], "labels have dtype torch.float32; integers are needed"),
        ({}, [0, 6], [1, 2], "labels range from 0 to 6; .* 0 to 5"),
        ({}, [-1, 0], [1, 2], "labels range from -1 to 0"),
        ({"num_classes": 0}, [1], [1], "labels range from 1 to 1"),
        (TEXT, [0, 0], [1, 2], "takes a TextCondition, not labels"),
        (TEXT, captions(small_config(**TEXT), 2), [1, 2, 3], "3 seeds for 2 labels"),
        ({}, captions(small_config(**TEXT), 2), [1, 2], "takes labels, not a TextCondition"),
    ],
)
def test_labels_and_seeds_that_do_not_fit_are_refused(architecture, labels, seeds, message):
    with pytest.raises(ValueError, match=message):
        sampled(small_enat(**architecture), torch.tensor(labels) if isinstance(labels, list) else labels, seeds)


def test_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        sampled(small_enat().train())


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.full((2, 16), 24, dtype=torch.int32), "start has dtype torch.int32; torch.int64 is needed"),
        (torch.full((2, 4, 4), 24), r"start has shape \(2, 4, 4\); \(2, 16\) is needed"),
        (torch.full((3, 16), 24), r"start has shape \(3, 16\); \(2, 16\) is needed"),
        (torch.full((2, 16), 25), "start ranges from 25 to 25; codes are 0 to 23, the mask id is 24"),
        (F.pad(torch.full((2, 15), 24), (0, 1), value=-1), "start ranges from -1 to 24"),
        (torch.tensor([[24] * 16, [24] * 15 + [3]]), "have 15 to 16 masked tokens; all images of a call must have the same"),
        (torch.zeros((2, 16), dtype=torch.int64), "start .* mask id, 24"),
    ],
    ids=str,
)
def test_start_that_cannot_be_continued_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        sampled(labels=torch.tensor([0, 1]), seeds=[1, 2], start=start)
