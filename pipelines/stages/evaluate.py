"""Stage evaluate: scores of samples, and the cost of making one.

Computes features of the samples on Ray and scores them against the reference, and reports analytic MACs and measured time of a
sample. On request, a classifier that is independent of the extractor measures how often it sees the class that was asked for.
Samples are codes of stage `generate`, or images of another generator (stage `images`), whose cost is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from enat.config import PRECISIONS, check_choices, check_in
from enat.cost import decoder_macs
from enat.images import png_bytes
from enat.metrics.extractors import BUILT_IN, OF_INCEPTION, extractor_macs
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster import tasks
from pipelines.cluster.resources import Execution, TokenizerExecution, Workers
from pipelines.data.dataset import Dataset, DatasetSummary
from pipelines.data.image_sets import ImageSetConfig
from pipelines.data.samples import SamplesSummary, image_cost, read_samples
from pipelines.data.sources.config import DatasetConfig
from pipelines.evaluation import judge
from pipelines.evaluation import protocol as evaluation_protocol
from pipelines.evaluation.clip_score import PREFIX as CLIP_PREFIX
from pipelines.evaluation.clip_score import ClipFolder, captions_of, embed_captions, embed_images
from pipelines.evaluation.extractors import ExtractorFile, ReferenceSummary, require_same_features
from pipelines.evaluation.features import (
    BLOCK_SIZE,
    MOMENTS_FILES,
    FeatureSet,
    FeatureSpec,
    compute_features,
    feature_files,
    feature_work,
    num_feature_parts,
    read_rows,
    stored_moments,
)
from pipelines.evaluation.readers import ROUNDINGS, SourceImages, sample_reader
from pipelines.evaluation.scores import (
    METRICS,
    Available,
    ImageStatistics,
    Scores,
    ScoreSettings,
    TaskPool,
    compute_scores,
    mean_of_replicates,
    published_name,
)
from pipelines.registry.evaluation_record import EvaluationSummary
from pipelines.registry.influences import INFLUENCES, REPLICATES, save_influences, with_interval
from pipelines.storage.external import folder_digest
from pipelines.storage.s3_client import S3Config
from pipelines.workflow.config import added, set_by
from pipelines.workflow.models import TokenizerSummary
from pipelines.workflow.stage import SCRATCH, Input, Stage, StageContext, StageResult
from pipelines.workflow.summary import Summary
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    import torch

    from enat.metrics.moments import Moments


JUDGES = ("svc",)
_SUMMARIES: dict[str, type[Summary]] = {"reference": ReferenceSummary, "tokenizer": TokenizerSummary, "dataset": DatasetSummary}
_PRODUCTS_OF_SCORES = 4  # of all pairs: kernel distance, precision and recall compare samples with real images and each other
_JUDGING_SECONDS = 1e-3  # of one real image that the judge is fitted on
_LISTED = ("fid", "frechet_distance", "inception_score", "class_agreement")  # the first two of these are listed
_NEED_REAL_ROWS = {"kernel_distance", "precision_recall", "density_coverage", "authenticity", "cmmd"}
_SAMPLING = (
    "sampling_images_per_second",
    "sampling_worker_seconds_per_image",
    "sampling_device_seconds_per_image",
    "peak_memory_gb",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores of samples against the reference, and what a sample costs."""

    metrics: tuple[str, ...] | None = None
    """Metrics to compute, in addition to "frechet_distance". Null computes all that the extractor and the reference allow."""
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    """Settings of the metrics."""
    judge: str | None = None
    """Classifier that has nothing to do with the extractor: "svc", a support vector machine fitted on the pixels of real images.
    Null uses none."""
    clip_score: str | None = added(None)
    """CLIP model by which samples of captions get a CLIP score: a folder that all workers see, s3:// or hf://owner/name, such as
    hf://openai/clip-vit-large-patch14. Null computes none."""
    num_samples: int | None = added(None)
    """Score only the first samples of each set. Null scores all. Unit: images."""
    rounding: str = "uint8"
    """Rounding of decoded samples before features are computed: "uint8", as in image files, or "float" for none."""
    precision: str = added("fp32")
    """Number format of the decoder: "fp32", "tf32" (on GPUs) or "bf16". For the last two, the mean change of a pixel against
    fp32 is measured on the first samples. The extractor's is `reference.precision`."""
    dataset: DatasetConfig | None = set_by("dataset")
    """Real images for the judge."""
    s3: S3Config | None = set_by("s3 or buckets")
    """Access to the bucket of `clip_score`."""
    images: ImageSetConfig | None = set_by("enat evaluate --samples")
    """Images of another generator."""
    execution: TokenizerExecution = field(default_factory=TokenizerExecution)
    """The workers of this stage."""

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge not in JUDGES:
            raise ValueError(f"judge is {self.judge!r}; choose one of {', '.join(JUDGES)}, or leave it out")
        for metric in self.metrics or ():
            if metric not in METRICS:
                raise ValueError(f"metrics names {metric!r}; choose from {', '.join(METRICS)}")
        check_choices(self, rounding=ROUNDINGS, precision=PRECISIONS)
        check_in(self, "[2, inf)", "num_samples")

    def identity(self) -> dict[str, Any]:
        metrics = None if self.metrics is None else sorted({*self.metrics, "frechet_distance"})
        found = {"metrics": metrics, "settings": asdict(self.settings), "judge": self.judge}
        since = {
            "rounding": (self.rounding, "uint8"),
            "precision": (self.precision, "fp32"),
            "num_samples": (self.num_samples, None),
            "clip_score": (self.clip_digest(), None),
        }  # earlier evaluations keep their keys
        return found | {name: value for name, (value, default) in since.items() if value != default}

    def clip_digest(self) -> str | None:
        return None if self.clip_score is None else folder_digest(ClipFolder(self.clip_score, self.s3).path())


def check_metrics(config: EvaluateConfig, extractor: str, num_samples: int, num_kept: int) -> None:
    """Raises ValueError for metrics that a built-in extractor and these numbers of images rule out, before anything is computed."""
    if config.metrics is not None and extractor in BUILT_IN:
        outputs = ("features", "spatial", "logits") if extractor in OF_INCEPTION else ("features",)
        Available(
            extractor=extractor,
            outputs=outputs,
            has_spatial="spatial" in outputs,
            num_generated=num_samples,
            num_reference=num_kept,
            settings=config.settings,
        ).chosen(config.metrics)


def run(config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads samples (codes of stage `generate` with their tokenizer and model, or images of stage `images`) and a reference; with a
    judge also the index of the dataset.

    Writes moments and features of the samples, and a picture of the first ones. Measures the scores, the analytic cost of an image
    and the measured time of an image. Raises ValueError if samples and reference cannot be compared.
    """
    samples, reference = inputs["samples"], inputs["reference"]
    num_samples = evaluation_protocol.num_samples_of(samples, config.num_samples)
    require_same_features(reference)
    _check_resolution(samples, inputs)
    real_images = ReferenceSummary.read(reference)
    real_moments = stored_moments(context.store, reference)
    settings = config.settings.fitted(num_samples, real_images.num_kept)
    chosen = Available(
        extractor=real_images.extractor,
        outputs=tuple(real_images.outputs),
        has_spatial="spatial" in real_moments,
        num_generated=num_samples,
        num_reference=real_images.num_kept,
        settings=settings,
    ).chosen(config.metrics)
    execution = context.connect_for(config.execution, "evaluate")
    pool = TaskPool(config.execution, lambda total: context.bar(total, "parts of the scores"))
    config = replace(config, execution=execution)
    jobs = _features(config, inputs, context)
    real = _real_statistics(reference, real_moments, chosen, context)
    replicates = [compute_scores(chosen, _statistics(job, samples, chosen, context), real, settings, pool) for job in jobs]
    judging_seconds = 0.0
    if config.judge is not None:
        judging_seconds = _judge_samples(replicates, config, inputs, context)
    clip_jobs = _clip_scores(replicates, config, inputs, pool, context) if config.clip_score is not None else []
    scores = _named(mean_of_replicates(replicates), real_images.extractor)
    protocol = evaluation_protocol.protocol_of(
        reference,
        samples,
        config.settings,
        rounding=config.rounding,
        num_samples=config.num_samples,
        clip_digest=config.clip_digest(),
        precision=config.precision,
    )
    grid = evaluation_protocol.sample_grid(_shown(jobs[0], config, inputs, context), inputs)
    all_jobs = (*jobs, *clip_jobs)
    told = {name: _SUMMARIES[name].read(inputs[name]) for name in _SUMMARIES if name in inputs}
    works = _work(config, num_samples, len(jobs), {**told, "samples": evaluation_protocol.samples_summary(samples)})
    seconds = [sum(job.worker_seconds for job in jobs), pool.seconds + pool.cpu_seconds, judging_seconds]
    seconds += [sum(job.worker_seconds for job in clip_jobs)] if config.clip_score is not None else []
    return StageResult(
        files=[
            *(
                context.write(_prefix(replicate) + MOMENTS_FILES[output], found.save)
                for replicate, job in enumerate(jobs)
                for output, found in job.moments.items()
            ),
            *(file for job in all_jobs for file in job.files),
            context.write(INFLUENCES, lambda path: save_influences(path, scores.influences, scores.labels)),
        ],
        records=[context.write(evaluation_protocol.GRID, lambda path: path.write_bytes(png_bytes(grid)))],
        summary=EvaluationSummary(
            extractor=real_images.extractor,
            reference_digest=reference.digest,
            num_samples=num_samples,
            num_reference=real_images.num_images,
            rounding=config.rounding,
            protocol=protocol,
            protocol_digest=evaluation_protocol.protocol_digest(protocol),
            metrics=tuple(chosen),
            settings=asdict(settings),
        ),
        metrics=scores.by_name | _counted(inputs) | _measured(samples, jobs, config.execution) | jobs[0].changes,
        worker_seconds=sum(job.worker_seconds for job in all_jobs) + pool.seconds + pool.cpu_seconds + judging_seconds,
        device_seconds=sum(job.device_seconds for job in all_jobs) + config.execution.device_seconds(pool.seconds),
        work=[Done(work, took, work.num_workers) for work, took in zip(works, seconds, strict=True)],
    )


def foresee(config: EvaluateConfig, inputs: Mapping[str, Any]) -> Foreseen:
    samples, real = inputs["samples"], inputs["reference"]
    replicates = getattr(samples, "replicates", 1)
    num_samples = config.num_samples or (samples.num_samples if isinstance(samples, SamplesSummary) else samples.num_images)
    width = real.outputs["features"]
    return Foreseen(
        summary=EvaluationSummary(
            extractor=real.extractor,
            reference_digest="",
            num_samples=num_samples,
            num_reference=real.num_images,
            rounding=config.rounding,
            protocol={},
            protocol_digest="",
            metrics=(),
            settings={},
        ),
        work=_work(config, num_samples, replicates, inputs),
        size=replicates * (4 * num_samples * width + 8 * width**2),
        num_parts=replicates * num_feature_parts(num_samples),
    )


def _work(config: EvaluateConfig, num_samples: int, replicates: int, inputs: Mapping[str, Any]) -> list[Work]:
    """inputs: summaries by name."""
    real: ReferenceSummary = inputs["reference"]
    tokenizer: TokenizerSummary | None = inputs.get("tokenizer")
    decoding = decoder_macs(tokenizer.config) if tokenizer is not None else 0
    resolution = tokenizer.config.resolution if tokenizer is not None else inputs["samples"].resolution
    width, execution = real.outputs["features"], config.execution
    num_pairs = num_samples * max(num_samples, real.num_kept)
    judged = inputs["dataset"].num_images if config.judge is not None else 0
    count, rest = replicates * num_samples, (execution, real.images_per_pass, config.precision)
    work = [
        feature_work(count, decoding + extractor_macs(real.extractor, resolution), *rest),
        Work(name="scores", count=replicates, macs=_PRODUCTS_OF_SCORES * num_pairs * width, workers=execution),
        Work(name="judging", count=judged, cpu_seconds=_JUDGING_SECONDS, workers=Workers()),
    ]
    if config.clip_score is not None:
        clip = feature_work(count, decoding + extractor_macs("clip", resolution), *rest)
        work.append(replace(clip, name="clip score"))
    return work


def _check_resolution(samples: Manifest, inputs: Mapping[str, Manifest]) -> None:
    """Check this here, because extractors resize images of any size."""
    made, real = evaluation_protocol.resolution_of(samples, inputs), ReferenceSummary.read(inputs["reference"]).resolution
    if real is not None and made != real:
        raise ValueError(f"the samples have {made} px and the reference {real} px; scores of two sizes are not comparable")


def _real_statistics(
    reference: Manifest, moments: Mapping[str, Moments], chosen: tuple[str, ...], context: StageContext
) -> ImageStatistics:
    """Of the reference. Its rows are read only if a metric needs them."""
    rows = None
    if not _NEED_REAL_ROWS.isdisjoint(chosen):
        rows = read_rows(context.store, reference.stage, reference.key, feature_files(reference), "features")
    return ImageStatistics(moments=moments, features=rows)


def _statistics(job: FeatureSet, samples: Manifest, chosen: tuple[str, ...], context: StageContext) -> ImageStatistics:
    """Of the samples."""
    outputs = ["features", *(["logits"] if "inception_score" in chosen else [])]
    rows = {output: read_rows(context.store, context.stage, context.key, job.files, output) for output in outputs}
    has_labels = samples.stage != "images" and SamplesSummary.read(samples).labels != "captions"
    labels = read_samples(context.store, samples, 0, job.count).labels if has_labels else None
    return ImageStatistics(moments=job.moments, labels=labels, **rows)


def _features(config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> list[FeatureSet]:
    """Of each replicate. Those of an earlier evaluation in this run are taken if only the protocol differs from it."""
    samples, reference, found = inputs["samples"], inputs["reference"], []
    if (earlier := _same_features(config, inputs, context)) is not None:
        return [_copied(earlier, replicate, context) for replicate in range(evaluation_protocol.replicates_of(samples))]
    extractor = ExtractorFile.of_reference(context.store, reference)
    for replicate in range(evaluation_protocol.replicates_of(samples)):
        spec = FeatureSpec(
            num_images=evaluation_protocol.num_samples_of(samples, config.num_samples),
            images_per_pass=ReferenceSummary.read(reference).images_per_pass,
            prefix=_prefix(replicate),
            num_shown=0 if replicate else evaluation_protocol.num_shown(inputs, config.num_samples),
        )
        places = (context.store, samples, inputs.get("tokenizer"), config.images)
        reader = sample_reader(*places, rounding=config.rounding, replicate=replicate, **_decoding(config))
        found.append(compute_features(reader, spec, extractor, config.execution, context, beside=_beside(config, inputs, context)))
    return found


def _shown(job: FeatureSet, config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> torch.Tensor:
    """The samples of the grid. Those whose features were computed by an earlier command are decoded again, in this process."""
    import torch

    if job.shown is not None:
        return torch.from_numpy(job.shown)
    reader = sample_reader(context.store, inputs["samples"], inputs.get("tokenizer"), config.images, precision=config.precision)
    count = evaluation_protocol.num_shown(inputs, config.num_samples)
    return evaluation_protocol.shown_images(reader, count, ReferenceSummary.read(inputs["reference"]).images_per_pass)


def _decoding(config: EvaluateConfig) -> dict[str, Any]:
    return {"precision": config.precision, "is_compiled": config.execution.compile}


def _beside(
    config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext
) -> list[tuple[ExtractorFile, StageContext]]:
    """Later evaluations of the same images by other extractors, each extractor once. Images are decoded once for all of them."""

    def images_of(config: EvaluateConfig, inputs: Mapping[str, Manifest]) -> tuple[Any, ...]:
        count = evaluation_protocol.num_samples_of(inputs["samples"], config.num_samples)
        made_from = [inputs[name].digest for name in ("samples", "tokenizer") if name in inputs]
        return *made_from, count, config.rounding, config.precision, ReferenceSummary.read(inputs["reference"]).images_per_pass

    own, known, found = images_of(config, inputs), {_features_by(ReferenceSummary.read(inputs["reference"]))}, []
    for sibling in context.siblings:
        reference = sibling.inputs["reference"]
        by = _features_by(ReferenceSummary.read(reference))
        try:
            require_same_features(reference)
            is_alike = by not in known and images_of(sibling.config, sibling.inputs) == own
            extractor = ExtractorFile.of_reference(context.store, reference)
        except ValueError:
            continue  # its own evaluation reports it
        if is_alike and config.rounding == "uint8":  # not every extractor takes others
            known.add(by)
            found.append((extractor, context.of(sibling)))
    return found


def _same_features(config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> Manifest | None:
    """An evaluation of the same samples by the same extractor."""
    own = ReferenceSummary.read(inputs["reference"])
    num_samples = evaluation_protocol.num_samples_of(inputs["samples"], config.num_samples)
    made_from = {name: inputs[name].digest for name in ("samples", "tokenizer") if name in inputs}
    for manifest in context.made.values():
        if manifest.stage.removeprefix(SCRATCH) != "evaluate" or manifest.stage_version != STAGE.version:
            continue
        summary, real = EvaluationSummary.read(manifest), context.store.read_input(manifest, "reference")
        if (
            real is not None
            and {name: manifest.inputs.get(name, {}).get("digest") for name in made_from} == made_from
            and (summary.num_samples, summary.rounding) == (num_samples, config.rounding)
            and summary.protocol.get("decoder", "fp32") == config.precision
            and _features_by(ReferenceSummary.read(real)) == _features_by(own)
        ):
            return manifest
    return None


def _features_by(reference: ReferenceSummary) -> tuple[Any, ...]:
    return (
        reference.extractor_digest,
        reference.images_per_pass,
        reference.features_version,
        reference.precision,
        tuple(sorted(reference.outputs)),
    )


def _copied(earlier: Manifest, replicate: int, context: StageContext) -> FeatureSet:
    """The features of another evaluation. They took no time here; decoding took what it took there."""
    store, prefix = context.store, _prefix(replicate)
    names = [file.name for file in feature_files(earlier, prefix)]
    files = [store.put_file(context.stage, context.key, name, store.fetch(earlier, name)) for name in names]
    moments = stored_moments(store, earlier, prefix)
    count = moments["features"].count
    assert count is not None
    return FeatureSet(
        count=count,
        num_kept=count,
        moments=moments,
        files=tuple(files),
        worker_seconds=0.0,
        device_seconds=0.0,
        decoding_seconds=count * earlier.metrics.get("decoding_worker_seconds_per_image", 0.0),
    )


def _prefix(replicate: int) -> str:
    """Of the names of files. Those of the first replicate have none."""
    return f"replicate-{replicate + 1}-" if replicate else ""


def _named(scores: Scores, extractor: str) -> Scores:
    """Renames scores to the names under which scores by Inception are published."""
    return Scores(
        by_name={published_name(name, extractor): value for name, value in scores.by_name.items()},
        influences={published_name(name, extractor): each for name, each in scores.influences.items()},
        labels=scores.labels,
    )


def _counted(inputs: Mapping[str, Manifest]) -> dict[str, float]:
    """The cost of one image by its architecture; empty for images that were made elsewhere."""
    if inputs["samples"].stage == "images":
        return {}
    cost = image_cost(inputs["samples"], inputs["model"], inputs["tokenizer"])
    measured = SamplesSummary.read(inputs["samples"]).measured
    parts = ("one_pass", "guidance", "transformer", "decoder", "total")
    return {
        **{f"gmacs_{part}": getattr(cost, f"{part}_macs") / 1e9 for part in parts},
        "gmacs_executed": cost.executed_total_macs / 1e9,
        "gflops_total": 2 * cost.total_macs / 1e9,
        "gflops_executed": 2 * cost.executed_total_macs / 1e9,
        **({} if measured is None else {"passes_per_image": measured.num_passes}),
    }


def _measured(samples: Manifest, jobs: Sequence[FeatureSet], execution: Execution) -> dict[str, float]:
    """Times of one image: making its codes, as measured by stage generate, decoding them, as measured here, and their sum.

    images_per_second: by all workers of both stages, one stage after the other.
    """
    if samples.stage == "images":
        return {}
    worker_seconds = sum(job.decoding_seconds for job in jobs) / sum(job.count for job in jobs)
    num_workers = min(execution.count, -(-jobs[0].count // BLOCK_SIZE))
    measured = {
        **{name: samples.metrics[name] for name in _SAMPLING},
        "decoding_images_per_second": num_workers / worker_seconds,
        "decoding_worker_seconds_per_image": worker_seconds,
        "decoding_device_seconds_per_image": execution.device_seconds(worker_seconds),
    }
    of = ("sampling", "decoding")
    for seconds in ("worker_seconds_per_image", "device_seconds_per_image"):
        measured[seconds] = sum(measured[f"{part}_{seconds}"] for part in of)
    measured["images_per_second"] = 1 / sum(1 / measured[f"{part}_images_per_second"] for part in of)
    return measured


def _clip_scores(
    replicates: Sequence[Scores], config: EvaluateConfig, inputs: Mapping[str, Manifest], pool: TaskPool, context: StageContext
) -> list[FeatureSet]:
    """Add the CLIP scores, and return the embeddings of the images of each replicate."""
    from enat.metrics.clip_score import clip_scores

    samples, per_pass = inputs["samples"], ReferenceSummary.read(inputs["reference"]).images_per_pass
    if "captions" not in inputs or SamplesSummary.read(samples).labels != "captions":
        raise ValueError("evaluate.clip_score needs samples of captions; leave it out for samples of classes")
    count = evaluation_protocol.num_samples_of(samples, config.num_samples)
    assert config.clip_score is not None
    clip, found = ClipFolder(config.clip_score, config.s3), []
    texts = captions_of(read_samples(context.store, samples, 0, count).captions, context.store, inputs["captions"])
    wanted = embed_captions(texts, clip, pool)  # replicates have the same captions
    for replicate, scores in enumerate(replicates):
        places = (context.store, samples, inputs["tokenizer"], config.images)
        reader = sample_reader(*places, replicate=replicate, **_decoding(config))
        spec = FeatureSpec(num_images=count, images_per_pass=per_pass, prefix=_prefix(replicate) + CLIP_PREFIX)
        embedded, job = embed_images(reader, spec, clip, config.execution, context)
        values = clip_scores(embedded, wanted)
        scores.add("clip_score", float(values.mean()), values - values.mean())
        found.append(job)
    return found


def _judge_samples(
    replicates: Sequence[Scores], config: EvaluateConfig, inputs: Mapping[str, Manifest], context: StageContext
) -> float:
    """Add the scores of the judge, and return its CPU seconds."""
    from enat.metrics.errors import standard_error

    if (labels := replicates[0].labels) is None:
        raise ValueError("evaluate.judge needs samples of classes from a model of this project; leave it out for other images")
    assert config.dataset is not None
    dataset = Dataset(config.dataset, context.store, inputs["dataset"])
    real = SourceImages(dataset, evaluation_protocol.resolution_of(inputs["samples"], inputs))
    judged, per_pass = labels[: judge.MAX_IMAGES], ReferenceSummary.read(inputs["reference"]).images_per_pass
    places = (context.store, inputs["samples"], inputs.get("tokenizer"), config.images)
    readers = [sample_reader(*places, replicate=number, precision=config.precision) for number in range(len(replicates))]
    found, accuracy, seconds = tasks.get(tasks.submit(judge.agreements, real, readers, per_pass, judged, resources={"num_cpus": 1}))
    for scores, agrees in zip(replicates, found, strict=True):
        if len(judged) == len(labels):
            scores.add("class_agreement", float(agrees.mean()), agrees - agrees.mean())
        else:  # influences are of all samples
            scores.by_name.update({"class_agreement": float(agrees.mean()), "class_agreement_se": standard_error(agrees, judged)})
        scores.by_name["judge_accuracy"] = accuracy
    return float(seconds)


def _describe(manifest: Manifest) -> str:
    scores = [f"{name} {with_interval(manifest.metrics, name)}" for name in _LISTED if name in manifest.metrics]
    sets = f"{manifest.metrics[REPLICATES]:g} x " if REPLICATES in manifest.metrics else ""
    return ", ".join([*scores[:2], f"{sets}{EvaluationSummary.read(manifest).num_samples:,} samples"])


STAGE = Stage(
    "evaluate",
    5,
    run,
    reads={
        "samples": Input(("images", "generate")),
        "tokenizer": Input(("tokenizer",), lambda config, run: config.images is None),
        "reference": Input(("reference",)),
        "model": Input(("train",), lambda config, run: config.images is None),
        "dataset": Input(("dataset",), lambda config, run: config.judge is not None),
        "captions": Input(("captions",), lambda config, run: config.clip_score is not None),
    },
    config=EvaluateConfig,
    imports=("torch", "enat.metrics.moments", "pipelines.stages.evaluate"),
    does_without_ray=True,
    summary=EvaluationSummary,
    foresee=foresee,
    kind="evaluation",
    files=(
        *MOMENTS_FILES.values(),
        "features-*.safetensors",
        "clip-*.safetensors",
        "replicate-*.safetensors",
        INFLUENCES,
        evaluation_protocol.GRID,
    ),
    external=("clip_score",),
    describe=_describe,
    reevaluation="measured",
    shares_work_on="samples",
    publish=evaluation_protocol.publish,
)
