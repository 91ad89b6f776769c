"""Numbers that Optuna proposes are valid samplers, and given samplers have numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enat.sampler_config import SamplerConfig
from pipelines.sampling.presets import presets
from pipelines.search.config import SHAPES, SearchConfig, SpaceConfig
from pipelines.search.space import Arm, arms_of, lists_of

HAND_SET = SamplerConfig(num_steps=8, guidance_scale=2.0, sampling_temperature=4.0, remask_temperature=6.0)


def _arm(shape: str = "curves", num_steps: int = 8, **space: object) -> Arm:
    values = {"guidance_scale": (1.0, 3.0), "sampling_temperature": (0.0, 6.0), "remask_temperature": (0.0, 10.0), **space}
    return arms_of(SpaceConfig(shape=shape, num_steps=(num_steps,), **values), HAND_SET)[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    num_steps=st.sampled_from([1, 2, 3, 8, 64, 256]),
    order=st.sampled_from(["confidence", "moment", "random", "halton"]),
)
@settings(deadline=None, max_examples=60)
def test_any_numbers_are_a_sampler_inside_the_space(seed: int, shape: str, num_steps: int, order: str) -> None:
    """SamplerConfig itself refuses ratios that do not fall, and noise for orders without confidence."""
    space = SpaceConfig(shape=shape, num_steps=(num_steps,), reveal_orders=(order,))
    (arm,) = arms_of(space, HAND_SET)
    rng = np.random.default_rng(seed)
    ends = {name: rng.choice([each.low, each.high, rng.uniform(each.low, each.high)]) for name, each in arm.ranges.items()}
    sampler = arm.sampler(ends)
    assert (sampler.num_steps, sampler.reveal_order) == (num_steps, order)
    assert arm.holds(sampler)


def test_a_curve_is_computed_as_it_is_described() -> None:
    numbers = dict.fromkeys(_arm().ranges, 1.0) | {
        "guidance_scale_start": 1.0,
        "guidance_scale_end": 3.0,
        "guidance_scale_power": 2.0,
    }
    sampler = _arm().sampler(numbers | {"mask_power": 2.0})
    slow_guidance, slow_ratios = [], []
    for step in range(8):
        slow_guidance.append(round(1.0 + 2.0 * (step / 7) ** 2, 5))
        slow_ratios.append(round(math.cos(math.pi / 2 * ((step + 1) / 8) ** 2), 5))
    assert sampler.guidance_scales == tuple(slow_guidance)
    assert sampler.mask_ratios == pytest.approx(slow_ratios, abs=1e-9)


def test_each_step_reveals_the_share_of_its_weight() -> None:
    arm = _arm("steps", num_steps=4)
    numbers = {name: each.low for name, each in arm.ranges.items()} | {
        f"mask_{step}": weight for step, weight in enumerate((4, 3, 2, 1))
    }
    ratios = arm.sampler(numbers).mask_ratios
    assert ratios == (0.6, 0.3, 0.1, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hand_set_sampler_is_in_the_space(shape: str) -> None:
    """Its linear schedules are curves, so the search begins with what it does."""
    arm = _arm(shape)
    assert arm.holds(HAND_SET)
    found, wanted = lists_of(arm.sampler(arm.nearest(HAND_SET))), lists_of(HAND_SET)
    for name, values in wanted.items():
        # The lowest temperature at which codes are drawn is 0.001.
        assert found[name] == pytest.approx(values, abs=2e-3), name


def test_the_nearest_curve_is_that_of_a_slow_search() -> None:
    sampler, arm = presets()["autonat-8"], _arm()
    values = sampler.sampling_temperatures
    assert values is not None
    best, least = 0.0, math.inf
    for number in range(1000):
        power = (1 / 3) * 9 ** (number / 999)
        miss = 0.0
        for step in range(8):
            miss += (values[0] + (values[-1] - values[0]) * (step / 7) ** power - values[step]) ** 2
        if miss < least:
            best, least = power, miss
    nearest = arm.nearest(sampler)
    assert nearest["sampling_temperature_power"] == pytest.approx(best, rel=0.05)
    assert (nearest["sampling_temperature_start"], nearest["sampling_temperature_end"]) == (values[0], values[-1])


def test_a_preset_outside_a_range_is_not_in_the_space() -> None:
    sampler = presets()["autonat-8"]
    assert _arm().holds(sampler)
    assert not _arm(guidance_scale=(1.0, 2.5)).holds(sampler), "its guidance reaches 2.6"
    assert not _arm(num_steps=4).holds(sampler)


def test_what_is_not_searched_stays() -> None:
    arm = _arm(guidance_scale=None, mask_ratios=False)
    sampler = arm.sampler({name: each.high for name, each in arm.ranges.items()})
    assert sampler.guidance_scale == 2.0 and sampler.guidance_scales is None and sampler.mask_ratios is None
    assert sampler.sampling_temperatures == (6.0,) * 8


def test_arms_are_steps_and_orders() -> None:
    space = SpaceConfig(num_steps=(4, 8), reveal_orders=("confidence", "halton"))
    arms = arms_of(space, HAND_SET)
    assert [arm.name for arm in arms] == ["4-confidence", "4-halton", "8-confidence", "8-halton"]
    assert "remask_temperature_start" in arms[0].ranges
    assert not any(name.startswith("remask") for name in arms[1].ranges), "halton does not use confidence"
    assert all(before.mask_ratios is None for before in (arm.base for arm in arms))


def test_lists_of_other_steps_are_refused() -> None:
    listed = presets()["autonat-8"]
    with pytest.raises(ValueError, match=r"samplers of 4 steps begin with generate\.sampler, which cannot have them"):
        arms_of(SpaceConfig(num_steps=(4,)), listed)


def test_lists_of_a_sampler_make_the_same_sampler() -> None:
    """What the page draws is what the sampler does."""
    lists = lists_of(HAND_SET)
    listed = SamplerConfig(num_steps=8, **lists)
    for step in range(8):
        assert listed.num_masked_at(step, 16) == HAND_SET.num_masked_at(step, 16)
        assert listed.guidance_at(step) == HAND_SET.guidance_at(step)
        assert listed.sampling_temperature_at(step) == HAND_SET.sampling_temperature_at(step)
        assert listed.remask_temperature_at(step) == HAND_SET.remask_temperature_at(step)
    assert all(after < before for before, after in pairwise((1.0, *lists["mask_ratios"])))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": (3.0, 1.0)}, r"guidance_scale is \[3\.0, 1\.0\]; it must be \[lowest, highest\]"),
        ({"remask_temperature": (-1.0, 1.0)}, r"remask_temperature is \[-1\.0, 1\.0\]"),
        ({"sampling_temperature": (1.0,)}, r"sampling_temperature is \[1\.0\]"),
        ({"num_steps": (8, 8)}, "num_steps lists 8 twice"),
        ({"num_steps": (0,)}, "num_steps lists 0; a sampler has at least 1 step"),
        ({"reveal_orders": ("spiral",)}, "reveal_orders lists 'spiral'; choose from confidence"),
        ({"shape": "lines"}, "shape is 'lines'; choose one of curves, steps"),
        (
            {"mask_ratios": False, "guidance_scale": None, "sampling_temperature": None, "remask_temperature": None},
            "space is empty: it leaves every value as it is",
        ),
    ],
)
def test_impossible_spaces_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpaceConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "frechet_distanc"}, "metric is 'frechet_distanc', which is not a score; did you mean frechet_distance"),
        ({"metric": "beauty"}, "metric is 'beauty', which is not a score; scores are"),
        ({"max_gmacs": 0.0}, "max_gmacs is 0.0; it must be above 0"),
        ({"num_trials": 0}, "num_trials is 0; it must be at least 1"),
        ({"reduction": 1}, "reduction is 1; it must be at least 2"),
        ({"heldout_seed": -1}, "heldout_seed is -1; it must be at least 0"),
    ],
)
def test_impossible_searches_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**values)
