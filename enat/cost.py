"""Cost of generating an image and of training on one, counted from the architecture.

Convention: one MAC is one multiply-accumulate of a linear layer, convolution or attention product (torch's FlopCounterMode
counts two FLOPs for it). Norms, activations, softmax, embedding look-ups and the codebook search are left out, as in the
paper. The paper's "FLOPs" are these MACs, with both guidance passes and the tokenizer's decoder.

Two computations are counted. *Published*: the head at every position (with the mask id's column) and, with guidance, two passes at
every step. *Executed*: what enat.sampling runs, the head at masked positions only, no unconditional pass in an unguided step
whose features no guided step reuses, and what depends on the condition alone once, counted in the first step. Images of one label
share the first step, which is not counted. Self-guidance (guide_layers) is one pass, with the head, and with an encoder also the
decoder, a second time.

Training counts the backward pass as well, product by product; see training_macs.

Shape legend: D width, L tokens, M masked, V codebook size, N steps, T text tokens, W width of caption features.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from enat.config import ENATConfig, MaskingConfig, VQGANConfig
from enat.sampler_config import SamplerConfig

_RATIOS = 64  # mask ratios that stand for all


@dataclass(frozen=True)
class Cost:
    """MACs of one image, for the published computation and for the one that this code executes."""

    transformer_macs: int  # all steps and passes
    decoder_macs: int  # the tokenizer's decoder; 0 without a tokenizer
    total_macs: int
    macs_per_step: tuple[int, ...]  # transformer, all passes of the step; sums to transformer_macs
    executed_transformer_macs: int
    executed_total_macs: int
    executed_macs_per_step: tuple[int, ...]
    one_pass_macs: int  # transformer, one pass at every step: the figure by which sizes are compared
    executed_one_pass_macs: int

    @property
    def guidance_macs(self) -> int:
        """The unconditional passes, which guidance adds."""
        return self.transformer_macs - self.one_pass_macs

    @property
    def executed_guidance_macs(self) -> int:
        return self.executed_transformer_macs - self.executed_one_pass_macs


def generation_cost(
    model: ENATConfig,
    sampler: SamplerConfig,
    tokenizer: VQGANConfig | None = None,
    *,
    num_given: int = 0,
    num_masked: Sequence[int] | None = None,
    guide: ENATConfig | None = None,
) -> Cost:
    """Cost of one image. With guidance_scale 1 it is one pass a step, the usual basis for comparing sizes.

    `num_given`: tokens given to the sampler as its start, 0 to L-1. Reveal orders, temperatures, top_k and top_p cost no MACs.
    `num_masked`: with entropy_bound, the masked tokens that one image had in the input of each step, 0 for steps that it did not
        need. None counts the image that costs the most as executed, an upper bound.
    `guide`: the architecture of another model that guides, in place of the null condition.
    """
    if not 0 <= num_given < model.num_tokens:
        raise ValueError(f"num_given is {num_given}; of {model.num_tokens} tokens 0 to {model.num_tokens - 1} can be given")
    sampler.check_model(model)
    if num_masked is None and sampler.entropy_bound is not None:
        num_masked = _most_expensive(model, sampler, num_given, guide)
    steps, costs = _steps(model, sampler, num_given, guide), []
    for step in range(sampler.num_steps):
        if num_masked is None:  # tokens that were masked again have nothing to reuse
            masked = sampler.num_masked_at(step, model.num_tokens, num_given)
            counts = (sampler.num_masked_at, sampler.num_remasked_at)
            before = sum(count(step - 1, model.num_tokens, num_given) for count in counts) if step else 0
        else:
            masked, before = num_masked[step], num_masked[step - 1] if step else 0
        is_run = num_masked is None or masked > 0
        costs.append(steps.cost(step, masked, before) if is_run else _StepCost(0, 0, 0, 0))
    return _total(costs, decoder_macs(tokenizer) if tokenizer is not None else 0, steps.condition())


def mean_cost(costs: Sequence[Cost], weights: Sequence[int] | None = None) -> Cost:
    """Of several images, or of several means with the numbers of their images. MACs are rounded."""
    weights = weights if weights is not None else [1] * len(costs)

    def mean(values: Sequence[int]) -> int:
        return round(sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights))

    def mean_of_steps(name: str) -> tuple[int, ...]:
        return tuple(mean(values) for values in zip(*(getattr(cost, name) for cost in costs), strict=True))

    steps, executed = mean_of_steps("macs_per_step"), mean_of_steps("executed_macs_per_step")
    decoder = mean([cost.decoder_macs for cost in costs])
    return Cost(
        transformer_macs=sum(steps),
        decoder_macs=decoder,
        total_macs=sum(steps) + decoder,
        macs_per_step=steps,
        executed_transformer_macs=sum(executed),
        executed_total_macs=sum(executed) + decoder,
        executed_macs_per_step=executed,
        one_pass_macs=mean([cost.one_pass_macs for cost in costs]),
        executed_one_pass_macs=mean([cost.executed_one_pass_macs for cost in costs]),
    )


def with_decoder(cost: Cost, tokenizer: VQGANConfig) -> Cost:
    """A cost that was counted without a tokenizer, with its decoder."""
    decoder = decoder_macs(tokenizer)
    total, executed = cost.transformer_macs + decoder, cost.executed_transformer_macs + decoder
    return replace(cost, decoder_macs=decoder, total_macs=total, executed_total_macs=executed)


class _StepCost(NamedTuple):
    """Of one step, without what depends on the condition alone as executed. one_pass: without guidance."""

    one_pass: int
    published: int
    executed_one_pass: int
    executed: int


class _Steps:
    """The steps of one image."""

    def __init__(self, model: ENATConfig, sampler: SamplerConfig, num_given: int) -> None:
        self.model, self.sampler = model, sampler
        steps = range(sampler.num_steps)
        self.passes = [sampler.num_passes_at(step, model, num_given) for step in steps]
        self.reuses = [step > 0 and sampler.leaves_features_at(step - 1, model, num_given) for step in steps]
        counts = (sampler.num_computed_at, sampler.num_predicted_at)
        self.local = [
            tuple(count(step, model.num_tokens, num_given) for count in counts) if sampler.is_local_at(step) else None
            for step in steps
        ]
        self.guides_itself = [sampler.guides_itself_at(step, model, num_given) for step in steps]
        start, end = sampler.guidance_interval
        is_guided = sampler.is_guided and (model.is_conditional or sampler.guide_layers is not None)
        self.is_guided = [is_guided and start <= step / sampler.num_steps < end for step in steps]

    def cost(self, step: int, num_masked: int, num_masked_before: int) -> _StepCost:
        """num_masked_before: tokens whose features the step before does not leave; not used at the first step."""
        model, previous = self.model, num_masked_before if self.reuses[step] else None
        if self.local[step] is not None:
            return self.local_cost(step)
        one_pass = step_macs(model, num_masked, previous) + head_macs(model, model.num_tokens, model.codebook_size + 1)
        executed_pass = self.executed_pass(num_masked, previous)
        guide = one_pass
        if self.sampler.guide_layers is not None:
            guide = self.guide_macs(num_masked) + head_macs(model, model.num_tokens, model.codebook_size + 1)
        return _StepCost(
            one_pass,
            one_pass + (guide if self.is_guided[step] else 0),
            executed_pass,
            self.executed(step, num_masked, num_masked_before),
        )

    def kind(self, step: int) -> Hashable:
        """Equal for steps that cost the same with equal numbers of masked tokens."""
        return self.reuses[step], self.passes[step], self.guides_itself[step]

    def executed(self, step: int, num_masked: int, num_masked_before: int) -> int:
        """Without what ENAT.prepare computes, of a step that is not local."""
        previous = num_masked_before if self.reuses[step] else None
        macs = self.passes[step] * self.executed_pass(num_masked, previous)
        if self.guides_itself[step] and num_masked:
            macs += self.guide_macs(num_masked) + head_macs(self.model, num_masked, self.model.codebook_size)
        return macs

    def executed_pass(self, num_masked: int, previous: int | None) -> int:
        """One pass without guidance."""
        macs = _forward_macs(self.model, num_masked, previous, is_prepared=True)
        return macs + head_macs(self.model, num_masked, self.model.codebook_size)

    def local_cost(self, step: int) -> _StepCost:
        """Published: the head at every token that is computed, as ReCAP's code evaluates it."""
        model, sizes = self.model, self.local[step]
        assert sizes is not None
        num_computed, num_predicted = sizes
        if not num_predicted:
            return _StepCost(0, 0, 0, 0)
        blocks = _local_macs(model, num_computed)
        published_head = head_macs(model, num_computed, model.codebook_size + 1)
        one_pass = blocks + _modulation_macs(model)[1] + published_head
        head = head_macs(model, num_predicted, model.codebook_size)
        guide = one_pass if self.sampler.guide_layers is None else published_head
        executed = self.passes[step] * (blocks + head) + (head if self.guides_itself[step] else 0)
        return _StepCost(one_pass, one_pass + (guide if self.is_guided[step] else 0), blocks + head, executed)

    def guide_macs(self, num_masked: int) -> int:
        """Of self-guidance without its head: the decoder once more. Without an encoder, the layers are those of the pass."""
        return _decoding_macs(self.model, num_masked) if self.model.encoder_layers else 0

    def condition(self) -> tuple[int, int]:
        """What ENAT.prepare computes for one pass, and for all of a step."""
        return _condition_macs(self.model), max(self.passes) * _condition_macs(self.model)


class _AutoguidedSteps:
    """The steps of one image that another model guides: those of both models, each without guidance."""

    def __init__(self, model: ENATConfig, guide: ENATConfig, sampler: SamplerConfig, num_given: int) -> None:
        self.own, self.away = (_Steps(each, sampler.unguided(), num_given) for each in (model, guide))
        self.reuses = [own or away for own, away in zip(self.own.reuses, self.away.reuses, strict=True)]
        steps, (start, end) = range(sampler.num_steps), sampler.guidance_interval
        self.has_guide = [sampler.num_passes_at(step, guide, num_given, has_guide=True) == 2 for step in steps]
        self.is_guided = [sampler.is_guided and start <= step / sampler.num_steps < end for step in steps]

    def cost(self, step: int, num_masked: int, num_masked_before: int) -> _StepCost:
        own, away = (each.cost(step, num_masked, num_masked_before) for each in (self.own, self.away))
        published = own.one_pass + (away.one_pass if self.is_guided[step] else 0)
        executed = own.executed + (away.executed if self.has_guide[step] else 0)
        return _StepCost(own.one_pass, published, own.executed_one_pass, executed)

    def kind(self, step: int) -> Hashable:
        return self.own.kind(step), self.away.kind(step), self.has_guide[step]

    def executed(self, step: int, num_masked: int, num_masked_before: int) -> int:
        away = self.away.executed(step, num_masked, num_masked_before) if self.has_guide[step] else 0
        return self.own.executed(step, num_masked, num_masked_before) + away

    def condition(self) -> tuple[int, int]:
        own, away = self.own.condition(), self.away.condition()
        return own[0], own[1] + away[1]


def _steps(model: ENATConfig, sampler: SamplerConfig, num_given: int, guide: ENATConfig | None) -> _Steps | _AutoguidedSteps:
    return _Steps(model, sampler, num_given) if guide is None else _AutoguidedSteps(model, guide, sampler, num_given)


def _total(steps: Sequence[_StepCost], decoder: int, condition: tuple[int, int]) -> Cost:
    executed = [step.executed for step in steps]
    executed[0] += condition[1]
    published = sum(step.published for step in steps)
    return Cost(
        transformer_macs=published,
        decoder_macs=decoder,
        total_macs=published + decoder,
        macs_per_step=tuple(step.published for step in steps),
        executed_transformer_macs=sum(executed),
        executed_total_macs=sum(executed) + decoder,
        executed_macs_per_step=tuple(executed),
        one_pass_macs=sum(step.one_pass for step in steps),
        executed_one_pass_macs=sum(step.executed_one_pass for step in steps) + condition[0],
    )


@lru_cache(maxsize=64)
def _most_expensive(model: ENATConfig, sampler: SamplerConfig, num_given: int, guide: ENATConfig | None) -> tuple[int, ...]:
    """Masked tokens in the input of each step of the image that costs most, where every step may reveal any number of them.

    By dynamic programming from the last step on: after a step whose input has `before` masked tokens, `best` is the most that the
    remaining steps can cost, and `choice` how many tokens the next of them has masked to cost it.
    """
    num_made, steps = model.num_tokens - num_given, _steps(model, sampler, num_given, guide)

    kinds = [steps.kind(step) for step in range(sampler.num_steps)]

    @cache
    def macs_of(kind: Hashable, before: int | None) -> list[int]:
        """By the number of masked tokens: fewer than `before`, or any without reuse."""
        step = kinds.index(kind)
        return [0, *(steps.executed(step, masked, before or 0) for masked in range(1, before or num_made))]

    best, choices = [0] * (num_made + 1), []
    for step in range(sampler.num_steps - 1, 0, -1):
        following, choice, best = best, [0] * (num_made + 1), [0] * (num_made + 1)
        for before in range(1, num_made + 1):
            macs = macs_of(kinds[step], before if steps.reuses[step] else None)
            each = [*map(operator.add, macs[:before], following)]  # the first is 0: nothing is left
            best[before] = max(each)
            choice[before] = each.index(best[before])
        choices.append(choice)
    counts = [num_made]
    for choice in reversed(choices):
        counts.append(choice[counts[-1]])
    return tuple(counts)


def training_macs(config: ENATConfig, num_masked: int, previous_num_masked: int | None = None) -> int:
    """One image in a training step of enat.training.loss.objective: forward, backward and, with reuse, the forward of the teacher.

    `previous_num_masked`: masked tokens that the teacher sees; None in fresh mode. Raises ValueError for a model without reuse.
    The backward pass of a product is two products, one for each factor, so a step is three forward passes. Products that need no
    gradient are left out: the detached embedding in the head, and the caption features. Attention counts in its plain form; fused
    kernels compute the scores a second time in the backward pass. Activation checkpointing runs the blocks a second time, which
    is not counted. Neither are the optimizer and the average of the weights, which have no products.
    """
    if previous_num_masked is not None and not config.reuse:
        raise ValueError("this model is made with reuse=False and has no features of a teacher; previous_num_masked must be None")
    head = head_macs(config, num_masked, config.codebook_size)
    forward = _forward_macs(config, num_masked, previous_num_masked, skips_empty_parts=False) + head
    without_gradient = num_masked * config.embed_dim * config.codebook_size + _text_macs(config)
    teacher = 0
    if previous_num_masked is not None:  # features of visible tokens come from the encoder alone
        teacher = _forward_macs(config, previous_num_masked, None, has_decoder=config.reuses_masked)
    return 3 * forward - without_gradient + teacher


def mean_training_macs(config: ENATConfig, masking: MaskingConfig) -> float:
    """The mean of training_macs over the draws of enat.training.masking.mask_codes.

    By quadrature: over the density of the mask ratio at midpoints, and by Simpson's rule over the tokens that only the teacher sees
    masked, because MACs are quadratic in them.
    """
    total = weights = 0.0
    for midpoint in range(_RATIOS):
        ratio = (midpoint + 0.5) / _RATIOS
        weight = ratio ** (masking.alpha - 1) * (1 - ratio) ** (masking.beta - 1)
        num_masked = min(max(round(config.num_tokens * ratio), 1), config.num_tokens - 1)
        macs = float(training_macs(config, num_masked))
        if masking.reuse_probability and config.reuse:
            num_visible = config.num_tokens - num_masked
            ends, middle = (num_masked, config.num_tokens), num_masked + num_visible // 2
            reusing = sum(training_macs(config, num_masked, each) for each in ends) + 4 * training_macs(config, num_masked, middle)
            macs += masking.reuse_probability * (reusing / 6 - macs)
        total, weights = total + weight * macs, weights + weight
    return total / weights


def step_macs(config: ENATConfig, num_masked: int, previous_num_masked: int | None = None) -> int:
    """One forward pass for one image without the head, reusing a step that had previous_num_masked; None reuses nothing."""
    return _forward_macs(config, num_masked, previous_num_masked)


def _forward_macs(
    config: ENATConfig,
    num_masked: int,
    previous_num_masked: int | None,
    *,
    skips_empty_parts: bool = True,
    has_decoder: bool = True,
    is_prepared: bool = False,
) -> int:
    """skips_empty_parts: training runs encoder and decoder even without tokens, so every weight has a gradient.

    is_prepared: without what depends on the condition alone.
    """
    dim, has_text = config.embed_dim, config.text_width is not None
    num_text = config.num_text_tokens if has_text else 0
    num_visible = config.num_tokens - num_masked
    num_carried = previous_num_masked if previous_num_masked is not None and config.reuses_masked else 0
    num_old = config.num_tokens - previous_num_masked if previous_num_masked is not None and config.reuses_visible else 0
    num_new = num_visible - num_old
    of_encoder, of_decoder = (0, 0) if is_prepared else _modulation_macs(config)
    macs = 0 if is_prepared else _text_macs(config)
    macs += 2 * config.mlp_ratio * dim * dim * (num_old + num_carried)  # projections of reused features
    if num_new or not skips_empty_parts:
        macs += of_encoder + config.encoder_layers * _block_macs(config, num_new, num_text + num_old)
    if has_decoder and (num_masked or not skips_empty_parts):
        macs += of_decoder + _decoding_macs(config, num_masked)
    return macs


def _decoding_macs(config: ENATConfig, num_masked: int) -> int:
    """The blocks of the decoder, without adaLN."""
    num_text = config.num_text_tokens if config.text_width is not None else 0
    if config.decoder_attention == "full":
        return config.decoder_layers * _block_macs(config, config.num_tokens, num_text)
    attends_self, num_visible = config.decoder_attention == "self_cross", config.num_tokens - num_masked
    return config.decoder_layers * _block_macs(config, num_masked, num_text + num_visible, attends_self=attends_self)


def _local_macs(config: ENATConfig, num_computed: int) -> int:
    """Blocks of plain NAT for some tokens, with kept keys and values of the others and of the text. Without adaLN."""
    num_others = config.num_tokens - num_computed + (config.num_text_tokens if config.text_width is not None else 0)
    kept = 2 * config.embed_dim**2 * num_others  # products of keys and values that are not computed
    return config.decoder_layers * (_block_macs(config, num_computed, num_others) - kept)


def _text_macs(config: ENATConfig) -> int:
    """Projections of the text tokens and of the pooled caption."""
    return 0 if config.text_width is None else (config.num_text_tokens + 1) * config.text_width * config.embed_dim


def _modulation_macs(config: ENATConfig) -> tuple[int, int]:
    """adaLN of all blocks of the encoder, and of the decoder."""
    has_text, square = config.text_width is not None, config.embed_dim**2
    of_encoder = 8 if config.reuses_visible or has_text else 6
    of_decoder = 8 if config.decoder_attention != "full" or has_text else 6
    return config.encoder_layers * of_encoder * square, config.decoder_layers * of_decoder * square


def _condition_macs(config: ENATConfig) -> int:
    """What ENAT.prepare computes."""
    return sum(_modulation_macs(config)) + _text_macs(config)


def _block_macs(config: ENATConfig, num_own: int, num_conditioning: int, *, attends_self: bool = True) -> int:
    """Without adaLN."""
    dim = config.embed_dim
    num_keys = num_conditioning + (num_own if attends_self else 0)
    # Without keys (cross attention at the first step) no query is computed.
    query_and_project = (2 if num_keys else 1) * dim * dim * num_own
    key_value = 2 * dim * dim * num_keys
    attention = 2 * dim * num_own * num_keys
    mlp = 2 * config.mlp_ratio * dim * dim * num_own
    return query_and_project + key_value + attention + mlp


def head_macs(config: ENATConfig, num_positions: int, num_columns: int) -> int:
    return num_positions * config.embed_dim * (config.embed_dim + num_columns)


def encoder_macs(config: VQGANConfig) -> int:
    """The tokenizer's encoder on one image, without the codebook search."""
    return _encoder_macs(config, [config.resolution >> depth for depth in range(len(config.level_channels))])


def decoder_macs(config: VQGANConfig) -> int:
    """The tokenizer's decoder on one image."""
    return _decoder_macs(config, [config.resolution >> depth for depth in range(len(config.level_channels))])


def num_vqgan_parameters(config: VQGANConfig) -> int:
    """Weights of the convolutions and codes of a tokenizer: all but the norms and biases, which are less than one in a hundred."""
    ones = [1] * len(config.level_channels)  # a convolution has as many weights as it has MACs at one position
    return _encoder_macs(config, ones) + _decoder_macs(config, ones) + config.codebook_size * config.latent_dim


def _encoder_macs(config: VQGANConfig, sides: Sequence[int]) -> int:
    """sides: of each level."""
    channels = config.level_channels
    macs = _conv_macs(3, config.base_channels, sides[0])
    widths = [config.base_channels, *channels]
    for depth, side in enumerate(sides):
        macs += _level_macs(widths[depth], widths[depth + 1], config.num_res_blocks, side)
    return macs + _middle_macs(config, sides[-1]) + _conv_macs(channels[-1], config.latent_dim, sides[-1], kernel=1)


def _decoder_macs(config: VQGANConfig, sides: Sequence[int]) -> int:
    channels = config.level_channels
    macs = _conv_macs(config.latent_dim, channels[-1], sides[-1]) + _middle_macs(config, sides[-1])
    widths = [*channels, channels[-1]]
    for depth, side in enumerate(sides):
        macs += _level_macs(widths[depth + 1], widths[depth], config.num_res_blocks, side)
        if depth:
            macs += _conv_macs(widths[depth], widths[depth], sides[depth - 1])
    return macs + _conv_macs(channels[0], 3, sides[0])


def _middle_macs(config: VQGANConfig, side: int) -> int:
    return 2 * _level_macs(config.level_channels[-1], config.level_channels[-1], 1, side)


def _level_macs(in_channels: int, out_channels: int, num_res_blocks: int, side: int) -> int:
    macs = 0
    for index in range(num_res_blocks):
        entering = in_channels if index == 0 else out_channels
        macs += _conv_macs(entering, out_channels, side) + _conv_macs(out_channels, out_channels, side)
        if entering != out_channels:
            macs += _conv_macs(out_channels, out_channels, side, kernel=1)
    return macs


def _conv_macs(in_channels: int, out_channels: int, side: int, kernel: int = 3) -> int:
    return in_channels * out_channels * kernel * kernel * side * side


def num_parameters(config: ENATConfig) -> int:
    """Parameters of an ENAT, without making one."""
    dim, mlp = config.embed_dim, 2 * config.mlp_ratio * config.embed_dim**2 + (config.mlp_ratio + 1) * config.embed_dim
    has_text = config.text_width is not None
    total = (config.codebook_size + 1 + config.num_tokens) * dim + 2 * dim
    total += 2 * (config.text_width + 1) * dim if config.text_width is not None else (config.num_classes + 1) * dim
    total += (config.reuses_visible + config.reuses_masked) * (mlp + 2 * dim)
    norms = 4 * (dim // config.num_heads) if config.qk_norm else 0

    def block(*, has_conditioning: bool, attends_self: bool = True) -> int:
        projections = 2 + 2 * has_conditioning + 2 * attends_self  # of queries, keys and values, and of the output
        return (projections + (8 if has_conditioning else 6)) * (dim * dim + dim) + mlp + norms

    total += config.encoder_layers * block(has_conditioning=config.reuses_visible or has_text)
    total += config.decoder_layers * block(
        has_conditioning=config.decoder_attention != "full" or has_text, attends_self=config.decoder_attention != "cross"
    )
    return total + dim * dim + 5 * dim + config.codebook_size + 1
