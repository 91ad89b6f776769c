"""Stage report: one self-contained HTML page with the samples, scores and cost of a pipeline run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from enat.config import check_in
from enat.images import make_grid, png_bytes
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import CaptionFeatures
from pipelines.data.dataset import INDEX
from pipelines.data.samples import NONE, Samples, SamplesSummary, image_cost, num_given_of, read_samples
from pipelines.data.token_map import TokenMapSummary
from pipelines.evaluation.nearest import PICTURE as PAIRS
from pipelines.evaluation.nearest import AuditSummary, MemorizationSummary
from pipelines.evaluation.protocol import SCORES
from pipelines.pages import page
from pipelines.pages.chart import Chart, Point, Series, png_of
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.registry.influences import REPLICATES, half_interval, with_interval
from pipelines.training.task import SCORES as SCORES_FILE
from pipelines.workflow.config import set_by
from pipelines.workflow.models import ModelSummary, TokenizerSummary
from pipelines.workflow.stage import MAIN, Input, Stage, StageContext, StageResult
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Done, Foreseen, Work, read_prediction

if TYPE_CHECKING:
    import torch

    from enat.model import TextCondition
    from enat.tokenizer import VQGAN


PAGE = "report.html"
PICTURE = "samples.png"
_SECONDS_OF_MODEL = 2.0
_BYTES = 1e6
_COLUMNS = 10  # of the grid where samples are not of each class in turn
_MOST_UNSEEN = 3  # what is seen in none of N samples is in at most 3 of N, at 95%
_RECONSTRUCTION_PIXELS = 48  # to which stage tokenizer enlarges small images


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
    dataset_name: str | None = set_by("dataset.name")
    """Name of the dataset."""
    variants: tuple[str, ...] = set_by("variants", ())
    """Variants of the run."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "samples_per_class", "num_progressions", "max_classes")


@dataclass(frozen=True, kw_only=True)
class ReportSummary(Summary):
    """name: of the run."""

    name: str | None = None


def run(config: ReportConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the artifacts of a run: tokenizer, token map, reference, model, samples and evaluation, the last three of every variant
    too; reconstruction, audit, memorization and captions if the run has them.

    Writes report.html and a picture of the samples, both as records. Logs the page and the loss curves as a PNG. Measures nothing.
    """
    import torch

    from enat.checkpoint import load_vqgan
    from pipelines.sampling.pictures import decode_codes, scale_for

    started = time.monotonic()
    vqgan = load_vqgan(context.store.fetch(inputs["tokenizer"], "vqgan.safetensors"))
    model, samples, store = inputs["model"], inputs["samples"], context.store
    shown = _shown_samples(config, samples, store)
    made, tokens = SamplesSummary.read(samples), TokenMapSummary.read(inputs["token_map"])
    dataset = config.dataset_name or tokens.info.dataset
    columns = min(made.num_classes, config.max_classes) if made.has_each_class_in_turn else _COLUMNS
    scale = scale_for(vqgan.config.resolution)
    grid = make_grid(decode_codes(vqgan, torch.from_numpy(shown.codes)), columns=columns, scale=scale)
    progression = _progressions(config, inputs, vqgan, store)
    history = json.loads(store.fetch(model, "history.json").read_text())
    charts = {"loss": _loss_chart(history)} if history else {}
    charts |= _score_charts(model, store)
    html = page.render(
        "pipelines.stages",
        "report.html.j2",
        charts,
        title=f"{config.name}: {dataset}",
        name=config.name,
        dataset=dataset,
        model=ModelSummary.read(model),
        evaluation=inputs["evaluation"],
        measured=EvaluationSummary.read(inputs["evaluation"]),
        headline=[(name, title) for name, title in SCORES.items() if name in inputs["evaluation"].metrics][:2],
        with_interval=with_interval,
        reconstruction=inputs["reconstruction"].metrics if "reconstruction" in inputs else None,
        memorization=_memorization(config, inputs),
        pairs=_pairs(inputs, store),
        grid=page.picture(grid),
        grid_classes=tokens.class_names[:columns] if made.has_each_class_in_turn else None,
        captions=_captions(shown, inputs, store),
        progression=page.picture(progression) if progression is not None else None,
        num_steps=made.sampler.num_steps,
        reconstructions=_reconstructions(inputs["tokenizer"], store, scale),
        scores=_scores(config, inputs),
        replicates=_replicates(inputs["evaluation"].metrics),
        protocols=_protocols(inputs),
        cost=_cost(inputs),
        artifacts=[
            {"name": name, "manifest": manifest, "place": store.place(manifest.stage, manifest.key)}
            for name, manifest in inputs.items()
        ],
    )
    files = [
        context.write(PAGE, lambda path: path.write_text(html, encoding="utf-8")),
        context.write(PICTURE, lambda path: path.write_bytes(png_bytes(grid))),
    ]
    context.run.log_file(context.store.fetch_file(context.stage, context.key, files[0]))
    if charts:
        context.run.log_bytes(png_of(list(charts.values())), "loss.png")
    done = Done(_page(config), time.monotonic() - started, 1)
    return StageResult(files=[], records=files, summary=ReportSummary(name=config.name), work=[done])


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
    from enat.sampling.sampler import sample
    from pipelines.sampling.pictures import scale_for, step_images, strip

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
    return strip(step_images(vqgan, trajectory, codes, enat.config.mask_id), scale_for(vqgan.config.resolution))


def _loss_chart(history: Sequence[Mapping[str, float]]) -> Chart:
    series = []
    for key, name in (("loss", "all"), ("fresh_loss", "fresh"), ("reuse_loss", "with reused features")):
        points = tuple(Point(row["step"], row[key]) for row in history if key in row)
        series.append(Series(name=name, points=points, line="solid", has_markers=False))
    return Chart(x_title="step", y_title="cross-entropy (nats)", series=tuple(series))


def _score_charts(model: Manifest, store: ArtifactStore) -> dict[str, Chart]:
    """A chart for each score that was computed while the model trained."""
    if not any(record.name == SCORES_FILE for record in model.records):
        return {}
    scores, charts = json.loads(store.fetch(model, SCORES_FILE).read_text()), {}
    for name, title in (SCORES | {"sliced_distance": "sliced Wasserstein distance"}).items():
        rows = [row for row in scores["rows"] if name in row]
        points = tuple(Point(row["step"], row[name], error=half_interval(row, name) or 0.0) for row in rows)
        if points:
            series = (Series(name=title, points=points, line="solid"),)
            charts[f"scores_{name}"] = Chart(x_title="step", y_title=f"{title} of {scores['num_samples']:,} samples", series=series)
    return charts


def _reconstructions(tokenizer: Manifest, store: ArtifactStore, scale: int) -> page.Picture | None:
    """scale: of images of this resolution on the page."""
    summary = TokenizerSummary.read(tokenizer)
    if summary.is_imported:
        return None
    made_scale = max(1, _RECONSTRUCTION_PIXELS // summary.config.resolution)
    return page.picture(Image.open(store.fetch(tokenizer, "reconstructions.png")), scale / made_scale)


def _scores(config: ReportConfig, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """A row per variant, the run's own model first, with a column for each score that any of them has."""
    suffixes = {variant: "" if variant == MAIN else f"@{variant}" for variant in (MAIN, *config.variants)}
    metrics = {variant: inputs[f"evaluation{suffix}"].metrics for variant, suffix in suffixes.items()}
    columns = {name: title for name, title in SCORES.items() if any(name in found for found in metrics.values())}
    columns |= {"gmacs_total": "GMACs/image", "worker_seconds_per_image": "worker ms/image"}
    rows = []
    for variant, suffix in suffixes.items():
        model = ModelSummary.read(inputs[f"model{suffix}"])
        num_samples = EvaluationSummary.read(inputs[f"evaluation{suffix}"]).num_samples
        first = [(variant, variant), (model.parameters, f"{model.parameters / 1e6:.2f} M")]
        train_steps = SamplesSummary.read(inputs[f"samples{suffix}"]).train_steps or model.num_steps
        counts = [(count, f"{count:,}") for count in (train_steps, num_samples)]
        rows.append([*first, *counts, *(_score(name, metrics[variant]) for name in columns)])
    return {"titles": ["model", "parameters", "train steps", "samples", *columns.values()], "rows": rows}


def _protocols(inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """A row for each other protocol of the same samples, with a column for each score that any of them has."""
    found = {
        name.removeprefix("evaluation/").replace("@", " of "): manifest
        for name, manifest in inputs.items()
        if name.startswith("evaluation/")
    }
    columns = {name: title for name, title in SCORES.items() if any(name in manifest.metrics for manifest in found.values())}
    rows = []
    for name, manifest in found.items():
        protocol = EvaluationSummary.read(manifest).protocol
        stated = [name, protocol["extractor"], protocol["reference"], f"{protocol['num_samples']:,}"]
        rows.append([*stated, *(_score(each, manifest.metrics)[1] for each in columns)])
    return {"titles": ["protocol", "extractor", "reference", "samples", *columns.values()], "rows": rows}


def _memorization(config: ReportConfig, inputs: Mapping[str, Manifest]) -> list[tuple[str, str, list[str]]]:
    """What was compared, how many, and its scores: samples of each variant (stage memorization), and real images (its audit)."""
    found = []
    for variant in (MAIN, *config.variants):
        manifest = inputs.get("memorization" if variant == MAIN else f"memorization@{variant}")
        if manifest is not None:
            count, metrics = MemorizationSummary.read(manifest).num_samples, manifest.metrics
            shares = [
                with_interval(metrics, name) if metrics[name] else f"0 (at most {_MOST_UNSEEN / count:.2g})"
                for name in ("close_copies", "copies")
            ]
            found.append((f"samples of {variant}", f"{count:,}", [with_interval(metrics, "nearest_distance"), *shares]))
    if "audit" in inputs:
        metrics, audited = inputs["audit"].metrics, AuditSummary.read(inputs["audit"]).num_audited
        found.append(("real images", f"{audited:,}", [f"{metrics['nearest_distance']:.4g}", "0.01 or less", ""]))
    return found


def _pairs(inputs: Mapping[str, Manifest], store: ArtifactStore) -> dict[str, page.Picture]:
    """The closest pairs, by what is compared with the images of the token map."""
    of = {"samples": "memorization", "real images": "audit"}
    return {title: page.picture(Image.open(store.fetch(inputs[name], PAIRS))) for title, name in of.items() if name in inputs}


def _replicates(metrics: Mapping[str, float]) -> list[tuple[str, list[str]]]:
    """A row per score of the run's own model: its value in each set of samples, and their standard deviation."""
    suffixes = [*(f"replicate_{number}" for number in range(1, int(metrics.get(REPLICATES, 1)) + 1)), "replicates_sd"]
    return [
        (title, [f"{metrics[f'{name}_{suffix}']:.4g}" for suffix in suffixes])
        for name, title in SCORES.items()
        if f"{name}_replicates_sd" in metrics
    ]


def _score(name: str, metrics: Mapping[str, float]) -> tuple[float | str, str]:
    """A value to sort by, and its text."""
    if name not in metrics:
        return "", "–"
    value = metrics[name]
    if name == "class_agreement":
        return value, f"{100 * value:.1f} %"
    if name == "worker_seconds_per_image":
        return value, f"{1000 * value:.3g}"
    return value, f"{value:.3g}" if name == "gmacs_total" else with_interval(metrics, name)


def _cost(inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Analytic cost of an image, and what the run's own stages took."""
    model, samples, tokenizer = (inputs[name] for name in ("model", "samples", "tokenizer"))
    architecture, made = ModelSummary.read(model).model, SamplesSummary.read(samples)
    sampler, cost = made.sampler, image_cost(samples, model, tokenizer)
    num_made = architecture.num_tokens - num_given_of(made, architecture)
    measured = made.measured.num_masked if made.measured is not None else ()
    masked: list[float] = [*(sampler.num_masked_at(step, num_made) for step in range(sampler.num_steps)), 0]
    if measured:
        masked = [*(round(count, 1) for count in measured), 0]
    macs = zip(cost.macs_per_step, cost.executed_macs_per_step, strict=True)
    rows = [
        (step + 1, f"{masked[step]} of {architecture.num_tokens}", round(masked[step] - masked[step + 1], 1), *both)
        for step, both in enumerate(macs)
    ]
    totals = [
        ("tokenizer's decoder", "", "", cost.decoder_macs, cost.decoder_macs),
        ("total", "", "", cost.total_macs, cost.executed_total_macs),
        ("of it, what guidance adds", "", "", cost.guidance_macs, cost.executed_guidance_macs),
    ]
    metrics = inputs["evaluation"].metrics
    per_image = [
        (f"{what} of one image", None, *(metrics[f"{part}_{kind}_seconds_per_image"] for kind in ("worker", "device")), None)
        for what, part in (("codes", "sampling"), ("pixels", "decoding"))
    ]
    times = ("seconds", "worker_seconds", "device_seconds")
    stages = [
        (name, *(inputs[name].provenance[each] for each in times), _predicted(inputs[name]))
        for name in ("tokenizer", "token_map", "reference", "model", "samples", "evaluation")
    ]
    return {
        "rows": [*rows, *totals],
        "guidance": "given per step" if sampler.guidance_scales else f"scale {sampler.guidance_scale:g}",
        "measured": [*per_image, *stages],
        "passes": made.measured.num_passes if made.measured is not None else None,
    }


def _predicted(manifest: Manifest) -> str | None:
    """What was predicted before the run that made it."""
    predicted = read_prediction(manifest.provenance)
    return None if predicted is None else f"{predicted['value']:.3g} ({predicted['low']:.3g} to {predicted['high']:.3g})"


def foresee(config: ReportConfig, inputs: Mapping[str, Any]) -> Foreseen:
    return Foreseen(summary=ReportSummary(name=config.name), work=[_page(config)], size=_BYTES)


def _page(config: ReportConfig) -> Work:
    return Work(name="page", count=1 + len(config.variants), cpu_seconds=_SECONDS_OF_MODEL)


STAGE = Stage(
    "report",
    4,
    run,
    reads={
        "tokenizer": Input(("tokenizer",)),
        "token_map": Input(("token_map",)),
        "reference": Input(("reference",)),
        "reconstruction": Input(("reconstruction",)),
        "captions": Input(("captions",), lambda config, run: run.train.model.text),
        "audit": Input(("audit",)),
        "memorization": Input(("memorization",), is_per_variant=True),
        "model": Input(("train",), is_per_variant=True),
        "samples": Input(("generate",), is_per_variant=True),
        "evaluation": Input(("evaluate",), is_per_variant=True, is_per_protocol=True),
    },
    config=ReportConfig,
    does_without_ray=True,
    summary=ReportSummary,
    foresee=foresee,
    files=(PAGE, PICTURE),
    describe=lambda manifest: ReportSummary.read(manifest).name or "",
)
