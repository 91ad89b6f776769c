"""A model and its tokenizer from a folder or the Hugging Face hub, as enat/files/hub.py describes it, and images in one call.

    pipe = ENATPipeline.from_pretrained("owner/name")
    pipe(labels=[207, 360], num_inference_steps=8, guidance_scale=3.5, seeds=[0, 1]).images

Nothing here unpickles or runs code of the folder.
Shape legend: B images, L codes, P images of a pass, T text tokens, W width of caption features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from enat.execution.passes import DECODED_PER_PASS, fixed_numerics, in_a_pass, pass_pool, split_into_passes
from enat.files.hub import CONFIG, MODEL, TOKENIZER, HubConfig, fetch
from enat.files.weights import load_configured
from enat.images import to_uint8
from enat.model import ENAT, TextCondition
from enat.sampler_config import IMAGES_PER_PASS, SamplerConfig
from enat.sampling.sampler import sample
from enat.text import TextEncoder, load_text_encoder
from enat.tokenizer import VQGAN

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PipelineOutput:
    """images: RGB, in the order of the call.   codes: on the CPU.   seeds: of each image, to make it again."""

    images: list[Image.Image]
    codes: Int64[Tensor, "B L"]
    seeds: list[int]


class ENATPipeline:
    """Labels or captions -> images.

    model, vqgan: in eval mode, on one device.   sampler: what a call does not set.   class_names: by label; empty if unknown.
    text_encoder: of a text-conditional model; None refuses captions.
    """

    def __init__(
        self,
        model: ENAT,
        vqgan: VQGAN,
        sampler: SamplerConfig | None = None,
        *,
        class_names: Sequence[str] = (),
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.model, self.vqgan, self.text_encoder = model, vqgan, text_encoder
        self.sampler = sampler or SamplerConfig()
        self.class_names = tuple(class_names)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, *, text_encoder: str | Path | None = None
    ) -> ENATPipeline:
        """The pipeline of an exported folder, or of owner/name on the Hugging Face hub, on the CPU.

        revision: a branch, tag or commit.   text_encoder: the folder of the CLIP text model that a text-conditional model was
        trained with. Raises ValueError for a folder that does not hold such a model.
        """
        folder = fetch(source, revision)
        config = HubConfig.read(folder / CONFIG)
        return cls(
            load_configured(folder / MODEL, ENAT, config.model),
            load_configured(folder / TOKENIZER, VQGAN, config.tokenizer),
            config.sampler,
            class_names=config.class_names,
            text_encoder=load_text_encoder(text_encoder) if text_encoder is not None else None,
        )

    def to(self, device: str | torch.device) -> ENATPipeline:
        """Move it, and return it."""
        self.model.to(device)
        self.vqgan.on(device)
        if self.text_encoder is not None:
            self.text_encoder.to(str(device))
        return self

    def __call__(
        self,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        captions: Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        images_per_pass: int = IMAGES_PER_PASS,
        **sampler: Any,
    ) -> PipelineOutput:
        """An image for each label or caption.

        `labels`: ints, or names of classes; an unconditional model has one label, 0.   `captions`: for a text-conditional model.
        `seeds`: one int in [0, 2**63) per image; else `generator` draws them, else they are random. See PipelineOutput.seeds.
        `num_inference_steps`, `guidance_scale`: replace num_steps and guidance_scale of self.sampler.
        `images_per_pass`: same as in `enat sample`. With equal values, seeds and device the codes are those of `enat sample`.
        `sampler`: other fields of SamplerConfig, such as remask_temperature=2.0.
        Raises ValueError for values that do not fit the model.
        """
        given = {"num_steps": num_inference_steps, "guidance_scale": guidance_scale}
        config = self._sampler({**{name: value for name, value in given.items() if value is not None}, **sampler})
        if images_per_pass < 1:
            raise ValueError(f"images_per_pass is {images_per_pass}; it must be at least 1")
        condition = self._condition(labels, captions)
        chosen = _seeds(seeds, generator, len(condition))
        device = self.model.token_embedding.weight.device
        num_at_once = torch.get_num_threads() if device.type == "cpu" else 1
        with fixed_numerics(str(device)), pass_pool(num_at_once) as pool:
            passes = split_into_passes(0, len(chosen), images_per_pass)
            parts = pool.map(lambda part: self._make(condition, chosen, part, images_per_pass, config), passes)
        codes, pixels = (torch.cat(each) for each in zip(*parts, strict=True))
        images = [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).numpy()]
        return PipelineOutput(images, codes, chosen)

    def _make(
        self, condition: Tensor | TextCondition, seeds: list[int], part: range, images_per_pass: int, config: SamplerConfig
    ) -> tuple[Tensor, Tensor]:
        """Codes int64 (B, L) and pixels uint8 (B, 3, H, W) on the CPU, of images of one pass."""

        def draw(index: np.ndarray) -> Tensor:
            rows = torch.from_numpy(index)
            return sample(self.model, condition[rows], config, seeds=[seeds[i] for i in index.tolist()]).cpu()

        codes = in_a_pass(draw, part, images_per_pass)
        side, device, size = self.vqgan.config.grid_size, self.vqgan.codebook.weight.device, min(images_per_pass, DECODED_PER_PASS)

        def decode(index: np.ndarray) -> Tensor:
            shown = codes[torch.from_numpy(index - part.start)].view(-1, side, side)
            return to_uint8(self.vqgan.decode(shown.to(device))).cpu()

        return codes, torch.cat([in_a_pass(decode, each, size) for each in split_into_passes(part.start, part.stop, size)])

    def _sampler(self, given: Mapping[str, Any]) -> SamplerConfig:
        try:
            return self.sampler.replaced(**given)
        except TypeError as error:
            raise ValueError(f"the sampler has no such setting, or not of this type ({error}); see SamplerConfig") from error

    def _condition(self, labels: Sequence[int | str] | Tensor | None, captions: Sequence[str] | None) -> Tensor | TextCondition:
        if (labels is None) == (captions is None):
            raise ValueError("give labels or captions, one for each image")
        if len(labels if labels is not None else captions or ()) == 0:
            raise ValueError("labels or captions are empty; give at least one")
        if captions is None:
            assert labels is not None
            return torch.tensor([self._label(each) for each in (labels.tolist() if isinstance(labels, Tensor) else labels)]).long()
        if isinstance(captions, str) or self.model.config.text_width is None:
            raise ValueError("captions must be a list of texts, for a model of captions")
        if self.text_encoder is None:
            raise ValueError("captions need the CLIP text model of the training: from_pretrained(..., text_encoder=FOLDER)")
        features = self.text_encoder.encode(list(captions))
        return TextCondition(features.hidden.cpu(), features.pooled.cpu())

    def _label(self, label: int | str) -> int:
        if isinstance(label, int):
            return label
        if not isinstance(label, str):
            raise ValueError(f"{label!r} is not a label; give integers or names of classes")
        places = [place for place, name in enumerate(self.class_names) if name == label]
        if len(places) != 1:
            raise ValueError(f"{len(places)} classes have the name {label!r}; give the number of the class")
        return places[0]


def _seeds(seeds: Sequence[int] | None, generator: torch.Generator | None, count: int) -> list[int]:
    if seeds is not None and generator is not None:
        raise ValueError("give seeds or a generator, not both")
    if seeds is not None:
        chosen = [int(seed) for seed in seeds]
        if any(not 0 <= seed <= _MAX_SEED for seed in chosen):
            raise ValueError("seeds must be in [0, 2**63)")
        if len(chosen) != count:
            raise ValueError(f"{len(chosen)} seeds for {count} images; give one seed per image")
        return chosen
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return torch.randint(_MAX_SEED, (count,), generator=generator, device=generator.device).tolist()
