"""Stage report: one self-contained HTML page with the samples, scores and cost of a pipeline run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from enat.images import make_grid, png_bytes
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import CaptionFeatures
from pipelines.data.dataset import INDEX
from pipelines.data.samples import NONE, Samples, SamplesSummary, image_cost, num_given_of, read_samples
from pipelines.data.token_map import TokenMapSummary
from pipelines.evaluation.protocol import SCORES
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.workflow.config import set_by
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.stage import MAIN, Input, Stage, StageContext, StageResult
from pipelines.workflow.summary import Summary

if TYPE_CHECKING:
    import jinja2
    import torch

    from enat.model import TextCondition
    from enat.tokenizer import VQGAN


PAGE = "report.html"
PICTURE = "samples.png"
_KINDS = ("worker", "device")  # whose seconds per image are shown
_COLUMNS = 10  # of the grid where samples are not of each class in turn


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The page on a run."""

    samples_per_class: int = 8
    """Rows of the grid of samples."""
    num_progressions: int = 6
    """Samples that are shown step by step."""
    max_classes: int = 20
    """Columns of the grid of samples."""
    name: str | None = set_by("name")
    """Name of the run."""
    variants: tuple[str, ...] = set_by("variants", ())
    """Variants of the run."""

    def __post_init__(self) -> None:
        if min(self.samples_per_class, self.num_progressions, self.max_classes) < 1:
            raise ValueError("report.samples_per_class, num_progressions and max_classes must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ReportSummary(Summary):
    """name: of the run."""

    name: str | None = None


def run(config: ReportConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the artifacts of a run: tokenizer, token map, reference, model, samples and evaluation, the last three of every variant
    too; reconstruction and captions if the run has them.

    Writes report.html and a picture of the samples, both as records. Measures nothing.
    """
    import torch

    from enat.checkpoint import load_vqgan
    from pipelines.sampling.pictures import decode_codes

    vqgan = load_vqgan(context.store.fetch(inputs["tokenizer"], "vqgan.safetensors"))
    model, samples, store = inputs["model"], inputs["samples"], context.store
    shown = _shown_samples(config, samples, store)
    made, tokens = SamplesSummary.read(samples), TokenMapSummary.read(inputs["token_map"])
    columns = min(made.num_classes, config.max_classes) if made.has_each_class_in_turn else _COLUMNS
    grid = make_grid(decode_codes(vqgan, torch.from_numpy(shown.codes)), columns=columns, scale=_scale(vqgan, 48))
    progression = _progressions(config, inputs, vqgan, store)
    history = json.loads(store.fetch(model, "history.json").read_text())
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=config.name,
            dataset=tokens.info.dataset,
            model=ModelSummary.read(model),
            evaluation=inputs["evaluation"],
            measured=EvaluationSummary.read(inputs["evaluation"]),
            headline=[(name, title) for name, title in SCORES.items() if name in inputs["evaluation"].metrics][:2],
            reconstruction=inputs["reconstruction"].metrics if "reconstruction" in inputs else None,
            grid=_data_uri(grid),
            grid_classes=tokens.class_names[:columns] if made.has_each_class_in_turn else None,
            captions=_captions(shown, inputs, store),
            progression=_data_uri(progression) if progression is not None else None,
            num_steps=made.sampler.num_steps,
            loss_curve=_data_uri(_loss_curve(history)) if history else None,
            reconstructions=_reconstructions(inputs["tokenizer"], context),
            titles=_titles(config, inputs),
            scores=_scores(config, inputs),
            cost=_cost(inputs),
            artifacts=[
                {"name": name, "manifest": manifest, "place": store.place(manifest.stage, manifest.key)}
                for name, manifest in inputs.items()
            ],
        )
    )
    files = [
        context.write(PAGE, lambda path: path.write_text(page, encoding="utf-8")),
        context.write(PICTURE, lambda path: path.write_bytes(png_bytes(grid))),
    ]
    context.run.log_file(context.store.fetch_file(context.stage, context.key, files[0]))
    return StageResult(files=[], records=files, summary=ReportSummary(name=config.name))


def _environment() -> jinja2.Environment:
    import jinja2

    loader = jinja2.PackageLoader("pipelines.stages", "templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def _shown_samples(config: ReportConfig, samples: Manifest, store: ArtifactStore) -> Samples:
    """samples_per_class rows of a grid: a column per class where each comes in turn, else the first samples."""
    made = SamplesSummary.read(samples)
    columns = made.num_classes if made.has_each_class_in_turn else _COLUMNS
    shown = read_samples(store, samples, 0, min(config.samples_per_class * columns, made.num_samples))
    if not made.has_each_class_in_turn:
        return shown
    return shown.rows_where(shown.labels < config.max_classes)


def _captions(shown: Samples, inputs: Mapping[str, Manifest], store: ArtifactStore) -> list[str]:
    """What the samples of the grid were asked for, in their order; empty for a model of classes."""
    if "captions" not in inputs:
        return []
    source = inputs["captions"].inputs["dataset"]
    index = store.read_manifest(source["stage"], source["key"])
    if index is None:
        return [f"caption {number}" for number in shown.captions.tolist()]
    texts = pc.list_flatten(pq.read_table(store.fetch(index, INDEX), columns=["captions"])["captions"])
    captions: list[str] = texts.take(shown.captions).to_pylist()
    return captions


def _progressions(config: ReportConfig, inputs: Mapping[str, Manifest], vqgan: VQGAN, store: ArtifactStore) -> Image.Image | None:
    """A row per sample, a column per step; what is still masked is gray. None for samples that begin with codes of images."""
    import torch

    from enat.checkpoint import load_enat
    from enat.model import TextCondition
    from enat.sampler import sample
    from pipelines.sampling.pictures import step_images, strip

    model, samples = inputs["model"], inputs["samples"]
    made = SamplesSummary.read(samples)
    shown = read_samples(store, samples, 0, min(config.num_progressions, made.num_samples))
    if (shown.rows != NONE).any():
        return None
    enat = load_enat(store.fetch(model, "model.safetensors"))
    condition: torch.Tensor | TextCondition = torch.from_numpy(shown.labels)
    if "captions" in inputs:
        features = CaptionFeatures.open(store, inputs["captions"]).take(shown.captions)
        condition = TextCondition(*map(torch.from_numpy, features))
    codes, trajectory = sample(enat, condition, made.sampler, seeds=shown.seeds.tolist(), return_trajectory=True)
    return strip(step_images(vqgan, trajectory, codes, enat.config.mask_id), _scale(vqgan, 64))


def _scale(vqgan: VQGAN, pixels: int) -> int:
    return max(1, pixels // vqgan.config.resolution)


def _loss_curve(history: Sequence[Mapping[str, float]]) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "all"), ("fresh_loss", "fresh"), ("reuse_loss", "with reused features")):
        points = [(row["step"], row[name]) for row in history if name in row]
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.8 if name == "loss" else 0.9)
    axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)


def _reconstructions(tokenizer: Manifest, context: StageContext) -> str | None:
    if TokenizerSummary.read(tokenizer).is_imported:
        return None
    return _data_uri(Image.open(context.store.fetch(tokenizer, "reconstructions.png")))


def _titles(config: ReportConfig, inputs: Mapping[str, Manifest]) -> dict[str, str]:
    """Metric -> title, of those that any variant has."""
    suffixes = ["", *(f"@{variant}" for variant in config.variants)]
    found = {name for suffix in suffixes for name in inputs[f"evaluation{suffix}"].metrics}
    return {name: title for name, title in SCORES.items() if name in found}


def _scores(config: ReportConfig, inputs: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """A row per variant, the run's own model first."""
    rows = []
    for variant in (MAIN, *config.variants):
        suffix = "" if variant == MAIN else f"@{variant}"
        evaluation, model = inputs[f"evaluation{suffix}"], ModelSummary.read(inputs[f"model{suffix}"])
        rows.append(
            {
                "variant": variant,
                "parameters": model.parameters,
                "train_steps": model.num_steps,
                "metrics": evaluation.metrics,
                "num_samples": EvaluationSummary.read(evaluation).num_samples,
            }
        )
    return rows


def _cost(inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Analytic cost of an image, and what the run's own stages took."""
    model, samples, tokenizer = (inputs[name] for name in ("model", "samples", "tokenizer"))
    architecture, made = ModelSummary.read(model).model, SamplesSummary.read(samples)
    sampler = made.sampler
    num_made = architecture.num_tokens - num_given_of(made, architecture)
    masked = [sampler.num_masked_at(step, num_made) for step in range(sampler.num_steps)]
    times = ("seconds", "worker_seconds", "device_seconds")
    evaluation = inputs["evaluation"].metrics
    per_image = [
        {"what": f"{what} of one image", **{f"{kind}_seconds": evaluation[f"{part}_{kind}_seconds_per_image"] for kind in _KINDS}}
        for what, part in (("codes", "sampling"), ("pixels", "decoding"))
    ]
    stages = ("tokenizer", "token_map", "reference", "model", "samples", "evaluation")
    return {
        "cost": image_cost(samples, model, tokenizer),
        "masked": masked,
        "num_tokens": architecture.num_tokens,
        "guidance": "given per step" if sampler.guidance_scales else f"scale {sampler.guidance_scale:g}",
        "measured": [
            *per_image,
            *({"what": name, **{time: inputs[name].provenance[time] for time in times}} for name in stages),
        ],
    }


def _data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


STAGE = Stage(
    "report",
    3,
    run,
    reads={
        "tokenizer": Input(("tokenizer",)),
        "token_map": Input(("token_map",)),
        "reference": Input(("reference",)),
        "reconstruction": Input(("reconstruction",)),
        "captions": Input(("captions",), lambda config, run: run.train.model.text),
        "model": Input(("train",), is_per_variant=True),
        "samples": Input(("generate",), is_per_variant=True),
        "evaluation": Input(("evaluate",), is_per_variant=True),
    },
    config=ReportConfig,
    summary=ReportSummary,
    files=(PAGE, PICTURE),
    describe=lambda manifest: ReportSummary.read(manifest).name or "",
)
