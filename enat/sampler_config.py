"""What the sampler does at every step: a few numbers and named schedules, or every number of every step written down.

Shape legend: L tokens, V codebook size, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from enat import schedule
from enat.config import ENATConfig

_LOWEST_TEMPERATURE = 1e-3
# A list of per-step values, and what it takes the place of. What comes first would take the place of a list in return.
_REPLACED_BY_LIST = {
    "mask_ratios": ("mask_schedule",),
    "guidance_scales": ("guidance_scale", "guidance_schedule", "guidance_power"),
    "sampling_temperatures": ("sampling_temperature", "sampling_temperature_schedule"),
    "remask_temperatures": ("remask_temperature", "remask_temperature_schedule"),
}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Defaults are the published settings at 256 px.

    guidance_scale: w in uncond + w (cond - uncond), 1 = off. The published "cfg" s is w = 1 + s (2.5 there is 3.5 here).
    sampling_temperature: of drawing codes; 0 takes the most likely code.
    remask_temperature: of the Gumbel noise on confidence; 0 adds none.
    reuse: take features from the step before (acts with a model made with reuse).
    mask_schedule, guidance_schedule, sampling_temperature_schedule, remask_temperature_schedule: see enat.schedule.
    guidance_power: of guidance_schedule "power_cosine"; other schedules have none.
    reveal_order: which tokens are revealed first: those of the highest "confidence" (published), those of a "random" order of each
        image, or those of a "halton" sequence over the grid, the same for all images (Halton-MaskGIT, arXiv 2503.17076). The last
        two never look at confidence and need remask_temperature 0.
    top_k, top_p: codes are drawn among the k most likely, and of these among the fewest that hold at least top_p of the
        probability, both after the temperature. None and 1.0 leave all. Confidence is taken before either.

    Strategies found by search (AutoNAT, Ni et al. 2024, arXiv 2406.05478) are lists of one value a step. A list takes the place of
    its scalar and of its schedule:
    mask_ratios: share of tokens left masked after each step, falling, 0 after the last.
    guidance_scales, sampling_temperatures, remask_temperatures: as the scalars, at each step.
    Raises ValueError for what cannot be, and for what would be ignored: whatever a list takes the place of, unless it is at its
    default, and top_k, top_p and remask_temperature where nothing is drawn or no confidence looked at. A schedule of a scalar that
    is off (guidance 1, temperature 0) is no mistake: so scalars can be swept.
    """

    num_steps: int = 8
    guidance_scale: float = 3.5
    sampling_temperature: float = 6.0
    remask_temperature: float = 1.5
    mask_schedule: str = "cosine"
    guidance_schedule: str = "linear"
    reuse: bool = True
    guidance_power: float = 1.0
    sampling_temperature_schedule: str = "linear"
    remask_temperature_schedule: str = "linear"
    reveal_order: str = "confidence"
    top_k: int | None = None
    top_p: float = 1.0
    mask_ratios: tuple[float, ...] | None = None
    guidance_scales: tuple[float, ...] | None = None
    sampling_temperatures: tuple[float, ...] | None = None
    remask_temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; at least 1 is needed")
        for name in ("guidance_scale", "sampling_temperature", "remask_temperature"):
            _check_value(name, getattr(self, name))
        schedule.mask_ratio(0.0, self.mask_schedule)
        schedule.guidance_weight(0.0, 1.0, self.guidance_schedule)
        for name in ("sampling_temperature_schedule", "remask_temperature_schedule"):
            schedule.temperature(0.0, 0.0, getattr(self, name))
        for name in _REPLACED_BY_LIST:
            if getattr(self, name) is not None:  # YAML and JSON know lists only
                object.__setattr__(self, name, tuple(getattr(self, name)))
                self._check_list(name)
        self._check_drawing()

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        for replaced in _REPLACED_BY_LIST[name]:
            if getattr(self, replaced) != _DEFAULTS[replaced]:
                raise ValueError(
                    f"{name} lists the values of all steps, so {replaced} {getattr(self, replaced)!r} is to be left out"
                )
        if len(values) != self.num_steps:
            raise ValueError(f"{name} has {len(values)} values for {self.num_steps} steps; give one value a step")
        for step, value in enumerate(values):
            _check_value(f"{name}[{step}]", value)
        if name == "mask_ratios":
            if values[-1] != 0:
                raise ValueError(f"mask_ratios ends with {values[-1]}; the last step leaves nothing masked, so it must end with 0")
            for step, (before, after) in enumerate(pairwise((1.0, *values))):
                if after >= before:
                    raise ValueError(f"mask_ratios[{step}] is {after} after {before}; the ratios must fall from below 1 to 0")

    def _check_drawing(self) -> None:
        if not 0 < self.guidance_power < float("inf"):
            raise ValueError(f"guidance_power is {self.guidance_power}; it must be finite and above 0")
        if self.guidance_power != 1.0 and self.guidance_schedule != "power_cosine":
            raise ValueError(f"guidance_power is {self.guidance_power}, but only guidance_schedule 'power_cosine' has a power")
        if self.reveal_order not in schedule.REVEAL_ORDERS:
            raise ValueError(f"reveal_order is {self.reveal_order!r}; choose one of {', '.join(schedule.REVEAL_ORDERS)}")
        if self.reveal_order != "confidence":
            if any(self.remask_temperatures if self.remask_temperatures is not None else (self.remask_temperature,)):
                raise ValueError(
                    f"reveal_order {self.reveal_order!r} looks at no confidence to add noise to; set remask_temperature to 0"
                )
            if self.remask_temperature_schedule != "linear":
                raise ValueError(f"reveal_order {self.reveal_order!r} has no use for remask_temperature_schedule; leave it out")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or null for all codes")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1, which leaves all codes")
        if not any(self.sampling_temperatures or (self.sampling_temperature,)):
            for name in ("top_k", "top_p"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but at sampling_temperature 0 nothing is drawn: the most likely code is "
                        f"taken; leave {name} out"
                    )

    def values_beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of this sampler that still hold beside given ones, which are to be laid over them.

        A list that is given takes the place of the scalar and the schedule here, a scalar (or mask_schedule) of the list here;
        those are back at their defaults. Raises ValueError where both are given.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for of_steps, others in _REPLACED_BY_LIST.items():
            has_list, scalar = given.get(of_steps) is not None, others[0]
            if has_list and (both := [name for name in others if name in given]):
                raise ValueError(f"{of_steps} lists the values of all steps, so {both[0]} is to be left out")
            replaced = others if has_list else (of_steps,) if scalar in given else ()
            values |= {name: _DEFAULTS[name] for name in replaced}
        return values

    def replaced(self, **given: Any) -> SamplerConfig:
        """This sampler with other values, checked together: see values_beside. Raises ValueError as the constructor does."""
        return SamplerConfig(**{**self.values_beside(given), **given})

    @property
    def is_guided(self) -> bool:
        """Whether guidance is on as configured, at whatever step."""
        return any(scale != 1.0 for scale in (self.guidance_scales or (self.guidance_scale,)))

    def guidance_at(self, step: int) -> float:
        if self.guidance_scales is not None:
            return self.guidance_scales[step]
        progress = step / self.num_steps
        return schedule.guidance_weight(progress, self.guidance_scale, self.guidance_schedule, self.guidance_power)

    def sampling_temperature_at(self, step: int) -> float:
        """0, or at least 1e-3: the published sampler draws at that temperature in the last step."""
        if self.sampling_temperatures is not None:
            value = start = self.sampling_temperatures[step]
        else:
            start = self.sampling_temperature
            value = schedule.temperature((step + 1) / self.num_steps, start, self.sampling_temperature_schedule)
        return max(value, _LOWEST_TEMPERATURE) if start else 0.0

    def remask_temperature_at(self, step: int) -> float:
        if self.remask_temperatures is not None:
            return self.remask_temperatures[step]
        return schedule.temperature((step + 1) / self.num_steps, self.remask_temperature, self.remask_temperature_schedule)

    def num_masked_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens masked in the input of `step`; num_steps gives what is left at the end, 0.

        num_tokens: all L of an image. num_given: those of them that are given, 0 to L-1. Where nothing is, counts are rounded down
        (published). Few that are to be made would so be drawn early, one alone at the first step, hot and unguided: beside what is
        given counts are rounded to the nearest, and the last one is left for the last step.
        """
        num_made = num_tokens - num_given
        if step in (0, self.num_steps):
            return num_made if step == 0 else 0
        if self.mask_ratios is not None:
            ratio = self.mask_ratios[step - 1]
        else:
            ratio = schedule.mask_ratio(step / self.num_steps, self.mask_schedule)
        return max(1, math.floor(num_made * ratio + 0.5)) if num_given else math.floor(num_made * ratio)

    def leaves_features_at(self, step: int, model: ENATConfig, num_given: int = 0) -> bool:
        """Whether the pass of `step` computes anything that the next step reuses. num_given: tokens that are given, 0 to L-1."""
        num_masked = self.num_masked_at(step, model.num_tokens, num_given)
        return self.reuse and model.reuse and (model.reuses_masked or num_masked < model.num_tokens)

    def num_passes_at(self, step: int, model: ENATConfig, num_given: int = 0) -> int:
        """2 with an unconditional pass, 1 without.

        The unconditional pass of an unguided step counts only through its features, which a later guided step reuses: each pass
        reuses its own. At step 0 of a plain run nothing is visible, so there is nothing to reuse of visible tokens; given tokens
        are visible from the first. An unconditional model has nothing to be guided away from.
        """
        if not model.is_conditional:
            return 1
        is_guided_later = any(self.guidance_at(later) != 1.0 for later in range(step + 1, self.num_steps))
        counts = self.guidance_at(step) != 1.0 or (is_guided_later and self.leaves_features_at(step, model, num_given))
        return 2 if counts else 1


_DEFAULTS = {field.name: field.default for field in fields(SamplerConfig)}


def _check_value(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be finite and at least 0")
