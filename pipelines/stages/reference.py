"""Stage reference: the feature extractor, and the moments of the real images' features.

Extractor "classifier" is trained here on the dataset's labels, with a share held out to say how good it is; "inception" is
torch-fidelity's InceptionV3.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from safetensors.torch import save_file

from enat.features import EXTRACTORS, ClassifierExtractor, InceptionExtractor, train_classifier
from pipelines import cluster
from pipelines.artifacts import Manifest
from pipelines.dataset import Dataset
from pipelines.external import content_digest, local_file
from pipelines.feature_job import ExtractorFile, SourceImages, compute_moments
from pipelines.progress import Reporter
from pipelines.s3 import S3Config
from pipelines.sources import DatasetConfig
from pipelines.weights import read_state_dict
from pipelines.workflow import Execution, Stage, StageContext, StageResult, WorkerContext

EXTRACTOR = "extractor.safetensors"
MOMENTS = "moments.safetensors"
_WEIGHTS_KEY = "reference.inception_weights"
_HOLD_OUT_EVERY = 5  # every fifth image tests the classifier and never trains it
_MAX_TRAINING_IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """extractor: "classifier", trained for num_epochs, or "inception".   inception_weights: a file (also s3:// or hf://);
    None fetches the published. s3: None takes the run's."""

    extractor: str = "classifier"
    num_epochs: int = 20
    inception_weights: str | None = None
    resolution: int | None = None
    dataset: DatasetConfig | None = None
    s3: S3Config | None = None
    seed: int | None = None
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"reference.extractor is {self.extractor!r}; choose one of {', '.join(EXTRACTORS)}")

    def identity(self) -> dict[str, Any]:
        common = {"extractor": self.extractor, "resolution": self.resolution}
        if self.extractor == "classifier":
            return {**common, "num_epochs": self.num_epochs, "seed": self.seed}
        weights = self.inception_weights
        return {**common, "weights": content_digest(weights, _WEIGHTS_KEY, self.s3) if weights else "published"}


def run(config: ReferenceConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    assert config.dataset is not None and config.resolution is not None
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    context.connect()
    cluster.require(config.execution, "reference")
    if config.extractor == "classifier":
        with context.bar(config.num_epochs, "epochs") as bar, bar.reporter() as reporter:
            task = ray.remote(**config.execution.resources)(_train_classifier)
            made = ray.get(task.remote(config, dataset, context.for_workers(), reporter))
    else:
        made = _keep_inception(config, context)
    job = compute_moments(
        SourceImages(dataset, config.resolution),
        dataset.num_images,
        ExtractorFile(context.store, config.extractor, context.stage, context.key, made["file"]),
        config.execution,
        context.bar(dataset.num_images, "images"),
    )
    seconds = made["seconds"] + job.worker_seconds
    return StageResult(
        files=[made["file"], context.write(MOMENTS, job.moments.save)],
        summary={"extractor": config.extractor, "num_images": job.moments.count, "resolution": config.resolution},
        metrics={"images": job.moments.count, **made["metrics"]},
        worker_seconds=seconds,
        device_seconds=seconds if config.execution.gpus_per_worker else 0.0,
    )


def _train_classifier(config: ReferenceConfig, dataset: Dataset, context: WorkerContext, reporter: Reporter) -> dict[str, Any]:
    assert config.resolution is not None and config.seed is not None
    started = time.monotonic()
    torch.set_num_threads(config.execution.num_threads)
    images, labels = map(torch.from_numpy, dataset.load_images(config.resolution, 0, _MAX_TRAINING_IMAGES))
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError(f"dataset {dataset.name} has no labelled images to train a classifier on; use extractor: inception")
    is_held_out = torch.arange(len(labels)) % _HOLD_OUT_EVERY == 0
    with torch.random.fork_rng(devices=[]):  # torch's initialisers of layers know no generator
        torch.manual_seed(config.seed)
        extractor = ClassifierExtractor(len(dataset.class_names))
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in train_classifier(extractor, images[~is_held_out], labels[~is_held_out], config.num_epochs, generator):
        reporter.report(epoch.epoch, f"loss {epoch.loss:.3f}")
        context.run.log_metrics({"loss": epoch.loss}, epoch.epoch)
    with torch.inference_mode():
        predicted = torch.cat([extractor.logits(part).argmax(dim=1) for part in images[is_held_out].split(256)])
    accuracy = (predicted == labels[is_held_out]).double().mean().item()
    file = context.write(EXTRACTOR, extractor.save)
    return {"file": file, "metrics": {"held_out_accuracy": accuracy}, "seconds": time.monotonic() - started}


def _keep_inception(config: ReferenceConfig, context: StageContext) -> dict[str, Any]:
    place = config.inception_weights
    weights = read_state_dict(local_file(place, _WEIGHTS_KEY, config.s3)) if place else None
    state = InceptionExtractor(weights).network.state_dict()
    file = context.write(EXTRACTOR, lambda path: save_file({name: tensor.contiguous() for name, tensor in state.items()}, path))
    return {"file": file, "metrics": {}, "seconds": 0.0}


STAGE = Stage("reference", 2, run)
