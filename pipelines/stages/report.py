"""Stage report: one self-contained HTML page that shows what a pipeline run made, what it is worth and what it cost."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from PIL import Image

from enat.checkpoint import load_enat, load_vqgan
from enat.cost import generation_cost
from enat.images import make_grid, png_bytes, to_uint8
from enat.model import ENATConfig
from enat.sampler import SamplerConfig, sample
from enat.tokenizer import VQGAN, VQGANConfig
from pipelines.artifacts import Manifest
from pipelines.samples import read_codes, sample_label, sample_seed
from pipelines.workflow import Stage, StageContext, StageResult

PAGE = "report.html"
MAIN = "main"  # what the run's own model is called beside its variants
_MASKED_GRAY = 160
_COLUMNS_WITHOUT_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """samples_per_class: rows of the grid.   num_progressions: samples shown step by step.   max_classes: columns of the grid."""

    samples_per_class: int = 8
    num_progressions: int = 6
    max_classes: int = 20
    name: str | None = None
    generate_seed: int | None = None
    variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.samples_per_class, self.num_progressions, self.max_classes) < 1:
            raise ValueError("report.samples_per_class, num_progressions and max_classes must be at least 1")


def run(config: ReportConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    vqgan = load_vqgan(context.store.fetch(inputs["tokenizer"], "vqgan.safetensors"))
    model, samples = inputs["model"], inputs["samples"]
    class_names = inputs["token_map"].summary["class_names"]
    grid = _sample_grid(config, samples, vqgan, context)
    history = json.loads(context.store.fetch(model, "history.json").read_text())
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=config.name,
            dataset=inputs["token_map"].summary["info"]["dataset"],
            model=model.summary,
            evaluation=inputs["evaluation"],
            grid=_data_uri(grid),
            grid_classes=class_names[: config.max_classes],
            progression=_data_uri(_progressions(config, model, samples, vqgan, context)),
            num_steps=samples.summary["sampler"]["num_steps"],
            loss_curve=_data_uri(_loss_curve(history)) if history else None,
            reconstructions=_reconstructions(inputs["tokenizer"], context),
            scores=_scores(config, inputs),
            cost=_cost(inputs),
            artifacts=[
                {"name": name, "manifest": manifest, "place": context.store.place(manifest.stage, manifest.key)}
                for name, manifest in inputs.items()
            ],
        )
    )
    files = [
        context.write(PAGE, lambda path: path.write_text(page, encoding="utf-8")),
        context.write("samples.png", lambda path: path.write_bytes(png_bytes(grid))),
    ]
    context.run.log_file(context.store.fetch_file(context.stage, context.key, files[0]))
    return StageResult(files=[], records=files, summary={"name": config.name})


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("pipelines.stages", "templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def _sample_grid(config: ReportConfig, samples: Manifest, vqgan: VQGAN, context: StageContext) -> Image.Image:
    """One column per class, samples_per_class rows; classes come in turn, so rows are runs of consecutive samples."""
    num_classes = int(samples.summary["num_classes"]) or _COLUMNS_WITHOUT_CLASSES
    count = min(config.samples_per_class * num_classes, int(samples.summary["num_samples"]))
    shown = read_codes(context.store, samples, 0, count)
    columns = min(num_classes, config.max_classes)
    codes = torch.from_numpy(shown.codes[shown.labels < columns])  # of a model without classes all labels are 0
    return make_grid(_decode(vqgan, codes), columns=columns, scale=_scale(vqgan, 48))


def _progressions(config: ReportConfig, model: Manifest, samples: Manifest, vqgan: VQGAN, context: StageContext) -> Image.Image:
    """A row per sample, a column per step; what is still masked is gray."""
    enat = load_enat(context.store.fetch(model, "model.safetensors"))
    sampler = SamplerConfig(**samples.summary["sampler"])
    assert config.generate_seed is not None
    index = range(min(config.num_progressions, int(samples.summary["num_samples"])))
    labels = torch.tensor([sample_label(i, enat.config.num_classes) for i in index])
    seeds = [sample_seed(config.generate_seed, i) for i in index]
    codes, trajectory = sample(enat, labels, sampler, seeds=seeds, return_trajectory=True)
    factor = vqgan.config.downsampling
    frames = []
    for tokens in [*trajectory[1:], codes]:
        is_masked = tokens == enat.config.mask_id
        images = _decode(vqgan, tokens.masked_fill(is_masked, 0))
        side = enat.config.grid_size
        pixels = is_masked.view(-1, 1, side, side).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        frames.append(images.masked_fill(pixels, _MASKED_GRAY))
    return make_grid(torch.stack(frames, dim=1).flatten(0, 1), columns=sampler.num_steps, scale=_scale(vqgan, 64))


def _decode(vqgan: VQGAN, codes: torch.Tensor) -> torch.Tensor:
    side = vqgan.config.grid_size
    return torch.cat([to_uint8(vqgan.decode(part)) for part in codes.view(-1, side, side).split(64)])


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
    if tokenizer.summary["is_imported"]:
        return None
    return _data_uri(Image.open(context.store.fetch(tokenizer, "reconstructions.png")))


def _scores(config: ReportConfig, inputs: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """A row per variant, the run's own model first."""
    rows = []
    for variant in (MAIN, *config.variants):
        suffix = "" if variant == MAIN else f"@{variant}"
        evaluation, model = inputs[f"evaluation{suffix}"], inputs[f"model{suffix}"]
        rows.append(
            {
                "variant": variant,
                "parameters": model.summary["parameters"],
                "train_steps": model.summary["num_steps"],
                "metrics": evaluation.metrics,
                "num_samples": evaluation.summary["num_samples"],
            }
        )
    return rows


def _cost(inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Analytic cost of an image, and what the run's own stages took."""
    model, samples, tokenizer = (inputs[name] for name in ("model", "samples", "tokenizer"))
    architecture, sampler = ENATConfig(**model.summary["model"]), SamplerConfig(**samples.summary["sampler"])
    cost = generation_cost(architecture, sampler, VQGANConfig(**tokenizer.summary["config"]))
    masked = [sampler.num_masked_at(step, architecture.num_tokens) for step in range(sampler.num_steps)]
    times = ("seconds", "worker_seconds", "device_seconds")
    per_sample = {name: samples.provenance[name] / samples.summary["num_samples"] for name in times}
    stages = ("tokenizer", "token_map", "reference", "model", "samples", "evaluation")
    return {
        "cost": cost,
        "masked": masked,
        "num_tokens": architecture.num_tokens,
        "guidance_scale": sampler.guidance_scale,
        "measured": [
            {"what": "codes of one sample", **per_sample},
            *({"what": name, **{time: inputs[name].provenance[time] for time in times}} for name in stages),
        ],
    }


def _data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


STAGE = Stage("report", 2, run)
