"""What each step of the sampler predicts: its passes, what they reuse, and guidance.

Shape legend: B images, L tokens, V codebook size, M tokens that the step at hand predicts, K tokens of a group of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from enat.model import ENAT, ENATOutput, KeyValueCache, TextCondition
from enat.sampler_config import SamplerConfig

Alike = tuple[Int64[Tensor, " K"], Int64[Tensor, " B"]]  # see enat.sampling.sampler.decode_steps


class Predictor:
    """Guided predictions for B images, step by step.

    Conditional and unconditional passes share a batch; each has its own features to reuse, and its own keys and values for local
    steps.
    """

    def __init__(
        self,
        model: ENAT,
        conditions: Tensor | TextCondition,
        config: SamplerConfig,
        *,
        num_images: int,
        num_given: int,
        alike: Alike | None,
    ) -> None:
        self.model, self.config, self.num_images, self.num_given, self.alike = model, config, num_images, num_given, alike
        self.passes = [config.num_passes_at(step, model.config, num_given) for step in range(config.num_steps)]
        self.guides_itself = [config.guides_itself_at(step, model.config, num_given) for step in range(config.num_steps)]
        self.prepared = model.prepare(conditions[: max(self.passes) * num_images])
        self.previous: ENATOutput | None = None
        self.cache: KeyValueCache | None = None
        self.own: Int64[Tensor, "B K"] | None = None

    def __call__(
        self, step: int, tokens: Int64[Tensor, "B L"], num_masked: int
    ) -> tuple[Float[Tensor, "B M V"], Int64[Tensor, "B M"]]:
        """Guided logits of masked tokens, float32, and their positions: of all num_masked, or of a local step's group."""
        if self.config.is_local_at(step):
            return self._local_step(step, tokens)
        num_passes = self.passes[step]
        guide_layers = self.config.guide_layers if self.guides_itself[step] else None
        if step == 0 and self.alike is not None and len(self.alike[0]) + num_passes - 1 < num_passes * self.num_images:
            output = self._first_step(tokens, self.alike, num_passes, guide_layers)
        else:
            images = slice(num_passes * self.num_images)
            previous = _rows(self.previous, images) if self.previous is not None else None
            output = self.model(
                tokens.repeat(num_passes, 1),
                self.prepared[images],
                previous,
                num_masked=num_masked,
                logits="masked",
                guide_layers=guide_layers,
                keeps_key_values=self._leaves_local_steps(step),
            )
        self.cache = output.cache
        self.previous = output if self.config.leaves_features_at(step, self.model.config, self.num_given) else None
        return self._guided(step, output), output.masked_index[: self.num_images]

    def keep(self, own: Int64[Tensor, "B K"]) -> None:
        """What a full step leaves to its local steps: keys and values of all tokens but these, which they compute."""
        assert self.cache is not None
        self.own = own.sort(dim=1).values
        self.cache = self.cache.without(self.own.repeat(len(self.cache.index) // self.num_images, 1))

    def _leaves_local_steps(self, step: int) -> bool:
        return self.config.num_computed_at(step, self.model.config.num_tokens, self.num_given) > 0

    def _local_step(self, step: int, tokens: Int64[Tensor, "B L"]) -> tuple[Float[Tensor, "B M V"], Int64[Tensor, "B M"]]:
        num_predicted = self.config.num_predicted_at(step, self.model.config.num_tokens, self.num_given)
        if not num_predicted:  # the group is revealed
            codebook_size = self.model.config.codebook_size
            return tokens.new_zeros((len(tokens), 0, codebook_size), dtype=torch.float32), tokens[:, :0]
        assert self.cache is not None and self.own is not None
        num_passes = self.passes[step]
        images = slice(num_passes * self.num_images)
        output = self.model.forward_local(
            tokens.repeat(num_passes, 1),
            self.prepared[images],
            self.cache[images],
            self.own.repeat(num_passes, 1),
            num_masked=num_predicted,
            guide_layers=self.config.guide_layers if self.guides_itself[step] else None,
        )
        return self._guided(step, output), output.masked_index[: self.num_images]

    def forget(self, again: Int64[Tensor, "B K"]) -> None:
        """Drop the features of tokens that are masked again: for the next step, they were never visible."""
        if self.previous is not None:
            index = again.repeat(len(self.previous.mask) // self.num_images, 1)
            mask = self.previous.mask.scatter(1, index, True)
            self.previous = replace(self.previous, mask=mask, num_masked=self.previous.num_masked + index.shape[1])

    def _guided(self, step: int, output: ENATOutput) -> Float[Tensor, "B M V"]:
        """Away from the null condition, or from the model's own first layers."""
        logits = output.logits.float()
        if self.passes[step] == 2:
            logits, guide_logits = logits.chunk(2)
        elif output.guide_logits is not None:
            guide_logits = output.guide_logits.float()
        else:
            return logits
        return guide_logits + self.config.guidance_at(step) * (logits - guide_logits)

    def _first_step(self, tokens: Tensor, alike: Alike, num_passes: int, guide_layers: int | None) -> ENATOutput:
        """Nothing is visible yet: images of one label, and all unconditional passes, see the same and are computed once."""
        rows, place = alike
        if num_passes == 2:
            place = torch.cat([place, torch.full_like(place, len(rows))])
            rows = torch.cat([rows, torch.full_like(rows[:1], self.num_images)])
        output = self.model(
            tokens[:1].expand(len(rows), -1),
            self.prepared[rows],
            None,
            num_masked=tokens.shape[1],
            logits="masked",
            guide_layers=guide_layers,
            keeps_key_values=self._leaves_local_steps(0),
        )
        logits, features, mask, index = (part[place] for part in (output.logits, output.features, output.mask, output.masked_index))
        guide_logits = output.guide_logits[place] if output.guide_logits is not None else None
        cache = output.cache[place] if output.cache is not None else None
        return ENATOutput(logits, features, mask, index, output.num_masked, guide_logits, cache)


class Autoguided:
    """Predictions that are guided away from those of another model for the same condition, instead of from the null condition.

    Each model has its own features to reuse, or keys and values to keep. The guide runs where a null condition would.
    """

    def __init__(
        self, model: ENAT, guide: ENAT, conditions: Tensor | TextCondition, config: SamplerConfig, **settings: Any
    ) -> None:
        self.config, num_given = config, settings["num_given"]
        self.passes = [config.num_passes_at(step, guide.config, num_given, has_guide=True) for step in range(config.num_steps)]
        self.own, self.guide = (Predictor(each, conditions, config.unguided(), **settings) for each in (model, guide))

    def __call__(
        self, step: int, tokens: Int64[Tensor, "B L"], num_masked: int
    ) -> tuple[Float[Tensor, "B M V"], Int64[Tensor, "B M"]]:
        """As of Predictor."""
        logits, masked_index = self.own(step, tokens, num_masked)
        if self.passes[step] == 1:
            self.guide.cache = None if not self.config.is_local_at(step) else self.guide.cache  # of an earlier group
            return logits, masked_index
        guide_logits, _ = self.guide(step, tokens, num_masked)
        return guide_logits + self.config.guidance_at(step) * (logits - guide_logits), masked_index

    def keep(self, own: Int64[Tensor, "B K"]) -> None:
        self.own.keep(own)
        if self.guide.cache is not None:
            self.guide.keep(own)

    def forget(self, again: Int64[Tensor, "B K"]) -> None:
        self.own.forget(again)
        self.guide.forget(again)


def _rows(output: ENATOutput, images: slice) -> ENATOutput:
    """The reusable part of an output, for some images."""
    return replace(output, features=output.features[images], mask=output.mask[images])
