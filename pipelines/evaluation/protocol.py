"""How an evaluation was measured (its protocol), its tags in MLflow, and a picture of the samples.

Scores of two evaluations are comparable only if their protocols are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from enat.images import make_grid
from pipelines.artifacts.manifest import Manifest
from pipelines.data.image_sets import ImageSetSummary
from pipelines.data.labels import CAPTION_CHOICES, NO_LABELS, ROWS, scheme_of_labels
from pipelines.data.samples import SamplesSummary
from pipelines.evaluation.extractors import ReferenceSummary
from pipelines.evaluation.readers import BlockReader, read_images
from pipelines.evaluation.scores import METRIC_VERSION, ScoreSettings
from pipelines.registry import evaluation_record, model_card
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.registry.influences import INFLUENCES
from pipelines.storage.base import canonical_json, digest_of
from pipelines.tracking.run import RunHandle
from pipelines.workflow.costs import cost_metrics
from pipelines.workflow.inputs import read_checkpoint, tracked_inputs
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.stage import MAIN, PublishContext

if TYPE_CHECKING:
    import torch

GRID = "samples.png"
# Scores that are shown, with their titles.
SCORES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "inception_score": "IS",
    "kid": "KID",
    "kernel_distance": "kernel distance",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "authenticity": "authenticity",
    "class_agreement": "class agreement",
    "clip_score": "CLIP score",
}
_LARGE = 64  # pixels; images of this size and above are not enlarged, and fewer are shown
_MOST_COLUMNS = 20


def protocol_of(
    reference: Manifest,
    samples: Manifest,
    settings: ScoreSettings,
    *,
    rounding: str = "uint8",
    num_samples: int | None = None,
    clip_digest: str | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Everything that a score depends on apart from the images. num_samples: that are scored, None for all.   clip_digest: of the
    model of CLIP scores.   precision: of the decoder of samples. fp32 is not named.

    num_reference: None if a published file does not state it.   num_kept: reference images whose features are stored, for metrics
    that need more than moments.   labels: see pipelines.data.labels.
    """
    real = ReferenceSummary.read(reference)
    return {
        "extractor": real.extractor,
        "extractor_digest": real.extractor_digest,
        "reference": real.of,
        "reference_digest": reference.digest,
        "num_samples": num_samples_of(samples, num_samples),
        "num_reference": real.num_images,
        "num_kept": real.num_kept,
        "rounding": f"{rounding}, stored as JPEG" if getattr(samples_summary(samples), "num_jpeg", 0) else rounding,
        "labels": scheme_of(samples),
        "metric_version": metric_version(settings),
        **({"clip": clip_digest} if clip_digest is not None else {}),
        **({"decoder": precision} if precision != "fp32" else {}),
        **({"extractor_precision": real.precision} if real.precision != "fp32" else {}),
    }


def metric_version(settings: ScoreSettings) -> str:
    """Of the scores: what they are defined as, with settings other than the usual ones."""
    usual = asdict(ScoreSettings())
    changed = [f"{name} {value}" for name, value in asdict(settings).items() if value != usual[name]]
    return ", ".join([str(METRIC_VERSION), *changed])


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    return digest_of(protocol)[:12]


def num_samples_of(samples: Manifest, first: int | None = None) -> int:
    """Number of samples of one replicate, generated here or elsewhere; or of the first ones, ValueError if there are fewer."""
    summary = samples_summary(samples)
    count = summary.num_images if isinstance(summary, ImageSetSummary) else summary.num_samples
    if first is not None and first > count:
        raise ValueError(f"evaluate.num_samples is {first}, but there are {count} samples")
    return first or count


def replicates_of(samples: Manifest) -> int:
    """Number of independent sets of samples. Images from elsewhere are one set."""
    return getattr(samples_summary(samples), "replicates", 1)


def resolution_of(samples: Manifest, inputs: Mapping[str, Manifest]) -> int:
    summary = samples_summary(samples)
    if isinstance(summary, ImageSetSummary):
        return summary.resolution
    return TokenizerSummary.read(inputs["tokenizer"]).config.resolution


def samples_summary(samples: Manifest) -> SamplesSummary | ImageSetSummary:
    """Of samples that stage `generate` made, or of images that stage `images` indexed."""
    return ImageSetSummary.read(samples) if samples.stage == "images" else SamplesSummary.read(samples)


def scheme_of(samples: Manifest) -> str:
    """How the labels of samples were chosen, in words; see pipelines.data.labels."""
    summary, config = samples_summary(samples), samples.config
    if isinstance(summary, ImageSetSummary):
        return summary.labels
    if summary.labels == "captions":
        dataset = config["dataset"]
        return f"captions of {dataset['name'] or dataset['kind']}, {CAPTION_CHOICES[config['caption_choice']]}"
    if summary.labels == ROWS:
        return f"{ROWS}, mask ratio {summary.mask_ratio:g}"
    if summary.labels == "given":
        return scheme_of_labels(np.resize(np.array(config["labels"]), summary.num_samples))
    if summary.has_each_class_in_turn:
        return scheme_of_labels(np.arange(summary.num_samples) % summary.num_classes)
    assert summary.labels == NO_LABELS, summary.labels
    return NO_LABELS


def sample_grid(images: torch.Tensor, inputs: Mapping[str, Manifest]) -> Image.Image:
    """The first samples in order, a column per class if classes come in turn. images: uint8 (R, 3, H, W), the first num_shown."""
    side = resolution_of(inputs["samples"], inputs)
    return make_grid(images, columns=_num_columns(inputs["samples"]), scale=max(1, _LARGE // side))


def num_shown(inputs: Mapping[str, Manifest], num_samples: int | None = None) -> int:
    """How many samples the grid shows. num_samples: that are evaluated, the first ones; None for all."""
    samples, columns = inputs["samples"], _num_columns(inputs["samples"])
    most = 64 if resolution_of(samples, inputs) <= _LARGE else 32
    return min(columns * max(2, most // columns), num_samples_of(samples, num_samples))


def shown_images(reader: BlockReader, count: int, images_per_pass: int) -> torch.Tensor:
    """The first samples, decoded here and alone. images_per_pass: at most so many at once."""
    num_passes = -(-count // images_per_pass)
    return read_images(reader, 0, count, -(-count // num_passes))


def _num_columns(samples: Manifest) -> int:
    num_classes = samples_summary(samples).num_classes
    return num_classes if 2 <= num_classes <= _MOST_COLUMNS else 8


def tags_of(manifest: Manifest, inputs: Mapping[str, Manifest], node: str, titles: Mapping[str, str]) -> dict[str, str]:
    """Tags of an evaluation. Outside samples have fewer of them.

    node: its id in the graph, "evaluate" or "evaluate@variant".   titles: see PublishContext.
    """
    samples, made = inputs["samples"], samples_summary(inputs["samples"])
    protocol = EvaluationSummary.read(manifest).protocol
    tags: dict[str, Any] = {
        "enat.variant": node.partition("@")[2] or MAIN,
        "enat.resolution": resolution_of(samples, inputs),
        "enat.num_samples": EvaluationSummary.read(manifest).num_samples,
        "enat.protocol": canonical_json(protocol).decode(),
        "enat.protocol_digest": protocol_digest(protocol),
        "enat.samples": f"{samples.stage}/{samples.key}",
    }
    tags |= _names(inputs, titles)
    if not isinstance(made, ImageSetSummary):
        model = ModelSummary.read(inputs["model"])
        tags |= {
            "enat.parameters": model.parameters,
            "enat.train_steps": made.train_steps or model.num_steps,
            "enat.num_steps": made.sampler.num_steps,
            # Settings that the times of the samples depend on.
            "enat.device": made.device,
            "enat.images_per_pass": made.batch_size,
            "enat.precision": made.precision,
        }
        if made.sampler.guidance_scales is None:  # a list of weights replaces the single one
            tags["enat.guidance_scale"] = made.sampler.guidance_scale
    return {name: str(value) for name, value in tags.items()}


def _names(inputs: Mapping[str, Manifest], titles: Mapping[str, str]) -> dict[str, str]:
    """Tags with the names of the model, of the data that it was trained on, and of the reference."""
    made, real = samples_summary(inputs["samples"]), ReferenceSummary.read(inputs["reference"])
    reference = titles.get("reference", real.dataset)
    if isinstance(made, ImageSetSummary):
        found = {"enat.model": titles.get("samples", made.name), "enat.dataset": reference}
    else:
        model, title = inputs["model"], titles.get("model")
        found = {"enat.model": model_card.registered_name(model, title), "enat.dataset": model_card.trained_on(model, title)}
    return {**found, "enat.reference": reference}


def publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Log an evaluation, and record its scores with the registered model."""
    log_evaluation(manifest, inputs, context)
    evaluation_record.record(manifest, inputs, context, SCORES)


def log_evaluation(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Log tags, the picture and costs to the tracking run of the stage, and what people compare to the run of the model."""
    tags = tags_of(manifest, inputs, context.node, context.titles)
    costs = cost_metrics(context.store, manifest, context.stages, context.prices)
    money = {"enat.currency": context.prices.currency} if context.prices is not None else {}  # of cost/total_money
    if not context.is_recorded:
        context.run.set_tags(tags | money)
        for name in (GRID, INFLUENCES):
            context.run.log_bytes(context.store.fetch(manifest, name).read_bytes(), name)  # a cached file has another name
        context.run.log_metrics(costs)
        _score_model(manifest, inputs, context)
    elif context.titles:
        context.run.set_tags(_names(inputs, context.titles))  # which may have been corrected since
    if context.model_run is not None:
        context.model_run.set_tags(money)
        _compare_by(context.model_run, manifest, inputs, context, costs)


def _score_model(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Log the scores to the checkpoint that the samples are from, with the reference as their dataset."""
    if (checkpoint := read_checkpoint(None, inputs)) is not None:
        node, _, variant = context.node.partition("@")
        protocol = f"{node.partition('/')[2]}/" if "/" in node else ""
        scores = {protocol + name: value for name, value in manifest.metrics.items()}
        (reference,) = tracked_inputs(context.store, context.stages, [inputs["reference"]])
        context.run.log_model_scores(checkpoint, scores, reference, variant or MAIN, model_card.VARIANT)


def _compare_by(
    run: RunHandle, manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext, costs: Mapping[str, float]
) -> None:
    """Log settings, scores, costs and the picture of a model to its run. Scores of further protocols have the name of their
    protocol before their own."""
    protocol = context.node.partition("@")[0].partition("/")[2]
    if protocol:
        run.log_metrics({f"{protocol}/{name}": value for name, value in manifest.metrics.items()})
        return
    trained = inputs["model"].metrics if "model" in inputs else {}
    values = {f"train/{name.removeprefix('final/')}": value for name, value in trained.items()}
    # MLflow draws a chart of each, also of zeros.
    spent = {name: value for name, value in costs.items() if value or name.startswith("cost/total_")}
    run.log_metrics({**manifest.metrics, **spent, **values})
    run.log_params(_settings(manifest, inputs, context.titles))
    run.log_bytes(context.store.fetch(manifest, GRID).read_bytes(), GRID)
    made_from = [(source["stage"], source["key"]) for each in inputs.values() for source in each.inputs.values()]
    read = [each for each in context.store.read_manifests(made_from) if isinstance(each, Manifest)]
    run.log_inputs(tracked_inputs(context.store, context.stages, [*inputs.values(), *read]))


def _settings(manifest: Manifest, inputs: Mapping[str, Manifest], titles: Mapping[str, str]) -> dict[str, Any]:
    """Of the model, its samples and their evaluation: what a column of MLflow's table of runs shows."""
    tags = tags_of(manifest, inputs, "", titles)
    names = ("model", "dataset", "resolution", "parameters", "train_steps", "num_steps", "guidance_scale", "num_samples")
    found: dict[str, Any] = {name: tags[f"enat.{name}"] for name in names if f"enat.{name}" in tags}
    if "tokenizer" in inputs:
        tokenizer = TokenizerSummary.read(inputs["tokenizer"])
        found["tokenizer"] = f"{tokenizer.config.codebook_size:,} codes, {inputs['tokenizer'].digest[:12]}"
    summary = EvaluationSummary.read(manifest)
    return found | {"protocol": f"{summary.extractor}, {summary.protocol_digest}"}
