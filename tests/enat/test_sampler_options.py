"""Options of the sampler: equal to a sampler that is slow and obvious, and what holds for every setting and every start.

What settings are refused: test_sampler_config.py.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_sampler import HALTON, RANDOM, SEARCHED, halton, reference_sample, some_start
from small_models import TEXT, conditions, small_config, small_enat
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from enat.masking import box_mask
from enat.model import ENAT
from enat.sampler import decode_steps, sample
from enat.sampler_config import SamplerConfig
from enat.schedule import GUIDANCE_SCHEDULES, MASK_SCHEDULES, TEMPERATURE_SCHEDULES, mask_ratio

MODEL = small_enat()
MASK_ID = MODEL.config.mask_id


@pytest.mark.parametrize("num_given", [0, 7])
@pytest.mark.parametrize(
    "options",
    [
        *({"mask_schedule": name} for name in MASK_SCHEDULES),
        *({"guidance_schedule": name} for name in GUIDANCE_SCHEDULES),
        {"guidance_schedule": "power_cosine", "guidance_power": 2.5, "guidance_scale": 6.0},
        {"sampling_temperature_schedule": "constant", "sampling_temperature": 0.8},
        {"remask_temperature_schedule": "constant"},
        HALTON,
        RANDOM,
        {"top_k": 3},
        {"top_p": 0.7, "sampling_temperature": 1.0},
        {"top_k": 9, "top_p": 0.6},
        {"guidance_scales": (1.0, 1.0, 3.0, 1.0, 1.0), "num_steps": 5},  # guidance in an interval
        {"guidance_scales": (1.0, 1.0, 3.0, 1.0, 1.0), "num_steps": 5, "reuse": False},
        SEARCHED,
        {**SEARCHED, "reuse": False, "top_p": 0.8},
    ],
    ids=str,
)
def test_the_sampler_equals_the_slow_one(options, num_given):
    config, seeds, labels = SamplerConfig(**options), [5, 6, 7], conditions(MODEL)
    start = some_start(MODEL.config, num_given) if num_given else None
    assert torch.equal(
        sample(MODEL, labels, config, seeds=seeds, start=start), reference_sample(MODEL, labels, config, seeds, start)
    )


@pytest.mark.parametrize("options", [{}, SEARCHED, {**HALTON, "guidance_scale": 1.0}], ids=["default", "searched", "halton"])
@pytest.mark.parametrize(
    "architecture",
    [
        TEXT,
        {"num_classes": 0},
        {"decoder_attention": "cross"},
        {"encoder_layers": 0, "decoder_attention": "full", "reuse": False},
        {"reused_features": "masked"},
        {"reused_features": "all", **TEXT},
    ],
    ids=str,
)
def test_parts_are_made_anew_by_every_architecture_as_by_the_slow_sampler(architecture, options):
    model, config, seeds = small_enat(**architecture), SamplerConfig(**options), [5, 6, 7]
    labels, start = conditions(model), some_start(model.config, 9)
    codes = sample(model, labels, config, seeds=seeds, start=start)
    assert torch.equal(codes, reference_sample(model, labels, config, seeds, start))


# What holds for all settings -------------------------------------------------------------------------------------------------


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
    options["reveal_order"] = draw(st.sampled_from(["confidence", "random", "halton"]))
    options["remask_temperature"] = draw(numbers) if options["reveal_order"] == "confidence" else 0.0
    return SamplerConfig(**options)


@settings(max_examples=60, deadline=None)
@given(config=configs(), num_given=st.integers(0, 15), seed=st.integers(0, 2**40))
def test_every_token_is_made_once_and_what_is_given_stays(config, num_given, seed):
    start = some_start(MODEL.config, num_given, seed=seed)
    codes, trajectory = sample(MODEL, torch.tensor([0, 3, 5]), config, seeds=[seed, 1, 2], start=start, return_trajectory=True)
    assert torch.equal(trajectory[0], start)
    assert len(trajectory) == config.num_steps
    assert 0 <= codes.min() <= codes.max() < MASK_ID
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        visible = tokens != MASK_ID
        assert torch.equal(following[visible], tokens[visible])
        assert ((~visible).sum(dim=1) == config.num_masked_at(step, 16, num_given)).all()


@settings(max_examples=25, deadline=None)
@given(config=configs(), num_given=st.integers(0, 15))
def test_lists_of_what_the_schedules_say_give_the_same_bits(config, num_given):
    steps = range(config.num_steps)
    named = dataclasses.replace(config, mask_ratios=None, guidance_scales=None, sampling_temperatures=None)
    listed = SamplerConfig(
        num_steps=named.num_steps,
        reuse=named.reuse,
        reveal_order=named.reveal_order,
        top_k=named.top_k,
        top_p=named.top_p,
        mask_ratios=(*(mask_ratio((step + 1) / len(steps), named.mask_schedule) for step in steps[:-1]), 0.0),
        guidance_scales=tuple(named.guidance_at(step) for step in steps),
        sampling_temperatures=tuple(named.sampling_temperature_at(step) for step in steps),
        remask_temperatures=tuple(named.remask_temperature_at(step) for step in steps),
    )
    labels, start = torch.tensor([0, 3, 5]), some_start(MODEL.config, num_given)
    assert torch.equal(*(sample(MODEL, labels, each, seeds=[1, 2, 3], start=start) for each in (named, listed)))


@settings(max_examples=15, deadline=None)
@given(config=configs(), num_given=st.integers(0, 15))
def test_an_image_depends_on_its_own_seed_label_and_start_only(config, num_given):
    labels, seeds, start = torch.tensor([0, 3, 5, 3]), [3, 9, 1, 4], some_start(MODEL.config, num_given, num_images=4)
    together = sample(MODEL, labels, config, seeds=seeds, start=start)
    order = [2, 0, 3]
    assert torch.equal(sample(MODEL, labels[order], config, seeds=[1, 3, 4], start=start[order]), together[order])
    assert torch.equal(sample(MODEL, labels[1:2], config, seeds=[9], start=start[1:2])[0], together[1])


class _NothingFromTheHost(TorchFunctionMode):
    """Within it no tensor is made from values of Python, which would be copied to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "num_given"),
    [({}, 0), ({"reuse": False}, 7), (SEARCHED, 7), (HALTON, 0), (RANDOM, 7), ({"top_k": 5, "top_p": 0.9}, 0)],
    ids=str,
)
def test_the_loop_never_looks_at_a_value(options, num_given):
    """On tensors without values: an operation that waits for a device raises here."""
    config = SamplerConfig(**options)
    with torch.device("meta"):
        model = ENAT(small_config()).eval()
        labels, tokens = torch.zeros(6, dtype=torch.int64), torch.zeros((3, 16), dtype=torch.int64)
        uniforms = torch.zeros(3, config.num_steps, 2, 16)
        rank = torch.zeros(16, dtype=torch.int64) if config.reveal_order == "halton" else None
    with _NothingFromTheHost():
        states = decode_steps(model, labels, tokens, uniforms, config, num_given=num_given, halton_rank=rank)
    assert [state.shape for state in states] == [(3, 16)] * (config.num_steps + 1)


# Drawing ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [24, 1000])
def test_leaving_no_code_out_changes_nothing(top_k):
    labels = torch.arange(4)
    filtered = sample(MODEL, labels, SamplerConfig(top_k=top_k, top_p=1.0), seeds=range(4))
    assert torch.equal(filtered, sample(MODEL, labels, SamplerConfig(), seeds=range(4)))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_leaving_one_code_takes_the_most_likely(options):
    labels = torch.arange(4)
    filtered, greedy = (
        sample(MODEL, labels, SamplerConfig(**each), seeds=range(4), return_trajectory=True)
        for each in (options, {"sampling_temperature": 0.0})
    )
    assert torch.equal(filtered[0], greedy[0])
    assert all(map(torch.equal, filtered[1], greedy[1]))


def test_equally_likely_codes_are_left_in_from_the_lowest_up():
    model = small_enat()
    with torch.no_grad():
        model.head.norm_out.weight.zero_()
        model.head.norm_out.bias.zero_()
        model.head.bias.zero_()
        model.head.bias[20:] = -1.0
    codes = sample(model, torch.zeros(50, dtype=torch.int64), SamplerConfig(top_k=3), seeds=range(50))
    assert codes.unique().tolist() == [0, 1, 2]
    assert (sample(model, torch.arange(4), SamplerConfig(top_k=1), seeds=range(4)) == 0).all()


def test_codes_are_drawn_from_the_nucleus_by_their_probability():
    count, options = 4000, {"sampling_temperature": 1.5, "sampling_temperature_schedule": "constant", "num_steps": 1}
    config = SamplerConfig(top_k=8, top_p=0.8, **options)
    codes = sample(MODEL, torch.zeros(count, dtype=torch.int64), config, seeds=range(count))
    with torch.no_grad():
        logits = MODEL(torch.full((1, 16), MASK_ID), torch.tensor([0])).logits[0].double()
    for position in range(16):
        likely = (logits[position] / 1.5).softmax(dim=0).sort(descending=True)
        probs = likely.values[:8] / likely.values[:8].sum()
        size = int((probs.cumsum(dim=0) < 0.8).sum()) + 1
        probs = probs[:size] / probs[:size].sum()
        drawn = torch.bincount(codes[:, position], minlength=24)
        assert drawn.sum() == drawn[likely.indices[:size]].sum() == count
        deviation = (drawn[likely.indices[:size]] - count * probs) / (count * probs * (1 - probs) + 1e-9).sqrt()
        assert deviation.abs().max() < 4.5


def test_the_halton_order_is_the_same_for_all_images():
    config = SamplerConfig(num_steps=16, **{**HALTON, "mask_schedule": "linear"})  # one token a step
    codes, trajectory = sample(MODEL, torch.arange(4), config, seeds=range(4), return_trajectory=True)
    for step, (tokens, following) in enumerate(zip(trajectory, [*trajectory[1:], codes], strict=True)):
        assert (tokens != following).nonzero()[:, 1].tolist() == [halton(4)[step]] * 4


def test_a_random_order_belongs_to_the_seed_and_is_uniform():
    count, config = 2000, SamplerConfig(num_steps=4, mask_schedule="linear", **RANDOM)
    _, trajectory = sample(MODEL, torch.zeros(count, dtype=torch.int64), config, seeds=range(count), return_trajectory=True)
    revealed = trajectory[1] != MASK_ID
    assert len(revealed.unique(dim=0)) > 900  # of 1820 ways to choose 4 of 16
    assert (revealed.double().mean(dim=0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / count) ** 0.5
    _, other = sample(MODEL, torch.tensor([4, 4]), config, seeds=[0, 1], return_trajectory=True)
    assert torch.equal(other[1] != MASK_ID, revealed[:2])  # for any label


# What is given ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SEARCHED, HALTON], ids=["default", "searched", "halton"])
def test_a_start_that_gives_nothing_is_no_start(options):
    labels, config = torch.arange(3), SamplerConfig(**options)
    start = torch.full((3, 16), MASK_ID)
    assert torch.equal(*(sample(MODEL, labels, config, seeds=[1, 2, 3], start=given) for given in (start, None)))


def test_given_codes_are_encoded_once_and_then_reused():
    model, start = small_enat(), some_start(MODEL.config, 7)
    encoded = []
    model.encoder[0].register_forward_pre_hook(lambda _, arguments: encoded.append(tuple(arguments[0].shape[:2])))
    config = SamplerConfig(num_steps=4, guidance_scale=2.0)
    sample(model, torch.arange(3), config, seeds=range(3), start=start)
    left = [config.num_masked_at(step, 16, num_given=7) for step in range(5)]
    assert left == [9, 8, 6, 3, 0]
    assert encoded == [(6, 7), (6, 1), (6, 2), (6, 3)]


def test_a_code_made_alone_is_drawn_at_the_last_step_guided_and_cold():
    start = some_start(MODEL.config, 15)
    codes, trajectory = sample(MODEL, torch.arange(3), SamplerConfig(), seeds=range(3), start=start, return_trajectory=True)
    assert all(torch.equal(tokens, start) for tokens in trajectory)
    assert (codes != MASK_ID).all()


@pytest.mark.parametrize("num_given", [0, 7])
@pytest.mark.parametrize(
    ("options", "passes", "passes_with_given"),
    [
        ({"num_steps": 4}, [1, 2, 2, 2], [2, 2, 2, 2]),  # unguided, but its features of what is given are reused
        ({"num_steps": 4, "reuse": False}, [1, 2, 2, 2], [1, 2, 2, 2]),
        ({"num_steps": 4, "guidance_scale": 1.0}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ({"num_steps": 4, "guidance_scales": (1.0, 1.0, 2.0, 1.0)}, [1, 2, 2, 1], [2, 2, 2, 1]),
        ({"num_steps": 4, "guidance_scales": (1.0, 1.0, 2.0, 1.0), "reuse": False}, [1, 1, 2, 1], [1, 1, 2, 1]),
        ({"num_steps": 4, "guidance_scales": (3.0, 1.0, 1.0, 1.0)}, [2, 1, 1, 1], [2, 1, 1, 1]),
    ],
    ids=str,
)
def test_unconditional_passes_run_where_they_count(options, passes, passes_with_given, num_given):
    model, config = small_enat(), SamplerConfig(**options)
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0]) // 3))
    start = some_start(model.config, num_given) if num_given else None
    sample(model, torch.arange(3), config, seeds=range(3), start=start)
    assert seen == (passes_with_given if num_given else passes)
    assert seen == [config.num_passes_at(step, model.config, num_given) for step in range(4)]


def test_what_is_given_and_the_label_both_decide_what_is_made():
    codes = sample(MODEL, torch.arange(3), SamplerConfig(), seeds=range(3))
    inside = box_mask(4, top=1, left=0, height=2, width=3)
    start = codes.masked_fill(inside, MASK_ID)
    again, edited = (sample(MODEL, labels, SamplerConfig(), seeds=[7, 8, 9], start=start) for labels in torch.arange(6).view(2, 3))
    assert torch.equal(again[:, ~inside], codes[:, ~inside])
    assert not torch.equal(edited[:, inside], again[:, inside])
    other = sample(MODEL, torch.arange(3), SamplerConfig(), seeds=[7, 8, 9], start=start.flip(0))
    assert not torch.equal(other[:, inside], again[:, inside])


def test_a_start_is_left_as_it_was():
    start = some_start(MODEL.config, 5)
    before = start.clone()
    sample(MODEL, torch.arange(3), SamplerConfig(), seeds=range(3), start=start)
    assert torch.equal(start, before)


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
def test_starts_that_cannot_be_gone_on_from_are_refused(start, message):
    with pytest.raises(ValueError, match=message):
        sample(MODEL, torch.tensor([0, 1]), SamplerConfig(), seeds=[1, 2], start=start)


def test_a_box_of_the_grid():
    mask = box_mask(4, top=1, left=2, height=2, width=1)
    assert mask.view(4, 4).tolist() == [[False] * 4, [False, False, True, False], [False, False, True, False], [False] * 4]
    assert box_mask(3, top=0, left=0, height=3, width=3).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"top": 0, "left": 0, "height": 0, "width": 2}, "the box is 0 x 2 tokens"),
        ({"top": 3, "left": 0, "height": 2, "width": 2}, "rows 3 to 4 and columns 0 to 1; the grid has 0 to 3"),
        ({"top": 0, "left": -1, "height": 2, "width": 2}, "columns -1 to 0"),
    ],
)
def test_boxes_beyond_the_grid_are_refused(box, message):
    with pytest.raises(ValueError, match=message):
        box_mask(4, **box)
