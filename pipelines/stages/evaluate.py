"""Stage evaluate: what the samples are worth, and what making one costs.

Features of the decoded samples on Ray, their Frechet distance to the reference, analytic MACs; and, where asked for, how often a
classifier that has nothing to do with the extractor sees the class that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from enat.cost import generation_cost
from enat.metrics import FeatureMoments, frechet_distance
from enat.model import ENATConfig
from enat.sampler import SamplerConfig
from enat.tokenizer import VQGANConfig
from pipelines import cluster
from pipelines.artifacts import Manifest
from pipelines.dataset import Dataset
from pipelines.feature_job import DecodedSamples, ExtractorFile, compute_moments
from pipelines.samples import read_codes
from pipelines.sources import DatasetConfig
from pipelines.workflow import Execution, Stage, StageContext, StageResult, WorkerContext

JUDGES = ("svc",)
_MAX_JUDGE_IMAGES = 20_000  # a support vector machine's fit grows with the square of it


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """judge: "svc", a scikit-learn support vector machine fitted on the pixels of the real images; None for none."""

    judge: str | None = None
    dataset: DatasetConfig | None = None
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge not in JUDGES:
            raise ValueError(f"evaluate.judge is {self.judge!r}; choose one of {', '.join(JUDGES)}, or leave it out")


def run(config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    samples, tokenizer, reference, model = (inputs[name] for name in ("samples", "tokenizer", "reference", "model"))
    context.connect()
    cluster.require(config.execution, "evaluate")
    extractor = ExtractorFile(
        context.store, reference.summary["extractor"], "reference", reference.key, reference.file("extractor.safetensors")
    )
    num_samples = int(samples.summary["num_samples"])
    reader = DecodedSamples(context.store, samples, tokenizer, config.execution.batch_size)
    job = compute_moments(reader, num_samples, extractor, config.execution, context.bar(num_samples, "images"))
    real = FeatureMoments.load(context.store.fetch(reference, "moments.safetensors"))
    metrics = {"frechet_distance": frechet_distance(job.moments, real), **_cost(model, samples, tokenizer)}
    seconds = job.worker_seconds
    if config.judge is not None:
        assert config.dataset is not None
        dataset = Dataset(config.dataset, context.store, inputs["dataset"])
        judged = ray.get(ray.remote(num_cpus=1)(_judge).remote(dataset, reference, reader, samples, context.for_workers()))
        metrics |= judged
    return StageResult(
        files=[context.write("moments.safetensors", job.moments.save)],
        summary={
            "extractor": reference.summary["extractor"],
            "reference_digest": reference.digest,
            "num_samples": num_samples,
            "num_reference": real.count,
            "rounding": "uint8",
        },
        metrics=metrics,
        worker_seconds=seconds,
        device_seconds=seconds if config.execution.gpus_per_worker else 0.0,
    )


def _cost(model: Manifest, samples: Manifest, tokenizer: Manifest) -> dict[str, float]:
    architecture, sampler = ENATConfig(**model.summary["model"]), SamplerConfig(**samples.summary["sampler"])
    cost = generation_cost(architecture, sampler, VQGANConfig(**tokenizer.summary["config"]))
    return {
        "gmacs_transformer": cost.transformer_macs / 1e9,
        "gmacs_decoder": cost.decoder_macs / 1e9,
        "gmacs_total": cost.total_macs / 1e9,
        "gmacs_executed": cost.executed_total_macs / 1e9,
        "seconds_per_sample": samples.provenance["worker_seconds"] / samples.summary["num_samples"],
    }


def _judge(
    dataset: Dataset, reference: Manifest, reader: DecodedSamples, samples: Manifest, context: WorkerContext
) -> dict[str, float]:
    """Agreement of a support vector machine with the labels asked for; its own accuracy on real images it did not see."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    images, labels = dataset.load_images(int(reference.summary["resolution"]), 0, _MAX_JUDGE_IMAGES)
    pixels = _gray(torch.from_numpy(images))
    machine = SVC(C=10.0)
    accuracy = cross_val_score(machine, pixels, labels, cv=5).mean()
    machine.fit(pixels, labels)
    generated = read_codes(context.store, samples)
    predicted = machine.predict(_gray(reader.read(0, len(generated.labels), "cpu")))
    return {"class_agreement": float((predicted == generated.labels).mean()), "judge_accuracy": float(accuracy)}


def _gray(images: torch.Tensor) -> Any:
    """uint8 (B, 3, H, W) -> float64 (B, H * W) in [0, 1]"""
    return images.double().mean(dim=1).flatten(1).numpy() / 255


STAGE = Stage("evaluate", 2, run)
