"""Settings of the sampler: what they say of each step, and what is refused."""

import dataclasses
import json

import pytest
from slow_sampler import RANDOM, SEARCHED

from enat import SamplerConfig


def test_settings_come_back_from_json_where_tuples_are_lists():
    config = SamplerConfig(**SEARCHED)
    again = SamplerConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_new_settings_leave_the_published_ones_as_they_are():
    config = SamplerConfig()
    assert [config.num_masked_at(step, 256) for step in range(9)] == [256, 251, 236, 212, 181, 142, 97, 49, 0]
    assert [config.guidance_at(step) for step in range(8)] == [1 + 2.5 * step / 8 for step in range(8)]
    assert [config.sampling_temperature_at(step) for step in range(8)] == [5.25, 4.5, 3.75, 3.0, 2.25, 1.5, 0.75, 1e-3]
    assert [config.remask_temperature_at(step) for step in range(8)] == [1.5 * (1 - (step + 1) / 8) for step in range(8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3, "mask_ratios": (0.5, 0.0)}, "mask_ratios has 2 values for 3 steps; give one value a step"),
        ({"guidance_scales": ()}, "guidance_scales has 0 values for 8 steps"),
        ({"num_steps": 2, "mask_ratios": (0.5, 0.1)}, "mask_ratios ends with 0.1"),
        ({"num_steps": 3, "mask_ratios": (0.5, 0.6, 0.0)}, r"mask_ratios\[1\] is 0.6 after 0.5; the ratios must fall"),
        ({"num_steps": 3, "mask_ratios": (0.5, 0.5, 0.0)}, r"mask_ratios\[1\] is 0.5 after 0.5"),
        ({"num_steps": 2, "mask_ratios": (1.0, 0.0)}, r"mask_ratios\[0\] is 1.0 after 1.0"),
        ({"num_steps": 2, "mask_ratios": (float("nan"), 0.0)}, r"mask_ratios\[0\] is nan"),
        ({"num_steps": 2, "guidance_scales": (1.0, -0.5)}, r"guidance_scales\[1\] is -0.5; it must be finite and at least 0"),
        ({"num_steps": 2, "sampling_temperatures": (1.0, float("inf"))}, r"sampling_temperatures\[1\] is inf"),
        ({"num_steps": 2, "mask_ratios": (0.5, 0.0), "mask_schedule": "arccos"}, "so mask_schedule 'arccos' is to be left out"),
        (
            {"num_steps": 2, "guidance_scales": (1, 2), "guidance_schedule": "constant"},
            "guidance_schedule 'constant' is to be left out",
        ),
        (
            {"num_steps": 2, "remask_temperatures": (1, 0), "remask_temperature_schedule": "constant"},
            "remask_temperature_schedule 'constant' is to be left out",
        ),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"reveal_order": "spiral"}, "'spiral'; choose one of confidence, random, halton"),
        ({"reveal_order": "halton"}, "'halton' looks at no confidence to add noise to; set remask_temperature to 0"),
        ({"reveal_order": "random", "num_steps": 2, "remask_temperatures": (0.0, 1.0)}, "looks at no confidence"),
        ({**RANDOM, "remask_temperature_schedule": "constant"}, "no use for remask_temperature_schedule"),
        ({"guidance_power": 2.0}, "guidance_power is 2.0, but only guidance_schedule 'power_cosine' has a power"),
        ({"guidance_schedule": "power_cosine", "guidance_power": 0.0}, "guidance_power is 0.0; it must be finite and above 0"),
        ({"sampling_temperature_schedule": "cosine"}, "no temperature schedule is called 'cosine'; choose one of linear, constant"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_or_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


def test_lists_of_zeros_are_no_noise():
    config = SamplerConfig(reveal_order="halton", num_steps=2, remask_temperatures=(0, 0))
    assert config.remask_temperatures == (0, 0)
