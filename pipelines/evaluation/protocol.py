"""What is told of an evaluation: how it was measured (its protocol), tags to find it by, and a picture of the samples.

Numbers of two evaluations may stand beside each other only where their protocols are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from PIL import Image

from enat.images import make_grid
from pipelines.artifacts.manifest import Manifest
from pipelines.data.labels import scheme_of
from pipelines.evaluation.readers import BlockReader, read_images
from pipelines.evaluation.scores import METRIC_VERSION, ScoreSettings
from pipelines.registry import evaluation_record, model_card
from pipelines.storage.base import canonical_json, digest_of
from pipelines.workflow.costs import cost_metrics
from pipelines.workflow.stage import MAIN, PublishContext

GRID = "samples.png"
DISTANCES = ("fid", "frechet_distance")
# What people are shown of scores, and how it is called.
SCORES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "inception_score": "IS",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_agreement": "class agreement",
}
# Tag -> where samples that were made here say it: what their times were measured with.
_MADE_WITH = {"device": "device", "images_per_pass": "batch_size", "precision": "precision"}
_LARGE = 64  # pixels from which on fewer images are shown, and none enlarged
_MOST_COLUMNS = 20


def protocol_of(reference: Manifest, samples: Manifest, settings: ScoreSettings, rounding: str = "uint8") -> dict[str, Any]:
    """What a number depends on beside the images that it is of.

    num_reference: None where a published file does not say.   num_kept: of them, those whose own features are known, for what
    moments do not tell.   labels: see label_schemes.
    """
    return {
        "extractor": reference.summary["extractor"],
        "extractor_digest": reference.summary["extractor_digest"],
        "reference": reference.summary["of"],
        "reference_digest": reference.digest,
        "num_samples": num_samples_of(samples),
        "num_reference": reference.summary["num_images"],
        "num_kept": reference.summary["num_kept"],
        "rounding": rounding,
        "labels": scheme_of(samples),
        "metric_version": _metric_version(settings),
    }


def _metric_version(settings: ScoreSettings) -> str:
    usual = asdict(ScoreSettings())
    changed = [f"{name} {value}" for name, value in asdict(settings).items() if value != usual[name]]
    return ", ".join([str(METRIC_VERSION), *changed])


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    return digest_of(protocol)[:12]


def num_samples_of(samples: Manifest) -> int:
    """Of samples that were generated here or elsewhere."""
    return int(samples.summary["num_images" if samples.stage == "images" else "num_samples"])


def resolution_of(samples: Manifest, inputs: Mapping[str, Manifest]) -> int:
    return int(samples.summary["resolution"] if samples.stage == "images" else inputs["tokenizer"].summary["config"]["resolution"])


def sample_grid(reader: BlockReader, inputs: Mapping[str, Manifest], images_per_pass: int) -> Image.Image:
    """The first samples in order: where classes come in turn, a column each. No more of them are decoded than are shown."""
    samples = inputs["samples"]
    num_classes, side = int(samples.summary.get("num_classes") or 0), resolution_of(samples, inputs)
    columns = num_classes if 2 <= num_classes <= _MOST_COLUMNS else 8
    shown = min(columns * max(2, (64 if side <= _LARGE else 32) // columns), num_samples_of(samples))
    num_passes = -(-shown // images_per_pass)
    images = read_images(reader, 0, shown, -(-shown // num_passes))
    return make_grid(images, columns=columns, scale=max(1, _LARGE // side))


def tags_of(manifest: Manifest, inputs: Mapping[str, Manifest], node: str) -> dict[str, str]:
    """node: id of the stage in its pipeline, "evaluate" or "evaluate@variant". Of outside samples only what is known."""
    samples, model = inputs["samples"], inputs.get("model")
    protocol = manifest.summary["protocol"]
    tags = {
        "enat.model": model_card.registered_name(model) if model is not None else samples.summary["name"],
        "enat.variant": node.partition("@")[2] or MAIN,
        "enat.dataset": model.summary["dataset"] if model is not None else inputs["reference"].summary["dataset"],
        "enat.resolution": resolution_of(samples, inputs),
        "enat.num_samples": num_samples_of(samples),
        "enat.protocol": canonical_json(protocol).decode(),
        "enat.protocol_digest": protocol_digest(protocol),
        "enat.samples": f"{samples.stage}/{samples.key}",
    }
    if model is not None:
        tags |= {"enat.parameters": model.summary["parameters"], "enat.train_steps": model.summary["num_steps"]}
    if "sampler" in samples.summary:
        sampler = samples.summary["sampler"]
        tags |= {f"enat.{name}": samples.summary[key] for name, key in _MADE_WITH.items()}
        tags["enat.num_steps"] = sampler["num_steps"]
        if sampler["guidance_scales"] is None:  # a list of weights takes its place
            tags["enat.guidance_scale"] = sampler["guidance_scale"]
    return {name: str(value) for name, value in tags.items()}


def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Tags, the picture, and what all of it took, on the tracking run of the stage, also where the evaluation was reused."""
    tags = tags_of(manifest, inputs, context.node)
    if context.prices is not None:
        tags["enat.currency"] = context.prices.currency  # of cost/total_money
    context.run.set_tags(tags)
    context.run.log_bytes(context.store.fetch(manifest, GRID).read_bytes(), GRID)  # a cached file has another name
    context.run.log_metrics(cost_metrics(context.store, manifest, context.prices))
    evaluation_record.record(manifest, inputs, context, SCORES)
