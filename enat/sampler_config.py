"""What the sampler does at each step, given by a few numbers and named schedules or by one number for each step.

Shape legend: L tokens, V codebook size, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from enat import schedule
from enat.config import ENATConfig, check_choices, check_in

LOWEST_TEMPERATURE = 1e-3
LOCAL_TOKENS = ("group", "masked")
_ORDERS_BY_CONFIDENCE = ("confidence", "moment")
IMAGES_PER_PASS = 32  # that are sampled together, by default; see enat.execution.passes
# A list of values, one a step -> the fields that it replaces. In values_beside the first of these replaces the list in turn.
_REPLACED_BY_LIST = {
    "mask_ratios": ("mask_schedule",),
    "guidance_scales": ("guidance_scale", "guidance_schedule", "guidance_power", "guidance_interval"),
    "sampling_temperatures": ("sampling_temperature", "sampling_temperature_schedule"),
    "remask_temperatures": ("remask_temperature", "remask_temperature_schedule"),
}


def _later(default: Any) -> Any:
    """A field that earlier versions did not have: keys of artifacts do not contain it while it has its default."""
    return field(default=default, metadata={"added": True})


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The defaults are the published settings at 256 px.

    Strategies found by search (AutoNAT, Ni et al. 2024, arXiv 2406.05478) are lists of one value a step. A list replaces its scalar
    and its schedule. Raises ValueError for impossible values and for values that would be ignored: a field that a list replaces and
    that is not at its default, top_k and top_p if nothing is drawn, and remask_temperature if confidence is not used. A schedule of
    a scalar that is off (guidance 1, temperature 0) is allowed, because scalars are swept.
    """

    num_steps: int = 8
    """Passes of the model for one image."""
    guidance_scale: float = 3.5
    """w in uncond + w (cond - uncond); 1 is off. The published "cfg" s is w = 1 + s: 2.5 there is 3.5 here."""
    sampling_temperature: float = 6.0
    """Temperature of drawing codes; 0 takes the most likely code."""
    remask_temperature: float = 1.5
    """Scale of the Gumbel noise on the confidence; 0 adds none."""
    mask_schedule: str = "cosine"
    """Share of masked tokens by progress: cosine, arccos, linear, square, cubic or square_root."""
    guidance_schedule: str = "linear"
    """Guidance by progress: "linear" from 1 to guidance_scale, "constant", or "power_cosine" (MDT)."""
    reuse: bool = True
    """Reuse features of the step before, if the model was made with reuse."""
    guidance_power: float = 1.0
    """Exponent of guidance_schedule "power_cosine"; other schedules do not have one."""
    sampling_temperature_schedule: str = "linear"
    """sampling_temperature by progress: "linear" down to 0, or "constant"."""
    remask_temperature_schedule: str = "linear"
    """remask_temperature by progress: "linear" down to 0, or "constant"."""
    reveal_order: str = "confidence"
    """Which tokens are revealed first: those of the highest "confidence" (published); those of the highest "moment", which chooses
    positions before it draws codes (arXiv 2510.04525); a "random" order of each image; or a "halton" sequence over the grid, the
    same for all images (Halton-MaskGIT, arXiv 2503.17076). "random" and "halton" do not use confidence and need remask_temperature
    0."""
    top_k: int | None = None
    """Draw among the k most likely codes, after the temperature; null for all. Confidence is computed before top_k and top_p."""
    top_p: float = 1.0
    """Draw among the fewest codes (of the top_k) that hold at least this probability, after the temperature; 1 for all."""
    mask_ratios: tuple[float, ...] | None = None
    """Share of tokens left masked after each step: falling, and 0 after the last. Replaces mask_schedule."""
    guidance_scales: tuple[float, ...] | None = None
    """guidance_scale of each step. Replaces guidance_scale, guidance_schedule and guidance_power."""
    sampling_temperatures: tuple[float, ...] | None = None
    """sampling_temperature of each step. Replaces sampling_temperature and its schedule."""
    remask_temperatures: tuple[float, ...] | None = None
    """remask_temperature of each step. Replaces remask_temperature and its schedule."""
    guidance_interval: tuple[float, float] = _later((0.0, 1.0))
    """Start and end of guidance by progress (step / num_steps), in [0, 1]; the end is not included. Other steps are not guided
    (arXiv 2404.07724), and save their unconditional pass where nothing reuses its features."""
    halton_shift: bool = _later(False)
    """Shift the "halton" order over the grid, around its edges, by a random offset of each image."""
    remask_ratio: float = _later(0.0)
    """Share of the tokens revealed by earlier steps that each step masks again, drawn at random, which can correct errors (ReMDM at
    a constant rate, arXiv 2503.00307). Given tokens stay, and features of tokens that are masked again are not reused. Not for
    models that reuse features of masked tokens."""
    entropy_bound: float | None = _later(None)
    """Reveal as many tokens at each step as this bound allows, in place of a schedule: in the reveal order, while the sum of the
    entropies of their predictions without the largest one is at most the bound; at least one token (EB-Sampler, arXiv 2505.24857).
    num_steps is then the most passes, of which the last reveals all that remain. Entropies are those of the guided prediction,
    before temperature, top_k and top_p, so high temperatures reveal codes that the bound does not stand for. An image that is done
    early never reaches the end of a schedule: take constant ones. Images are computed one by one, because each has its own numbers.
    Null follows the schedule. Unit: nats."""
    guide_layers: int | None = _later(None)
    """Self-guidance: guide away from what the model predicts without its later layers, instead of from its prediction for the null
    label. Logits are early + w (full - early), both for the same label, where w is guidance_scale with its schedule; 1 is off. One
    pass suffices, and models without labels can be guided. With an encoder, "early" is the prediction from the first guide_layers
    of its blocks: the decoder, which is shallow, runs twice, and a step without newly visible tokens is not guided. In plain NAT it
    is the output head after the first guide_layers of all blocks. Autoguidance (arXiv 2406.02507) guides away from a smaller, less
    trained model; that the first layers stand for it is this library's choice, and needs no training. Null takes the null label."""
    local_steps: int = _later(0)
    """Cheap steps after each full one, of the num_steps, for plain NAT (ReCAP, arXiv 2505.19089): a local step computes few tokens,
    which attend to the keys and values that the full step left of all others. The full step ranks the masked tokens, and those that
    it and its local steps will reveal are their group. Published: what is kept, that the group is computed, and that it keeps the
    order in which the full step ranked it. Ours: a code that is drawn for ranking is also the one that is revealed, and
    temperatures and guidance follow the steps. Not for models with an encoder or with reuse, which save the same work by
    training."""
    local_start: int = _later(0)
    """Steps at the beginning that are all full; the published runs have 12 of 32 or 8 of 16, with local_steps 1."""
    local_tokens: str = _later("group")
    """Tokens that local steps compute: their "group" (published), or all that were "masked" at the full step, which then are ranked
    again by each local step (not published): only tokens that were visible there are kept."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "num_steps", "top_k", "guide_layers")
        check_in(self, "[0, inf)", "guidance_scale", "sampling_temperature", "remask_temperature")
        check_in(self, "(0, inf)", "guidance_power")
        check_in(self, "(0, 1]", "top_p")
        check_in(self, "[0, 1)", "remask_ratio")
        check_in(self, "[0, inf)", "entropy_bound", "local_steps", "local_start")
        check_choices(self, mask_schedule=schedule.MASK_SCHEDULES, guidance_schedule=schedule.GUIDANCE_SCHEDULES)
        check_choices(self, reveal_order=schedule.REVEAL_ORDERS, local_tokens=LOCAL_TOKENS)
        for name in ("sampling_temperature_schedule", "remask_temperature_schedule"):
            check_choices(self, **{name: schedule.TEMPERATURE_SCHEDULES})
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        for name in _REPLACED_BY_LIST:
            if getattr(self, name) is not None:  # YAML and JSON have lists only
                object.__setattr__(self, name, tuple(getattr(self, name)))
                self._check_list(name)
        self._check_drawing()
        self._check_numbers()

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        for replaced in _REPLACED_BY_LIST[name]:
            if getattr(self, replaced) != _DEFAULTS[replaced]:
                raise ValueError(f"{name} lists the values of all steps; leave out {replaced} {getattr(self, replaced)!r}")
        if len(values) != self.num_steps:
            raise ValueError(f"{name} has {len(values)} values for {self.num_steps} steps; give one value a step")
        for step, value in enumerate(values):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}[{step}] is {value}; it must be finite and at least 0")
        if name == "mask_ratios":
            if values[-1] != 0:
                raise ValueError(f"mask_ratios ends with {values[-1]}; the last step leaves nothing masked, so it must end with 0")
            for step, (before, after) in enumerate(pairwise((1.0, *values))):
                if after >= before:
                    raise ValueError(f"mask_ratios[{step}] is {after} after {before}; the ratios must fall from below 1 to 0")

    def _check_drawing(self) -> None:
        if self.guidance_power != 1.0 and self.guidance_schedule != "power_cosine":
            raise ValueError(f"guidance_power is {self.guidance_power}, but only guidance_schedule 'power_cosine' has a power")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(
                f"guidance_interval is {[*self.guidance_interval]}; it must be [start, end] with 0 <= start < end <= 1"
            )
        if self.halton_shift and self.reveal_order != "halton":
            raise ValueError(f"halton_shift is set, but reveal_order is {self.reveal_order!r}; only 'halton' can be shifted")
        if self.reveal_order not in _ORDERS_BY_CONFIDENCE:
            if any(self.remask_temperatures if self.remask_temperatures is not None else (self.remask_temperature,)):
                raise ValueError(
                    f"reveal_order {self.reveal_order!r} does not use confidence and its noise; set remask_temperature to 0"
                )
            if self.remask_temperature_schedule != "linear":
                raise ValueError(f"reveal_order {self.reveal_order!r} does not use remask_temperature_schedule; leave it out")
        if not any(self.sampling_temperatures or (self.sampling_temperature,)):
            for name in ("top_k", "top_p"):
                if getattr(self, name) != _DEFAULTS[name]:
                    value = getattr(self, name)
                    raise ValueError(f"{name} is {value}, but at sampling_temperature 0 nothing is drawn; leave {name} out")

    def _check_numbers(self) -> None:
        """Of tokens that steps reveal."""
        if self.entropy_bound is not None:
            for name in ("mask_schedule", "mask_ratios", "remask_ratio", "local_steps"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(
                        f"entropy_bound chooses how many tokens a step reveals; leave out {name} {getattr(self, name)!r}, which "
                        "belongs to a schedule"
                    )
        if self.local_steps:
            if self.remask_ratio:
                raise ValueError(
                    f"local_steps is {self.local_steps}, and what they keep of tokens would not hold once remask_ratio masks them "
                    "again; set one of them to 0"
                )
            if self.local_start + self.local_steps >= self.num_steps:
                raise ValueError(
                    f"local_steps is {self.local_steps} after local_start {self.local_start}, but there are {self.num_steps} "
                    "steps, and the first of a group is full; take fewer"
                )
        elif self.local_start or self.local_tokens != _DEFAULTS["local_tokens"]:
            raise ValueError("local_start and local_tokens are for local_steps, of which there are none; leave them out")

    def values_beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of this sampler that remain valid once the given ones are set.

        A given list replaces the scalar and the schedule of this sampler, and a given scalar (or mask_schedule) replaces its list;
        what is replaced returns to its default. Raises ValueError if a list and its scalar are both given.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for of_steps, others in _REPLACED_BY_LIST.items():
            has_list, scalar = given.get(of_steps) is not None, others[0]
            if has_list and (both := [name for name in others if name in given]):
                raise ValueError(f"{of_steps} lists the values of all steps; leave out {both[0]}")
            replaced = others if has_list else (of_steps,) if scalar in given else ()
            values |= {name: _DEFAULTS[name] for name in replaced}
        return values

    def replaced(self, **given: Any) -> SamplerConfig:
        """This sampler with the given values; see values_beside. Raises ValueError as the constructor does."""
        return SamplerConfig(**{**self.values_beside(given), **given})

    @property
    def is_guided(self) -> bool:
        """Whether the config turns guidance on at any step."""
        return any(scale != 1.0 for scale in (self.guidance_scales or (self.guidance_scale,)))

    def guidance_at(self, step: int) -> float:
        if self.guidance_scales is not None:
            return self.guidance_scales[step]
        progress, (start, end) = step / self.num_steps, self.guidance_interval
        if not start <= progress < end:  # progress never reaches 1
            return 1.0
        return schedule.guidance_weight(progress, self.guidance_scale, self.guidance_schedule, self.guidance_power)

    def sampling_temperature_at(self, step: int) -> float:
        """0, or at least 1e-3: the published sampler draws at that temperature in the last step."""
        if self.sampling_temperatures is not None:
            value = start = self.sampling_temperatures[step]
        else:
            start = self.sampling_temperature
            value = schedule.temperature((step + 1) / self.num_steps, start, self.sampling_temperature_schedule)
        return max(value, LOWEST_TEMPERATURE) if start else 0.0

    def remask_temperature_at(self, step: int) -> float:
        if self.remask_temperatures is not None:
            return self.remask_temperatures[step]
        return schedule.temperature((step + 1) / self.num_steps, self.remask_temperature, self.remask_temperature_schedule)

    def num_masked_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens masked in the input of `step`; for num_steps, the number left at the end, 0.

        `num_tokens`: all L of an image.   `num_given`: how many of them are given, 0 to L-1. Without given tokens, counts are
        rounded down (published). With given tokens few remain: rounding down would draw the first of them alone, at the first
        step, at a high temperature and without guidance. Counts are then rounded to the nearest, and one token is left for the
        last step. Tokens that are masked again (remask_ratio) are added. With entropy_bound these are the most tokens that may
        still be masked.
        """
        return self._scheduled_at(step, num_tokens, num_given) + self.num_remasked_at(step - 1, num_tokens, num_given)

    def num_left_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens that `step` does not reveal, without those that it masks again."""
        return self._scheduled_at(step + 1, num_tokens, num_given)

    def num_remasked_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens that were visible in the input of `step` and are masked after it."""
        count = 0
        for at in range(min(step + 1, self.num_steps - 1) if self.remask_ratio else 0):
            num_masked = self._scheduled_at(at, num_tokens, num_given) + count
            count = math.floor(self.remask_ratio * (num_tokens - num_given - num_masked))
        return count if step < self.num_steps - 1 else 0

    def _scheduled_at(self, step: int, num_tokens: int, num_given: int) -> int:
        num_made = num_tokens - num_given
        if step in (0, self.num_steps):
            return num_made if step == 0 else 0
        if self.entropy_bound is not None:
            return max(0, num_made - step)
        if self.mask_ratios is not None:
            ratio = self.mask_ratios[step - 1]
        else:
            ratio = schedule.mask_ratio(step / self.num_steps, self.mask_schedule)
        return max(1, math.floor(num_made * ratio + 0.5)) if num_given else math.floor(num_made * ratio)

    def check_model(self, model: ENATConfig) -> None:
        """Raises ValueError for settings that do not go together with the model."""
        stack, num_layers = ("encoder", model.encoder_layers) if model.encoder_layers else ("decoder", model.decoder_layers)
        if self.guide_layers is not None and self.guide_layers >= num_layers:
            choices = f"choose 1 to {num_layers - 1}" if num_layers > 1 else "leave it out"
            raise ValueError(
                f"guide_layers is {self.guide_layers}, but the {stack} of this model has {num_layers} layers, and the guide must "
                f"have fewer; {choices}"
            )
        if self.local_steps and (model.encoder_layers or model.decoder_attention != "full" or model.reuse):
            raise ValueError(
                f"local_steps is {self.local_steps}, but this model is not a plain NAT (encoder_layers 0, decoder_attention "
                "'full', reuse false), of which a full step can leave keys and values of every token; set local_steps to 0"
            )
        if self.remask_ratio and self.reuse and model.reuses_masked:
            raise ValueError(
                f"remask_ratio is {self.remask_ratio}, but this model reuses features of masked tokens, and those of tokens that "
                "are masked again contain their codes; set remask_ratio to 0, or reuse to false"
            )

    def leaves_features_at(self, step: int, model: ENATConfig, num_given: int = 0) -> bool:
        """Whether the pass of `step` computes features that the next step reuses. `num_given`: given tokens, 0 to L-1."""
        num_masked = self.num_masked_at(step, model.num_tokens, num_given)
        return self.reuse and model.reuse and (model.reuses_masked or num_masked < model.num_tokens)

    def group_at(self, step: int) -> range:
        """The steps of the group that `step` is in: a full one, and its local ones. Without local_steps every step is a group."""
        first = step
        if self.local_steps and step >= self.local_start:
            first -= (step - self.local_start) % (1 + self.local_steps)
        last = first + self.local_steps if first >= self.local_start else first
        return range(first, min(last + 1, self.num_steps))

    def is_local_at(self, step: int) -> bool:
        return step != self.group_at(step).start

    def num_computed_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens that the local steps of the group of `step` compute, of which each has some masked; 0 without local steps."""
        group = self.group_at(step)
        if len(group) == 1:
            return 0
        num_masked = self.num_masked_at(group.start, num_tokens, num_given)
        num_left = self.num_left_at(group[-1], num_tokens, num_given)
        return num_masked - (num_left if self.local_tokens == "group" or num_left == num_masked else 0)

    def num_predicted_at(self, step: int, num_tokens: int, num_given: int = 0) -> int:
        """Tokens whose codes `step` predicts: the masked ones, in a local step those that it computes."""
        num_masked = self.num_masked_at(step, num_tokens, num_given)
        if not self.is_local_at(step):
            return num_masked
        num_kept = self.num_masked_at(self.group_at(step).start, num_tokens, num_given)
        return num_masked - (num_kept - self.num_computed_at(step, num_tokens, num_given))

    def unguided(self) -> SamplerConfig:
        """This sampler without guidance."""
        return self.replaced(**{name: _DEFAULTS[name] for name in _REPLACED_BY_LIST["guidance_scales"]} | {"guidance_scale": 1.0})

    def num_passes_at(self, step: int, model: ENATConfig, num_given: int = 0, *, has_guide: bool = False) -> int:
        """2 with an unconditional pass, 1 without.

        In an unguided step the unconditional pass matters only through its features, which a later guided step reuses: each pass
        reuses its own. At step 0 without given tokens nothing is visible, so no visible token can be reused later. An
        unconditional model has no second condition to guide away from, and self-guidance (guide_layers) takes none. What a full
        step leaves to its local steps is needed for the passes of each. The same holds for the pass of another model that guides
        (has_guide: `model` is its architecture).
        """
        if (not model.is_conditional and not has_guide) or self.guide_layers is not None:
            return 1
        is_guided_later = any(self.guidance_at(later) != 1.0 for later in range(step + 1, self.num_steps))
        if not self.is_local_at(step) and any(self.guidance_at(local) != 1.0 for local in self.group_at(step)):
            return 2
        counts = self.guidance_at(step) != 1.0 or (is_guided_later and self.leaves_features_at(step, model, num_given))
        return 2 if counts else 1

    def guides_itself_at(self, step: int, model: ENATConfig, num_given: int = 0) -> bool:
        """Whether the pass of `step` also predicts with the first layers only, which differs if it encodes new tokens."""
        if self.guide_layers is None or self.guidance_at(step) == 1.0:
            return False
        if not model.encoder_layers:
            return True
        num_new = model.num_tokens - self.num_masked_at(step, model.num_tokens, num_given)
        if step and model.reuses_visible and self.leaves_features_at(step - 1, model, num_given):
            counts = (self.num_masked_at, self.num_remasked_at)
            num_new -= model.num_tokens - sum(count(step - 1, model.num_tokens, num_given) for count in counts)
        return num_new > 0


_DEFAULTS = {each.name: each.default for each in fields(SamplerConfig)}
