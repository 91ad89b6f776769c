"""A registered model as a python_function of MLflow, which samples images.

    mlflow.pyfunc.load_model("models:/NAME@newest").predict({"label": [3, 8]})

MLflow imports this module, because the file MLmodel of a version names it. The folder of the version holds the manifest of the
model and the place of its store, from which the weights are read. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.artifacts.manifest import MANIFEST, Manifest
from pipelines.artifacts.open import open_store
from pipelines.registry.model_card import PLACE
from pipelines.sampling import models
from pipelines.sampling.models import Generator
from pipelines.sampling.request import SampleRequest, choose_device
from pipelines.sampling.sample import sample_batches
from pipelines.storage.s3_client import S3Config


class PyfuncModel:
    """What MLflow wraps."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Images for labels or captions, one each: uint8 (B, H, W, 3).

        model_input: a table with one column, or a list or array.   params: num_steps, guidance_scale, seed, device, and
            for captions text_encoder, the folder of the encoder that the model was trained with. The others are by default
            those of the previews in training.

        Raises ValueError for labels that the model does not have, and for settings that are not valid.
        """
        given = {name: value for name, value in (params or {}).items() if value not in (None, "")}
        asked = np.asarray(model_input).reshape(-1).tolist()
        if not asked:
            raise ValueError("the input has no rows; give labels or captions, one for each image")
        changes = {name: given[name] for name in ("num_steps", "guidance_scale") if name in given}
        sampler = replace(self.generator.sampler, **changes) if changes else self.generator.sampler
        if "guidance_scale" in changes:
            sampler = replace(sampler, guidance_scales=None)
        is_text = self.generator.model.config.text_width is not None
        request = SampleRequest(
            num_images=len(asked),
            sampler=sampler,
            labels=() if is_text else tuple(int(each) for each in asked),
            captions=tuple(map(str, asked)) if is_text else (),
            seed=int(given.get("seed", 0)),
            device=choose_device(str(given.get("device", "auto"))),
        )
        batches = sample_batches(self.generator, request, self._encoder(given) if is_text else None)
        return np.concatenate([batch.images.cpu().numpy().transpose(0, 2, 3, 1) for batch, _ in batches])

    @staticmethod
    def _encoder(given: Mapping[str, Any]) -> Any:
        from enat.text import load_text_encoder

        if "text_encoder" not in given:
            raise ValueError("this model needs captions; give params={'text_encoder': the folder of its CLIP text model}")
        return load_text_encoder(given["text_encoder"])


def _load_pyfunc(path: str) -> PyfuncModel:
    """Called by MLflow. path: the folder of the registered version."""
    folder = Path(path)
    own = Manifest.from_json((folder / MANIFEST).read_bytes())
    store = open_store(str(json.loads((folder / PLACE).read_text())["store"]), S3Config())
    manifest = store.read_manifest(own.stage, own.key)
    if manifest is None:
        raise ValueError(f"the store {store.uri} has no {own.stage}/{own.key[:12]}, the weights of this model")
    return PyfuncModel(models.from_manifest(store, manifest))
