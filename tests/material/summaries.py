"""Summaries of artifacts that tests commit themselves: complete ones, of which a test gives the values that it is about."""

from __future__ import annotations

import dataclasses
from typing import Any

from enat.config import ENATConfig
from enat.sampler_config import SamplerConfig
from enat.tokenizer import VQGANConfig

_INFO = {"dataset": "digits", "resolution": 16, "grid_size": 4, "codebook_size": 128, "num_classes": 10, "tokenizer_digest": "t"}
_CAPTIONS = {"num_captions": 1, "captions_per_file": 1, "num_positions": 1, "width": 1, "encoder_digest": ""}
_EXTRACTOR = {"extractor": "classifier", "extractor_digest": "e"}
_COMPLETE: dict[str, dict[str, Any]] = {
    "dataset": {"name": "digits", "num_images": 1797, "num_captions": 0, "class_names": [], "findings": {}},
    "tokenizer": {"config": dataclasses.asdict(VQGANConfig.preset("vqgan-small")), "is_imported": False},
    "token_map": {"info": _INFO, "rows": 0, "class_names": []},
    "captions": {"info": _CAPTIONS, "dataset_digest": "d"},
    "reference": {
        **_EXTRACTOR, "outputs": {"features": 64}, "images_per_pass": 32, "of": "digits", "dataset": "digits", "resolution": 16,
        "num_images": 1797,
    },
    "train": {
        "model": dataclasses.asdict(ENATConfig.preset("enat-s")), "parameters": 1234, "tokenizer_digest": "t", "num_steps": 10,
        "dataset": "digits", "is_imported": False,
    },
    "generate": {
        "num_samples": 16, "shard_size": 8, "num_classes": 10, "labels": "each class in turn", "device": "a CPU", "batch_size": 8,
        "sampler": dataclasses.asdict(SamplerConfig()),
    },
    "images": {
        "name": "others", "kind": "folder", "num_images": 16, "resolution": 16, "content_digest": "c", "labels": "unknown",
    },
    "evaluate": {
        "extractor": "classifier", "reference_digest": "r", "num_samples": 16, "num_reference": None, "rounding": "uint8",
        "protocol": {}, "protocol_digest": "p", "metrics": [], "settings": {},
    },
    "reconstruction": {**_EXTRACTOR, "reference": "digits", "reference_digest": "r", "num_images": 16},
    "audit": {"rows": 90, "num_audited": 90, "close_distance": 3},
    "memorization": {"num_samples": 16, "rows": 90, "close_distance": 3},
    "report": {"name": "digits"},
}  # fmt: skip


def summary_of(stage: str, **given: Any) -> dict[str, Any]:
    """As a manifest of the stage has it. A mapping or dataclass that is given replaces only the keys that it has."""
    values = dict(_COMPLETE[stage])
    for name, raw in given.items():
        value = dataclasses.asdict(raw) if dataclasses.is_dataclass(raw) and not isinstance(raw, type) else raw
        is_part = isinstance(value, dict) and isinstance(values.get(name), dict) and name in ("info", "config", "model", "sampler")
        values[name] = {**values[name], **value} if is_part else value
    return values
