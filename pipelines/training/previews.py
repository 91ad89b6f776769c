"""Previews: grids of samples from fixed seeds, so that grids of different steps can be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from enat.checkpoint import load_vqgan
from enat.images import make_grid, png_bytes, to_uint8
from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from enat.tokenizer import VQGAN
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import CaptionFeatures

_IMAGES = 20
_log = logging.getLogger(__name__)


class Previewer:
    """Makes grids on one rank. Errors are reported once and do not stop training."""

    def __init__(
        self,
        store: ArtifactStore,
        tokenizer: Manifest,
        sampler: SamplerConfig,
        captions: CaptionFeatures | None,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._tokenizer, self._sampler, self._captions = store, tokenizer, sampler, captions
        self._tell, self._has_reported = tell, False
        self._vqgan: VQGAN | None = None  # loaded by the first grid

    def grid(self, model: ENAT) -> bytes | None:
        """A PNG for a model in eval mode, or None if it failed."""
        try:
            if self._vqgan is None:
                path = self._store.fetch(self._tokenizer, "vqgan.safetensors")
                self._vqgan = load_vqgan(path).on(model.token_embedding.weight.device)
            return self._draw(model, self._vqgan)
        except Exception as error:  # noqa: BLE001 (an unavailable store, no memory for samples)
            _log.warning("a preview failed", exc_info=True)
            if not self._has_reported:
                self._has_reported = True
                self._tell(f"a preview failed; training continues ({type(error).__name__}: {error})")
            return None

    def _draw(self, model: ENAT, vqgan: VQGAN) -> bytes:
        """Two images for each of the first ten classes, or of evenly spaced captions."""
        condition: torch.Tensor | TextCondition = torch.arange(min(_IMAGES // 2, max(1, model.config.num_classes))).repeat(2)
        if self._captions is not None:
            features = self._captions.take(np.arange(_IMAGES) * len(self._captions) // _IMAGES)
            condition = TextCondition(*map(torch.from_numpy, features))
        codes = sample(model, condition, self._sampler, seeds=range(len(condition)))
        side = model.config.grid_size
        images = to_uint8(vqgan.decode(codes.view(-1, side, side)))
        return png_bytes(make_grid(images, columns=len(condition) // 2, scale=max(1, 64 // images.shape[-1])))
