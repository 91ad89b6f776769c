"""Parallel decoding in a few steps: predict, guide, draw, re-mask (paper sec. 3 and 4.2, MaskGIT-style).

The settings of each step come from enat/sampler_config.py.
Shape legend: B images, L tokens, V codebook size, N steps, M masked tokens of the step at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from enat import schedule
from enat.model import ENAT, TextCondition
from enat.sampler_config import LOWEST_TEMPERATURE, SamplerConfig
from enat.sampling.predictor import Autoguided, Predictor

Loop = Callable[..., list[Tensor]]  # with the arguments of decode_steps

__all__ = ["SamplerConfig", "decode_steps", "draw_uniforms", "sample"]


@overload
def sample(
    model: ENAT,
    labels: Int64[Tensor, " B"] | TextCondition,
    config: SamplerConfig,
    *,
    seeds: Sequence[int],
    start: Int64[Tensor, "B L"] | None = None,
    guide: ENAT | None = None,
    loop: Loop | None = None,
    return_trajectory: Literal[False] = False,
) -> Int64[Tensor, "B L"]: ...


@overload
def sample(
    model: ENAT,
    labels: Int64[Tensor, " B"] | TextCondition,
    config: SamplerConfig,
    *,
    seeds: Sequence[int],
    start: Int64[Tensor, "B L"] | None = None,
    guide: ENAT | None = None,
    loop: Loop | None = None,
    return_trajectory: Literal[True],
) -> tuple[Int64[Tensor, "B L"], list[Int64[Tensor, "B L"]]]: ...


@torch.no_grad()  # not inference_mode: codes may be fed to a model that is being trained
def sample(
    model: ENAT,
    labels: Int64[Tensor, " B"] | TextCondition,
    config: SamplerConfig,
    *,
    seeds: Sequence[int],
    start: Int64[Tensor, "B L"] | None = None,
    guide: ENAT | None = None,
    loop: Loop | None = None,
    return_trajectory: bool = False,
) -> Int64[Tensor, "B L"] | tuple[Int64[Tensor, "B L"], list[Int64[Tensor, "B L"]]]:
    """Codes in [0, V) for labels or captions, on the model's device. The model must be in eval mode.

    `labels`: an unconditional model has one, 0. Guidance leads away from the null label, or from the empty caption.
    `seeds`: one int per image. An image depends only on its own seed, label and start, not on the rest of the batch.
    `start`: codes that are given and stay, and the mask id V where codes are sampled, equally many in every image. Inpainting,
        outpainting and editing with another label differ only in what is masked; see enat.training.masking.box_mask. None gives
        nothing.
    `guide`: a smaller or less trained model of the same codes and conditions (autoguidance, Karras et al. 2024, arXiv 2406.02507).
        Guidance then leads away from its prediction for the same condition: guide + w (model - guide). It is reused and sampled as
        the model is.
    `loop`: decode_steps, or what replaces it: see enat.sampling.cuda_graph. None is decode_steps.
    `return_trajectory`: return (codes, trajectory) with the tokens fed at each step, N tensors int64 (B, L).
    Raises ValueError if the numbers of seeds and labels differ, a label is out of range, captions do not fit the model, start does
    not meet the conditions above, a guide does not fit the model, or a model is in training mode.
    """
    _check(model, labels, seeds)
    config.check_model(model.config)
    if guide is not None:
        _check_guide(model, guide, config)
    num_given = 0
    if start is None:
        tokens = torch.full((len(labels), model.config.num_tokens), model.config.mask_id, dtype=torch.int64)
    else:
        tokens, num_given = start, _count_given(model, start, len(labels))
    device = model.token_embedding.weight.device
    uniforms = draw_uniforms(seeds, config.num_steps, model.config.num_tokens, 3 if config.remask_ratio else 2).to(device)
    conditions = _concatenate(labels.to(device), model.null_condition(len(labels)))
    order = schedule.halton_order(model.config.grid_size) if config.reveal_order == "halton" else None
    rank = None if order is None else torch.tensor(order, device=device).argsort()
    settings: dict[str, Any] = {"num_given": num_given, "halton_rank": rank}
    if guide is not None:
        settings["guide"] = guide
    if config.entropy_bound is not None and loop is not None:
        raise ValueError(
            "entropy_bound chooses at each step how many tokens it reveals, so its loop cannot be recorded or replaced"
        )
    if loop is None and start is None and not model.is_compiled and config.entropy_bound is None:  # of several images, eagerly
        settings["alike"] = _alike(labels, device)
    if config.entropy_bound is not None:
        states = _one_by_one(model, conditions, tokens.to(device), uniforms, config, **settings)
    else:
        states = (loop or decode_steps)(model, conditions, tokens.to(device), uniforms, config, **settings)
    *trajectory, codes = states
    return (codes, trajectory) if return_trajectory else codes


def _one_by_one(
    model: ENAT, conditions: Tensor | TextCondition, tokens: Tensor, uniforms: Tensor, config: SamplerConfig, **settings: Any
) -> list[Tensor]:
    """decode_steps for images that reveal different numbers of tokens. Alone, an image has the same shapes whatever the others."""
    num_images = len(tokens)
    of_images = []
    for row in range(num_images):
        both = torch.tensor([row, num_images + row], device=tokens.device)
        of_images.append(decode_steps(model, conditions[both], tokens[row : row + 1], uniforms[row : row + 1], config, **settings))
    return [torch.cat(states) for states in zip(*of_images, strict=True)]


@torch.no_grad()
def decode_steps(
    model: ENAT,
    conditions: Tensor | TextCondition,
    tokens: Int64[Tensor, "B L"],
    uniforms: Float32[Tensor, "B N K L"],
    config: SamplerConfig,
    *,
    num_given: int = 0,
    halton_rank: Int64[Tensor, " L"] | None = None,
    alike: tuple[Int64[Tensor, " K"], Int64[Tensor, " B"]] | None = None,
    guide: ENAT | None = None,
) -> list[Int64[Tensor, "B L"]]:
    """The loop of `sample`, entirely on the device: nothing waits for it, and a whole call can be one CUDA graph. Only with
    entropy_bound, for one image at a time, each step waits for the number of tokens that it reveals.

    `conditions`: of 2 B images, those of the B images and then B null ones.   `tokens`: L - num_given mask ids a row.
    `uniforms`: from draw_uniforms.   `halton_rank`: for reveal_order "halton", the place of each token in that order.
    `alike`: for images without given tokens, K of them that stand for all at the first step, and which one stands for each.
    `guide`: see sample.
    Returns the tokens fed at each step and the codes, N + 1 tensors. Of an image that entropy_bound finishes early, the codes stand
    for the steps that were not needed.
    """
    num_tokens, mask_id = tokens.shape[1], model.config.mask_id
    assert config.entropy_bound is None or len(tokens) == 1
    settings: dict[str, Any] = {"num_images": len(tokens), "num_given": num_given, "alike": alike}
    predict: Predictor | Autoguided = (
        Predictor(model, conditions, config, **settings)
        if guide is None
        else Autoguided(model, guide, conditions[: len(tokens)], config, **settings)
    )
    rank = _Ranking(config, uniforms, halton_rank)
    is_given = tokens != mask_id
    states, num_masked = [tokens], num_tokens - num_given
    for step in range(config.num_steps):
        was_visible = tokens != mask_id
        logits, masked_index = predict(step, tokens, num_masked)
        log_probs = logits.log_softmax(dim=-1)

        # Draw a code for every masked token, and rank them from the last to be revealed to the first.
        sampled_codes, confidence = _draw(config, step, log_probs, uniforms[:, step, 0].gather(1, masked_index))
        order = rank(step, masked_index, confidence)

        # Re-mask those of the lowest priority. Visible tokens change only by remask_ratio.
        if config.entropy_bound is None:
            num_revealed = num_masked - config.num_left_at(step, num_tokens, num_given)
        else:
            is_last = step == config.num_steps - 1
            num_revealed = num_masked if is_last else _num_within(config.entropy_bound, log_probs, order)
        num_left = order.shape[1] - num_revealed
        tokens = tokens.scatter(1, masked_index, sampled_codes.scatter(1, order[:, :num_left], mask_id))
        num_computed = config.num_computed_at(step, num_tokens, num_given)
        if num_computed and not config.is_local_at(step):
            predict.keep(masked_index.gather(1, order[:, order.shape[1] - num_computed :]))
        num_again = config.num_remasked_at(step, num_tokens, num_given)
        if num_again:
            noise = uniforms[:, step, 2].masked_fill(~was_visible | is_given, float("inf"))
            again = noise.argsort(dim=1, stable=True)[:, :num_again]
            tokens = tokens.scatter(1, again, mask_id)
            predict.forget(again)
        num_masked += num_again - num_revealed
        states.append(tokens)
        if config.entropy_bound is not None and not num_masked:
            break
    return states + [tokens] * (config.num_steps + 1 - len(states))


def _num_within(bound: float, log_probs: Float32[Tensor, "1 M V"], order: Int64[Tensor, "1 M"]) -> int:
    """Tokens to reveal, of those in `order` from the last to be revealed to the first. Waits for the device."""
    entropies = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1).gather(1, order.flip(1))
    within = entropies.cumsum(dim=1) - entropies.cummax(dim=1).values <= bound
    return max(1, int(within.sum()))


def _alike(labels: Tensor | TextCondition, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each label the first image that has it, and the place of each image's label among these. Captions count as different."""
    if isinstance(labels, TextCondition):
        each = torch.arange(len(labels), device=device)
        return each, each
    first: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        first.setdefault(label, index)
    places = {label: place for place, label in enumerate(first)}
    rows, place = [*first.values()], [places[label] for label in labels.tolist()]
    return torch.tensor(rows, device=device), torch.tensor(place, device=device)


def _draw(
    config: SamplerConfig, step: int, log_probs: Float32[Tensor, "B M V"], uniform: Float32[Tensor, "B M"]
) -> tuple[Int64[Tensor, "B M"], Float32[Tensor, "B M"]]:
    """A code for every token, and its confidence: its untempered log-probability, unless the order chooses positions first."""
    temperature, options = config.sampling_temperature_at(step), (config.top_k, config.top_p)
    if config.reveal_order == "moment":
        weights, confidence = _moments(log_probs, temperature, config.remask_temperature_at(step))
        return _draw_codes(weights, 1.0 if temperature else 0.0, uniform, *options), confidence
    sampled_codes = _draw_codes(log_probs, temperature, uniform, *options)
    return sampled_codes, log_probs.gather(-1, sampled_codes[..., None])[..., 0]


def _draw_codes(
    log_probs: Float32[Tensor, "B M V"], temperature: float, uniform: Float32[Tensor, "B M"], top_k: int | None, top_p: float
) -> Int64[Tensor, "B M"]:
    """Codes from softmax(log_probs / temperature) by inverse CDF; the most likely code at temperature 0."""
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    if top_p == 1.0 and (top_k is None or top_k >= log_probs.shape[-1]):
        cumulative = (log_probs / temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0]
        return drawn.clamp_max(log_probs.shape[-1] - 1)
    # From the most likely code down, the lowest first among equals: the codes to draw from come first.
    ordered, codes = log_probs.sort(dim=-1, descending=True, stable=True)
    probs = (ordered[..., :top_k] / temperature).softmax(dim=-1)
    cumulative = probs.cumsum(dim=-1)
    last = (cumulative - probs < top_p).sum(dim=-1, keepdim=True).sub_(1)  # fewest that hold top_p, at least one
    drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative.gather(-1, last), right=True)
    return codes.gather(-1, torch.minimum(drawn, last))[..., 0]


class _Ranking:
    """Which of the masked tokens a step reveals first: by confidence with noise, or in an order that is fixed beforehand.

    The local steps of a group keep the order of its full step, unless they compute all masked tokens.
    """

    def __init__(
        self, config: SamplerConfig, uniforms: Float32[Tensor, "B N K L"], halton_rank: Int64[Tensor, " L"] | None
    ) -> None:
        self.config, self.uniforms = config, uniforms
        self.fixed = _fixed_priority(config, uniforms, halton_rank)
        self.of_group: Float32[Tensor, "B L"] | None = None

    def __call__(self, step: int, masked_index: Int64[Tensor, "B M"], confidence: Float32[Tensor, "B M"]) -> Int64[Tensor, "B M"]:
        """Places in masked_index, from the last to be revealed to the first."""
        if self.fixed is not None:
            priority = self.fixed.gather(1, masked_index)
        elif self.config.is_local_at(step) and self.config.local_tokens == "group":
            assert self.of_group is not None
            priority = self.of_group.gather(1, masked_index)
        else:
            noise = self.uniforms[:, step, 1].gather(1, masked_index)
            priority = confidence - self.config.remask_temperature_at(step) * torch.log(-torch.log(noise))
            if len(self.config.group_at(step)) > 1:
                self.of_group = torch.zeros_like(self.uniforms[:, 0, 0]).scatter(1, masked_index, priority)
        return priority.argsort(dim=1, stable=True)


def _fixed_priority(config: SamplerConfig, uniforms: Tensor, halton_rank: Tensor | None) -> Tensor | None:
    """(B, L), tokens of the highest priority are revealed first; None if confidence decides."""
    assert (halton_rank is not None) == (config.reveal_order == "halton")
    if halton_rank is not None:
        if not config.halton_shift:
            return -halton_rank.expand(len(uniforms), -1)
        side = math.isqrt(len(halton_rank))
        down, right = (uniforms[:, 0, 1, :2] * side).long().clamp_max(side - 1).T[..., None]
        position = torch.arange(side * side, device=uniforms.device)
        return -halton_rank[(position // side - down) % side * side + (position % side - right) % side]
    return uniforms[:, 0, 1] if config.reveal_order == "random" else None  # not needed as noise on the confidence


def _moments(log_probs: Float32[Tensor, "B M V"], temperature: float, remask_temperature: float) -> tuple[Tensor, Tensor]:
    """For reveal_order "moment": what codes are drawn from, as logarithms that are not normalized (B, M, V), and the confidence of
    every position before a code is drawn (B, M).

    With "confidence", a code x is drawn from q = softmax(log p / temperature) and ranked by log p(x) with Gumbel noise of scale s.
    If one token is revealed, its position and code have the probability q(x) p(x)^(1/s) up to a factor. Here the sum of this over
    x, a moment of p, chooses the position, and the code is drawn afterwards (Hayakawa et al. 2025, arXiv 2510.04525).
    """
    scale = max(remask_temperature, LOWEST_TEMPERATURE)
    if temperature == 0:
        return log_probs, log_probs.amax(dim=-1)
    joint = (log_probs / temperature).log_softmax(dim=-1) + log_probs / scale
    return joint, scale * joint.logsumexp(dim=-1)


def draw_uniforms(seeds: Sequence[int], num_steps: int, num_tokens: int, num_kinds: int = 2) -> Float32[Tensor, "B N K L"]:
    """All randomness of a call, in (0, 1): for drawing codes, for ranking them, and with K = 3 for masking again.

    Drawn on the CPU from each image's own generator: batch, worker and device do not change it.
    """
    shape = (num_steps, num_kinds, num_tokens)
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
        raise ValueError("labels is empty; give at least one")
    if model.training:
        raise ValueError("the model is in training mode, in which dropout changes samples; call model.eval() first")
    model.check_condition(labels)
    if isinstance(labels, TextCondition):
        return
    if labels.is_floating_point():
        raise ValueError(f"labels have dtype {labels.dtype}; integers are needed")
    if int(labels.min()) < 0 or int(labels.max()) > model.config.null_label:
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; this model has labels 0 to {model.config.null_label}"
        )


def _check_guide(model: ENAT, guide: ENAT, config: SamplerConfig) -> None:
    if guide.training:
        raise ValueError("the guide is in training mode; call guide.eval() first")
    for name in ("codebook_size", "grid_size", "num_classes", "text_width", "num_text_tokens"):
        own, other = getattr(model.config, name), getattr(guide.config, name)
        if own != other and (name != "num_text_tokens" or model.config.text_width is not None):
            raise ValueError(
                f"the guide has {name} {other}, and the model {own}; a guide predicts the same codes for the same conditions"
            )
    if config.guide_layers is not None:
        raise ValueError("guide_layers and a guide model are both given; guidance leads away from one of them, so leave one out")
    config.check_model(guide.config)


def _count_given(model: ENAT, start: Tensor, num_images: int) -> int:
    """Number of given tokens of every image. Raises ValueError for a start that the sampler cannot continue."""
    num_tokens, mask_id = model.config.num_tokens, model.config.mask_id
    if start.dtype != torch.int64:
        raise ValueError(f"start has dtype {start.dtype}; torch.int64 is needed")
    if start.shape != (num_images, num_tokens):
        raise ValueError(f"start has shape {tuple(start.shape)}; ({num_images}, {num_tokens}) is needed, the tokens of every image")
    if int(start.min()) < 0 or int(start.max()) > mask_id:
        raise ValueError(
            f"start ranges from {int(start.min())} to {int(start.max())}; codes are 0 to {mask_id - 1}, the mask id is {mask_id}"
        )
    counts = (start == mask_id).sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    if fewest != most:
        raise ValueError(f"images of start have {fewest} to {most} masked tokens; all images of a call must have the same number")
    if most == 0:
        raise ValueError(f"start does not contain the mask id, {mask_id}: there is nothing to sample")
    return num_tokens - most
