"""The samplers of a search, as numbers that Optuna proposes.

A list of one value a step is a curve from `start` to `end`, v(t) = start + (end - start) * t**power with t from 0 at the first step
to 1 at the last, or as many numbers as steps. Mask ratios are cos(pi/2 * progress**power), of which power 1 is the published
schedule; or each step reveals a share of the tokens that is proportional to a weight of its own, so ratios always fall.

Trials of different lengths or reveal orders have different numbers. They belong to arms that are searched apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from enat import schedule
from enat.sampler_config import SamplerConfig
from pipelines.search.config import SpaceConfig

POWERS = (1 / 3, 3.0)  # of curves: searched in the logarithm
WEIGHTS = (0.05, 20.0)  # of the tokens that a step reveals: searched in the logarithm
_BY_CONFIDENCE = ("confidence", "moment")  # orders that use remask temperatures
_DECIMALS = 5  # of values in lists
_LEAST = 10.0**-_DECIMALS
_NUM_POWERS = 65  # that a given list is compared with


@dataclass(frozen=True)
class Range:
    """Of one number that is proposed. is_log: in the logarithm."""

    low: float
    high: float
    is_log: bool = False

    def clipped(self, value: float) -> float:
        return min(max(float(value), self.low), self.high)


@dataclass(frozen=True)
class Arm:
    """The samplers of one length and one reveal order. base: what is not searched.   name: among other arms, "8" or "8-halton"."""

    name: str
    num_steps: int
    base: SamplerConfig
    space: SpaceConfig

    @property
    def ranges(self) -> dict[str, Range]:
        """Range of every number, by name. Empty if the arm has a single sampler."""
        found: dict[str, Range] = {}
        for name, bounds in self._bounds().items():
            found |= _ranges(name, bounds, self._length(name), self.space.shape)
        if self.space.mask_ratios and self.num_steps > 1:
            found |= (
                {"mask_power": Range(*POWERS, is_log=True)}
                if self.space.shape == "curves"
                else {f"mask_{step}": Range(*WEIGHTS, is_log=True) for step in range(self.num_steps)}
            )
        return found

    def sampler(self, numbers: Mapping[str, float]) -> SamplerConfig:
        """The sampler of some numbers, one for each of `ranges`. Lists are rounded to 5 decimals."""
        lists: dict[str, tuple[float, ...]] = {}
        for name in self._bounds():
            values = _values(name, numbers, self._length(name), self.space.shape)
            # The last step reveals all, whatever the noise on its confidence.
            lists[f"{name}s"] = (*values, *([0.0] if name == "remask_temperature" else []))
        if self.space.mask_ratios and self.num_steps > 1:
            lists["mask_ratios"] = _mask_ratios(numbers, self.num_steps, self.space.shape)
        return self.base.replaced(**lists)

    def nearest(self, sampler: SamplerConfig) -> dict[str, float]:
        """The numbers whose sampler is nearest to a given one of the same length, inside the ranges."""
        found: dict[str, float] = {}
        given = lists_of(sampler)
        for name in self._bounds():
            values = given[f"{name}s"][: self._length(name)]
            if self.space.shape == "steps":
                found |= {f"{name}_{step}": value for step, value in enumerate(values)}
            elif len(values) > 0:
                found |= _nearest_curve(name, values)
        if self.space.mask_ratios and self.num_steps > 1:
            found |= _nearest_mask(given["mask_ratios"], self.space.shape)
        return {name: bounds.clipped(found[name]) for name, bounds in self.ranges.items()}

    def holds(self, sampler: SamplerConfig) -> bool:
        """Whether a sampler has the length and the order of this arm, and values inside the ranges."""
        if (sampler.num_steps, sampler.reveal_order) != (self.num_steps, self.base.reveal_order):
            return False
        given = lists_of(sampler)
        return all(
            bounds[0] <= value <= bounds[1]
            for name, bounds in self._bounds().items()
            for value in given[f"{name}s"][: self._length(name)]
        )

    def _bounds(self) -> dict[str, tuple[float, float]]:
        """Of the schedules that are searched, by name."""
        names = ["guidance_scale", "sampling_temperature"]
        names += ["remask_temperature"] if self.base.reveal_order in _BY_CONFIDENCE else []
        return {name: bounds for name in names if (bounds := getattr(self.space, name)) is not None and self._length(name)}

    def _length(self, name: str) -> int:
        return self.num_steps - (name == "remask_temperature")


def arms_of(space: SpaceConfig, hand_set: SamplerConfig) -> list[Arm]:
    """The arms of a space. hand_set: the sampler of the config. Raises ValueError if it lists values of other steps."""
    steps, orders = space.num_steps or (hand_set.num_steps,), space.reveal_orders or (hand_set.reveal_order,)
    arms = []
    for num_steps, order in product(steps, orders):
        name = f"{num_steps}{f'-{order}' if len(orders) > 1 else ''}"
        arms.append(Arm(name, num_steps, given_at(hand_set, num_steps, order), space))
    return arms


def given_at(sampler: SamplerConfig, num_steps: int, order: str) -> SamplerConfig:
    """A sampler with another number of steps and another order. Raises ValueError if it lists values of its own steps."""
    values: dict[str, object] = {}
    if order != sampler.reveal_order:
        values["reveal_order"] = order
        values |= {"halton_shift": False} if order != "halton" else {}
        if order not in _BY_CONFIDENCE:
            values |= {"remask_temperature": 0.0, "remask_temperature_schedule": "linear"}
    if num_steps != sampler.num_steps:
        values["num_steps"] = num_steps
    try:
        return sampler.replaced(**values)
    except ValueError as error:
        raise ValueError(
            f"the samplers of {num_steps} steps begin with generate.sampler, which cannot have them: {error}"
        ) from error


def lists_of(sampler: SamplerConfig) -> dict[str, tuple[float, ...]]:
    """What a sampler does at each step, as the lists that a config may give."""
    steps = range(sampler.num_steps)
    ratios = sampler.mask_ratios
    if ratios is None:
        progress = [step / sampler.num_steps for step in steps[1:]]
        ratios = (*(schedule.mask_ratio(each, sampler.mask_schedule) for each in progress), 0.0)
    return {
        "mask_ratios": ratios,
        "guidance_scales": tuple(map(sampler.guidance_at, steps)),
        "sampling_temperatures": tuple(map(sampler.sampling_temperature_at, steps)),
        "remask_temperatures": tuple(map(sampler.remask_temperature_at, steps)),
    }


def _ranges(name: str, bounds: tuple[float, float], length: int, shape: str) -> dict[str, Range]:
    if shape == "steps" or length == 1:
        return {f"{name}_{step}": Range(*bounds) for step in range(length)}
    ends = {f"{name}_{end}": Range(*bounds) for end in ("start", "end")}
    return ends | {f"{name}_power": Range(*POWERS, is_log=True)}


def _values(name: str, numbers: Mapping[str, float], length: int, shape: str) -> list[float]:
    if shape == "steps" or length == 1:
        return [round(numbers[f"{name}_{step}"], _DECIMALS) for step in range(length)]
    start, end, power = (numbers[f"{name}_{part}"] for part in ("start", "end", "power"))
    return [round(start + (end - start) * t**power, _DECIMALS) for t in _times(length)]


def _times(length: int) -> list[float]:
    return [step / (length - 1) for step in range(length)]


def _mask_ratios(numbers: Mapping[str, float], num_steps: int, shape: str) -> tuple[float, ...]:
    if shape == "curves":
        power = numbers["mask_power"]
        ratios = [math.cos(math.pi / 2 * ((step + 1) / num_steps) ** power) for step in range(num_steps)]
    else:
        weights = np.array([numbers[f"mask_{step}"] for step in range(num_steps)])
        ratios = (1 - np.cumsum(weights) / weights.sum()).tolist()
    return _falling(ratios)


def _falling(ratios: list[float]) -> tuple[float, ...]:
    """Rounded ratios that fall from below 1 to 0, of ratios that fall by less than their last decimal in places."""
    found, before = [], 1.0
    for left, ratio in zip(range(len(ratios) - 1, -1, -1), ratios, strict=True):
        before = round(min(max(ratio, left * _LEAST), before - _LEAST), _DECIMALS)
        found.append(before)
    return (*found[:-1], 0.0)


def _nearest_curve(name: str, values: tuple[float, ...]) -> dict[str, float]:
    if len(values) == 1:
        return {f"{name}_0": values[0]}
    start, end, t = values[0], values[-1], np.array(_times(len(values)))
    powers = np.geomspace(*POWERS, _NUM_POWERS)
    misses = [np.square(start + (end - start) * t**power - np.array(values)).sum() for power in powers]
    return {f"{name}_start": start, f"{name}_end": end, f"{name}_power": float(powers[int(np.argmin(misses))])}


def _nearest_mask(ratios: tuple[float, ...], shape: str) -> dict[str, float]:
    if shape == "steps":
        shares = np.array([before - after for before, after in pairwise((1.0, *ratios))])
        weights = shares / np.exp(np.log(shares).mean())
        return {f"mask_{step}": float(weight) for step, weight in enumerate(weights)}
    powers = np.geomspace(*POWERS, _NUM_POWERS)
    progress = np.arange(1, len(ratios) + 1) / len(ratios)
    misses = [np.square(np.cos(np.pi / 2 * progress**power) - np.array(ratios)).sum() for power in powers]
    return {"mask_power": float(powers[int(np.argmin(misses))])}
