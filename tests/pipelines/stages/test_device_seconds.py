"""Stages count the seconds of every device that their workers hold. Records of workers are given, so the tests need no GPU.

Stages generate, evaluate and train, and features, have such tests in their own files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from enat import text
from enat.config import VQGANConfig
from enat.metrics.moments import FeatureMoments
from enat.text import TextFeatures
from pipelines.artifacts.manifest import FileRecord
from pipelines.artifacts.open import open_store
from pipelines.cluster import connection
from pipelines.cluster.resources import Execution, Workers
from pipelines.data.captions import CaptionFeaturesInfo, captions_name
from pipelines.data.sources.config import DatasetConfig
from pipelines.data.token_map import TokenMapInfo
from pipelines.evaluation.features import FeatureSet
from pipelines.stages import captions, reference, token_map, tokenizer
from pipelines.workflow.stage import StageContext, StageResult

pytestmark = pytest.mark.usefixtures("ray_cluster")  # for the actors of progress bars

FILE = {"name": "file", "path": "file", "size": 1, "sha256": "0" * 64}
TOOK = 10.0  # seconds of workers that hold devices


def of_token_map(gpus: float, context: StageContext, patch: pytest.MonkeyPatch) -> StageResult:
    """Decoding took 5 s more, on CPUs."""
    info = TokenMapInfo(dataset="drawn", resolution=16, grid_size=4, codebook_size=4, num_classes=2, tokenizer_digest="0" * 64)
    record = {"rows": 3, "file": FILE, "quarantined": [], "code_counts": [1, 2, 0, 3], "seconds": TOOK, "decoding_seconds": 5.0}
    context.store.put_part(context.stage, context.key, "part-00000.parquet", record)
    config = token_map.TokenMapConfig(execution=token_map.TokenMapExecution(gpus_per_worker=gpus))
    dataset = SimpleNamespace(num_images=3, class_names=["a", "b"])
    return token_map._collect(config, dataset, info, VQGANConfig.preset("vqgan-small"), context)  # type: ignore[arg-type]


def of_captions(gpus: float, context: StageContext, patch: pytest.MonkeyPatch) -> StageResult:
    import torch

    def encode(texts: list[str]) -> TextFeatures:
        return TextFeatures(torch.zeros(1, 3, 8).half(), torch.zeros(1, 8).half(), torch.tensor([2]))

    encoder = SimpleNamespace(num_positions=3, width=8, encode=encode)
    patch.setattr(text, "load_text_encoder", lambda _: encoder)
    patch.setattr(captions, "folder_digest", lambda _: "0" * 64)
    patch.setattr(captions, "Dataset", lambda *_: SimpleNamespace(num_captions=4, name="drawn"))
    patch.setattr(captions, "_plan", lambda _, info: [{"part": 0}] if isinstance(info, CaptionFeaturesInfo) else [])
    patch.setattr(captions.CaptionsConfig, "folder", lambda _: Path())
    file = asdict(context.write(captions_name(0), lambda path: path.write_bytes(b"features")))
    record = {"part": 0, "captions": 4, "tokens": 9, "file": file, "seconds": TOOK}
    context.store.put_part(context.stage, context.key, captions_name(0), record)
    config = captions.CaptionsConfig(encoder="e", dataset=DatasetConfig(kind="digits"), execution=Execution(gpus_per_worker=gpus))
    return captions.run(config, {"dataset": SimpleNamespace(digest="d")}, context)  # type: ignore[dict-item]


def of_tokenizer(gpus: float, context: StageContext, patch: pytest.MonkeyPatch) -> StageResult:
    trained = {"file": FileRecord(**FILE), "record": FileRecord(**FILE), "metrics": {}, "seconds": TOOK}
    remote = SimpleNamespace(remote=lambda *_: trained)
    make, get = ray.remote, ray.get  # of the bar's actor
    patch.setattr(ray, "remote", lambda **given: (lambda _: remote) if "num_gpus" in given else make(**given))
    patch.setattr(ray, "get", lambda given: given if given is trained else get(given))
    patch.setattr(tokenizer, "Dataset", lambda *_: None)
    config = tokenizer.TokenizerConfig(dataset=DatasetConfig(kind="digits"), seed=0, execution=Workers(gpus_per_worker=gpus))
    return tokenizer.run(config, {"dataset": None}, context)  # type: ignore[dict-item]


def of_reference(gpus: float, context: StageContext, patch: pytest.MonkeyPatch) -> StageResult:
    """Training the extractor took all of it. tests/pipelines/evaluation has the seconds of features."""
    features = FeatureSet(
        count=3,
        num_kept=3,
        moments={"features": FeatureMoments(4).add(np.eye(4))},
        files=(),
        worker_seconds=0.0,
        device_seconds=0.0,
        decoding_seconds=0.0,
    )
    extractor = SimpleNamespace(outputs={"features": 4})
    real = reference._RealImages("drawn", "drawn, 16 px", SimpleNamespace(), 3)  # type: ignore[arg-type]
    patch.setattr(reference, "_real_images", lambda *_: real)
    patch.setattr(reference, "_make_extractor", lambda *_: reference._Made(FileRecord(**FILE), {}, TOOK))
    patch.setattr(reference.ExtractorFile, "load", lambda _: extractor)
    patch.setattr(reference, "compute_features", lambda *_: features)
    config = reference.ReferenceConfig(
        resolution=16, dataset=DatasetConfig(kind="digits"), seed=0, execution=Execution(gpus_per_worker=gpus)
    )
    return reference.run(config, {}, context)


@pytest.mark.parametrize("gpus", [pytest.param(0, marks=pytest.mark.slow), 0.5, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [of_token_map, of_captions, of_tokenizer, of_reference])
def test_device_seconds_count_every_device_that_a_worker_holds(
    stage: Callable[..., StageResult],
    gpus: float,
    make_context: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "require", lambda *_: None)
    context = make_context(open_store(str(tmp_path / "store")), stage.__name__.removeprefix("of_"), connect=lambda: None)
    result = stage(gpus, context, monkeypatch)
    assert result.worker_seconds == (TOOK + 5 if stage is of_token_map else TOOK)
    assert result.device_seconds == gpus * TOOK
