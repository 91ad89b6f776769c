"""Parallel decoding in a few steps: predict, guide, draw, re-mask (paper sec. 3 and 4.2, MaskGIT-style).

Shape legend: B images, L tokens, V codebook size, N steps, M masked tokens of the step at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from enat import schedule
from enat.config import ENATConfig
from enat.model import ENAT, ENATOutput, TextCondition

_LOWEST_TEMPERATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Defaults are the published settings at 256 px.

    guidance_scale: w in uncond + w (cond - uncond), 1 = off. The published "cfg" s is w = 1 + s (2.5 there is 3.5 here).
    sampling_temperature: of drawing codes, falling linearly; 0 takes the most likely code.
    remask_temperature: of the Gumbel noise on confidence, falling linearly; 0 adds none.
    reuse: take features from the step before (acts with a model made with reuse).
    """

    num_steps: int = 8
    guidance_scale: float = 3.5
    sampling_temperature: float = 6.0
    remask_temperature: float = 1.5
    mask_schedule: str = "cosine"
    guidance_schedule: str = "linear"
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; at least 1 is needed")
        for name in ("guidance_scale", "sampling_temperature", "remask_temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        schedule.mask_ratio(0.0, self.mask_schedule)
        schedule.guidance_weight(0.0, 1.0, self.guidance_schedule)

    def guidance_at(self, step: int) -> float:
        return schedule.guidance_weight(step / self.num_steps, self.guidance_scale, self.guidance_schedule)

    def sampling_temperature_at(self, step: int) -> float:
        """0, or at least 1e-3: the published sampler draws at that temperature in the last step."""
        falling = schedule.temperature((step + 1) / self.num_steps, self.sampling_temperature)
        return max(falling, _LOWEST_TEMPERATURE) if self.sampling_temperature else 0.0

    def num_masked_at(self, step: int, num_tokens: int) -> int:
        """Tokens masked in the input of `step`; num_steps gives what is left at the end, 0."""
        return num_tokens if step == 0 else schedule.num_masked_after(step - 1, self.num_steps, num_tokens, self.mask_schedule)

    def num_passes_at(self, step: int, model: ENATConfig) -> int:
        """2 with an unconditional pass, 1 without.

        An unguided first step needs none where only features of visible tokens are reused: nothing is visible at step 0, so its
        unconditional pass leaves nothing. Later steps keep theirs while any step is guided, because each pass reuses its own
        features. An unconditional model has nothing to be guided away from.
        """
        is_guided = model.is_conditional and any(self.guidance_at(any_step) != 1.0 for any_step in range(self.num_steps))
        leaves_nothing = not (self.reuse and model.reuses_masked)
        return 1 if not is_guided or (step == 0 and leaves_nothing and self.guidance_at(0) == 1.0) else 2


@torch.no_grad()  # not inference_mode: codes may be fed to a model that is being trained
def sample(
    model: ENAT,
    labels: Tensor | TextCondition,
    config: SamplerConfig,
    *,
    seeds: Sequence[int],
    return_trajectory: bool = False,
) -> Any:
    """Codes for labels int64 (B,), or captions -> int64 (B, L) in [0, V), on the model's device. The model must be in eval mode.

    labels: an unconditional model has one, 0. Guidance leads away from the null label, or from the empty caption.
    seeds: one int per image. An image depends on its own seed and label only, not on what else is in the batch.
    return_trajectory: return (codes, trajectory) with the tokens fed at each step, N tensors int64 (B, L).
    Raises ValueError where the numbers of seeds and labels differ, a label is out of range, captions do not fit the model, or the
    model is in training mode.
    """
    _check(model, labels, seeds)
    device = model.token_embedding.weight.device
    num_images, num_tokens, mask_id = len(labels), model.config.num_tokens, model.config.mask_id
    uniforms = _draw_uniforms(seeds, config.num_steps, num_tokens).to(device)
    conditions = _concatenate(labels.to(device), model.null_condition(num_images))
    tokens = torch.full((num_images, num_tokens), mask_id, dtype=torch.int64, device=device)
    previous: ENATOutput | None = None
    trajectory = []
    for step in range(config.num_steps):
        trajectory.append(tokens)
        progress = (step + 1) / config.num_steps
        num_masked, num_left = config.num_masked_at(step, num_tokens), config.num_masked_at(step + 1, num_tokens)

        # Predict. Conditional and unconditional passes share a batch; each has its own features to reuse.
        num_passes = config.num_passes_at(step, model.config)
        output = model(
            tokens.repeat(num_passes, 1), conditions[: num_passes * num_images], previous, num_masked=num_masked, logits="masked"
        )
        leaves_features = num_masked < num_tokens or model.config.reuses_masked
        previous = output if config.reuse and model.config.reuse and leaves_features else None

        # Guide.
        cond_logits, uncond_logits = output.logits.float().chunk(2) if num_passes == 2 else (output.logits.float(), None)
        logits = cond_logits
        if uncond_logits is not None:
            logits = uncond_logits + config.guidance_at(step) * (cond_logits - uncond_logits)
        log_probs = logits.log_softmax(dim=-1)

        # Draw a code for every masked token; confidence is its untempered log-probability, with noise.
        masked_index = output.masked_index[:num_images]
        token_noise, remask_noise = (uniforms[:, step, kind].gather(1, masked_index) for kind in (0, 1))
        sampled_codes = _draw_codes(log_probs, config.sampling_temperature_at(step), token_noise)
        confidence = log_probs.gather(-1, sampled_codes[..., None])[..., 0]
        confidence = confidence - schedule.temperature(progress, config.remask_temperature) * torch.log(-torch.log(remask_noise))

        # Re-mask the least confident. Visible tokens never change.
        least_confident = confidence.argsort(dim=1, stable=True)[:, :num_left]
        tokens = tokens.scatter(1, masked_index, sampled_codes.scatter(1, least_confident, mask_id))
    return (tokens, trajectory) if return_trajectory else tokens


def _draw_codes(log_probs: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Codes (B, M) from softmax(log_probs / temperature) by inverse CDF; the most likely code at temperature 0."""
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    cumulative = (log_probs / temperature).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0]
    return drawn.clamp_max(log_probs.shape[-1] - 1)


def _draw_uniforms(seeds: Sequence[int], num_steps: int, num_tokens: int) -> Tensor:
    """All randomness of a call: float32 (B, N, 2, L) in (0, 1), for drawing codes and for re-masking.

    Drawn on the CPU from each image's own generator, so that batch, worker and device do not change it.
    """
    shape = (num_steps, 2, num_tokens)
    drawn = torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
    return drawn.clamp_min(2.0**-25)  # log(0) would turn zero noise into NaN


def _concatenate(first: Tensor | TextCondition, second: Tensor | TextCondition) -> Tensor | TextCondition:
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        return TextCondition(torch.cat([first.hidden, second.hidden]), torch.cat([first.pooled, second.pooled]))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def _check(model: ENAT, labels: Tensor | TextCondition, seeds: Sequence[int]) -> None:
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds for {len(labels)} labels; give one seed per image")
    if len(labels) == 0:
        raise ValueError("there is nothing to sample: labels is empty")
    if model.training:
        raise ValueError("the model is in training mode, where dropout would disturb samples; call model.eval() first")
    model.check_condition(labels)
    if isinstance(labels, TextCondition):
        return
    if labels.is_floating_point():
        raise ValueError(f"labels have dtype {labels.dtype}; integers are needed")
    if int(labels.min()) < 0 or int(labels.max()) > model.config.null_label:
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; this model knows 0 to {model.config.null_label}"
        )
