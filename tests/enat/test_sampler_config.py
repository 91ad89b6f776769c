"""Settings of the sampler: their values at each step, and which are refused."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enat.config import ENATConfig
from enat.sampler_config import SamplerConfig
from enat.schedule import MASK_SCHEDULES
from references.slow_sampler import HALTON, RANDOM, SEARCHED


def test_settings_come_back_from_json_where_tuples_are_lists():
    config = SamplerConfig(**SEARCHED)
    again = SamplerConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_default_settings_are_the_published_ones():
    config = SamplerConfig()
    assert [config.num_masked_at(step, 256) for step in range(9)] == [256, 251, 236, 212, 181, 142, 97, 49, 0]
    assert [config.guidance_at(step) for step in range(8)] == [1 + 2.5 * step / 8 for step in range(8)]
    assert [config.sampling_temperature_at(step) for step in range(8)] == [5.25, 4.5, 3.75, 3.0, 2.25, 1.5, 0.75, 1e-3]
    assert [config.remask_temperature_at(step) for step in range(8)] == [1.5 * (1 - (step + 1) / 8) for step in range(8)]


@given(num_steps=st.integers(1, 64), num_tokens=st.integers(1, 1024), mask_schedule=st.sampled_from(MASK_SCHEDULES))
def test_number_of_masked_tokens_falls_to_zero(num_steps, num_tokens, mask_schedule):
    config = SamplerConfig(num_steps=num_steps, mask_schedule=mask_schedule)
    counts = [config.num_masked_at(step, num_tokens) for step in range(num_steps + 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[1] < counts[0] == num_tokens
    assert counts[-1] == 0


@pytest.mark.parametrize(
    ("num_made", "counts"),
    [
        (1, [1, 1, 1, 1, 1, 1, 1, 1, 0]),
        (2, [2, 2, 2, 2, 1, 1, 1, 1, 0]),
        (4, [4, 4, 4, 3, 3, 2, 2, 1, 0]),
        (9, [9, 9, 8, 7, 6, 5, 3, 2, 0]),
        (128, [128, 126, 118, 106, 91, 71, 49, 25, 0]),
    ],
)
def test_few_tokens_beside_given_ones_are_drawn_over_several_steps(num_made, counts):
    config = SamplerConfig()
    assert [config.num_masked_at(step, 256, 256 - num_made) for step in range(9)] == counts


def test_last_token_beside_given_ones_is_drawn_in_the_last_step():
    config = SamplerConfig(num_steps=3, mask_ratios=(0.2, 0.01, 0.0))
    assert [config.num_masked_at(step, 16, 14) for step in range(4)] == [2, 1, 1, 0]
    assert [config.num_masked_at(step, 16) for step in range(4)] == [16, 3, 0, 0]


OWN = SamplerConfig(num_steps=2, guidance_scale=6.0, guidance_schedule="power_cosine", guidance_power=2.0, remask_temperature=0.0)


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (OWN, {"reveal_order": "halton"}, dataclasses.replace(OWN, reveal_order="halton")),
        (OWN, {"guidance_scales": [1, 2]}, SamplerConfig(num_steps=2, guidance_scales=(1, 2), remask_temperature=0.0)),
        (OWN, {"guidance_scales": None}, OWN),
        (SamplerConfig(**SEARCHED), {"guidance_scales": None}, SamplerConfig(**{**SEARCHED, "guidance_scales": None})),
        (
            SamplerConfig(**SEARCHED),
            {"guidance_scale": 2.0, "mask_schedule": "linear"},
            SamplerConfig(**{**SEARCHED, "guidance_scales": None, "mask_ratios": None}, guidance_scale=2.0, mask_schedule="linear"),
        ),
        (SamplerConfig(**HALTON), {"mask_ratios": (*range(7, 0, -1), 0)}, "mask_ratios[0] is 7 after 1.0"),
        (OWN, {"guidance_scale": 3.5, "guidance_scales": (1, 2)}, "leave out guidance_scale"),
        (OWN, {"guidance_scale": 2.0, "guidance_scales": None}, OWN.replaced(guidance_scale=2.0)),
        (SamplerConfig(**SEARCHED), {"num_steps": 5}, "mask_ratios has 4 values for 5 steps"),
        (SamplerConfig(**SEARCHED), {"guidance_schedule": "constant"}, "leave out guidance_schedule 'constant'"),
    ],
    ids=str,
)
def test_given_values_replace_their_counterparts_and_are_checked_together(own, given, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            own.replaced(**given)
    else:
        assert own.replaced(**given) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"sampling_temperature": float("nan")}, "sampling_temperature is nan"),
        ({"remask_temperature": float("inf")}, "remask_temperature is inf"),
        ({"mask_schedule": "sine"}, "choose one of cosine"),
        ({"guidance_schedule": "cosine"}, "choose one of linear, constant"),
        ({"num_steps": 3, "mask_ratios": (0.5, 0.0)}, "mask_ratios has 2 values for 3 steps; give one value a step"),
        ({"guidance_scales": ()}, "guidance_scales has 0 values for 8 steps"),
        ({"num_steps": 2, "mask_ratios": (0.5, 0.1)}, "mask_ratios ends with 0.1"),
        ({"num_steps": 3, "mask_ratios": (0.5, 0.6, 0.0)}, r"mask_ratios\[1\] is 0.6 after 0.5; the ratios must fall"),
        ({"num_steps": 3, "mask_ratios": (0.5, 0.5, 0.0)}, r"mask_ratios\[1\] is 0.5 after 0.5"),
        ({"num_steps": 2, "mask_ratios": (1.0, 0.0)}, r"mask_ratios\[0\] is 1.0 after 1.0"),
        ({"num_steps": 2, "mask_ratios": (float("nan"), 0.0)}, r"mask_ratios\[0\] is nan"),
        ({"num_steps": 2, "guidance_scales": (1.0, -0.5)}, r"guidance_scales\[1\] is -0.5; it must be finite and at least 0"),
        ({"num_steps": 2, "sampling_temperatures": (1.0, float("inf"))}, r"sampling_temperatures\[1\] is inf"),
        ({"num_steps": 2, "mask_ratios": (0.5, 0.0), "mask_schedule": "arccos"}, "leave out mask_schedule 'arccos'"),
        (
            {"num_steps": 2, "guidance_scales": (1, 2), "guidance_schedule": "constant"},
            "leave out guidance_schedule 'constant'",
        ),
        (
            {"num_steps": 2, "remask_temperatures": (1, 0), "remask_temperature_schedule": "constant"},
            "leave out remask_temperature_schedule 'constant'",
        ),
        ({"num_steps": 2, "guidance_scales": (1, 2), "guidance_scale": 2.0}, "leave out guidance_scale 2.0"),
        (
            {"num_steps": 2, "sampling_temperatures": (1, 0), "sampling_temperature": 1.0},
            "leave out sampling_temperature 1.0",
        ),
        ({"num_steps": 2, "remask_temperatures": (0, 0), "remask_temperature": 0.0}, "leave out remask_temperature 0.0"),
        ({"sampling_temperature": 0.0, "top_k": 5}, "top_k is 5, but at sampling_temperature 0 nothing is drawn"),
        ({"sampling_temperature": 0.0, "top_p": 0.9}, "top_p is 0.9, but at sampling_temperature 0 nothing is drawn"),
        ({"num_steps": 2, "sampling_temperatures": (0, 0), "top_k": 5}, "nothing is drawn"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be in \\(0, 1\\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"reveal_order": "spiral"}, "'spiral'; choose one of confidence, moment, random, halton"),
        ({"reveal_order": "halton"}, "'halton' .*; set remask_temperature to 0"),
        ({"guidance_interval": (0.5, 0.5)}, r"guidance_interval is \[0.5, 0.5\]; it must be"),
        ({"guidance_interval": (0.2,)}, r"guidance_interval is \[0.2\]"),
        ({"guidance_interval": (0.2, 0.9), "guidance_scales": (1.0,) * 8}, "leave out guidance_interval"),
        ({"halton_shift": True}, "only 'halton' can be shifted"),
        ({"remask_ratio": 1.0}, "remask_ratio is 1.0"),
        ({"guide_layers": 0}, "guide_layers is 0; it must be at least 1"),
        ({"local_steps": 1, "remask_ratio": 0.1}, "would not hold once remask_ratio masks them again"),
        ({"local_steps": 1, "entropy_bound": 0.1}, "entropy_bound chooses how many tokens .* leave out local_steps 1"),
        ({"local_steps": 3, "local_start": 5}, "local_steps is 3 after local_start 5, but there are 8 steps"),
        ({"local_start": 1}, "local_start and local_tokens are for local_steps, of which there are none"),
        ({"local_tokens": "masked"}, "local_start and local_tokens are for local_steps"),
        ({"local_steps": 1, "local_tokens": "all"}, "local_tokens is 'all'; choose one of group, masked"),
        ({"local_steps": -1}, "local_steps is -1"),
        ({"entropy_bound": -1.0}, "entropy_bound is -1.0"),
        ({"entropy_bound": 1.0, "remask_ratio": 0.1}, "entropy_bound chooses how many tokens .* leave out remask_ratio 0.1"),
        ({"entropy_bound": 1.0, "mask_schedule": "linear"}, "leave out mask_schedule 'linear'"),
        ({"entropy_bound": 1.0, "num_steps": 2, "mask_ratios": (0.5, 0.0)}, r"leave out mask_ratios \(0.5, 0.0\)"),
        ({"reveal_order": "random", "num_steps": 2, "remask_temperatures": (0.0, 1.0)}, "set remask_temperature to 0"),
        ({**RANDOM, "remask_temperature_schedule": "constant"}, "remask_temperature_schedule; leave it out"),
        ({"guidance_power": 2.0}, "guidance_power is 2.0, but only guidance_schedule 'power_cosine' has a power"),
        ({"guidance_schedule": "power_cosine", "guidance_power": 0.0}, "guidance_power is 0.0; it must be above 0"),
        ({"sampling_temperature_schedule": "cosine"}, "sampling_temperature_schedule is 'cosine'; choose one of linear, constant"),
    ],
    ids=str,
)
def test_impossible_and_ignored_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


def test_lists_of_zeros_count_as_no_noise():
    config = SamplerConfig(reveal_order="halton", num_steps=2, remask_temperatures=(0, 0))
    assert config.remask_temperatures == (0, 0)


def test_top_k_is_allowed_if_some_steps_draw():
    assert SamplerConfig(num_steps=2, sampling_temperatures=(1, 0), top_k=5).top_k == 5


def test_scalars_that_are_off_can_keep_their_schedules():
    off = {"guidance_scale": 1.0, "sampling_temperature": 0.0, "remask_temperature": 0.0}
    constant = dict.fromkeys(("guidance_schedule", "sampling_temperature_schedule", "remask_temperature_schedule"), "constant")
    assert not SamplerConfig(**off, **constant).is_guided


@pytest.mark.parametrize(
    ("architecture", "layers", "message"),
    [
        ({}, 15, "guide_layers is 15, but the encoder of this model has 15 layers, .* choose 1 to 14"),
        ({"encoder_layers": 0, "decoder_layers": 2}, 2, "the decoder of this model has 2 layers, .* choose 1 to 1"),
        ({"encoder_layers": 1}, 1, "has 1 layers, .* leave it out"),
    ],
)
def test_a_guide_has_fewer_layers_than_the_model(architecture, layers, message):
    model = ENATConfig.preset("enat-s", **architecture)
    with pytest.raises(ValueError, match=message):
        SamplerConfig(guide_layers=layers).check_model(model)
    if layers > 1:
        SamplerConfig(guide_layers=layers - 1).check_model(model)


@pytest.mark.parametrize(
    ("local_start", "groups"),
    [(0, [[0, 1, 2], [3, 4, 5], [6, 7]]), (3, [[0], [1], [2], [3, 4, 5], [6, 7]]), (5, [*[[k] for k in range(5)], [5, 6, 7]])],
)
def test_groups_are_a_full_step_and_its_local_ones(local_start, groups):
    config = SamplerConfig(local_steps=2, local_start=local_start)
    assert [[*config.group_at(step)] for step in range(8)] == [group for group in groups for _ in group]
    assert [config.is_local_at(step) for step in range(8)] == [step != group[0] for group in groups for step in group]
    counts = [config.num_masked_at(step, 256) for step in range(9)]
    for group in groups:
        num_revealed = counts[group[0]] - counts[group[-1] + 1]
        assert config.num_computed_at(group[-1], 256) == (num_revealed if len(group) > 1 else 0)
        for step in group[1:]:
            assert config.num_predicted_at(step, 256) == counts[step] - counts[group[-1] + 1]
            assert dataclasses.replace(config, local_tokens="masked").num_predicted_at(step, 256) == counts[step]


@pytest.mark.parametrize("architecture", [{"encoder_layers": 1}, {"decoder_attention": "self_cross"}, {"reuse": True}], ids=str)
def test_local_steps_are_for_plain_nat(architecture):
    config = SamplerConfig(local_steps=1)
    config.check_model(ENATConfig.preset("nat-s"))
    with pytest.raises(ValueError, match="local_steps is 1, but this model is not a plain NAT"):
        config.check_model(ENATConfig.preset("nat-s", **architecture))


def test_tokens_that_are_masked_again_are_added_to_those_that_the_schedule_leaves():
    config, plain = SamplerConfig(remask_ratio=0.25), SamplerConfig()
    left = [plain.num_masked_at(step, 256) for step in range(9)]
    masked = [256]
    for step in range(8):
        again = (256 - masked[-1]) // 4 if step < 7 else 0
        assert config.num_remasked_at(step, 256) == again
        assert config.num_left_at(step, 256) == left[step + 1]
        masked.append(left[step + 1] + again)
    assert [config.num_masked_at(step, 256) for step in range(9)] == masked and masked[-1] == 0
    with pytest.raises(ValueError, match=r"remask_ratio is 0\.25, but this model reuses features of masked tokens"):
        config.check_model(ENATConfig.preset("enat-s", reused_features="all"))
    dataclasses.replace(config, reuse=False).check_model(ENATConfig.preset("enat-s", reused_features="all"))
    config.check_model(ENATConfig.preset("enat-s"))
