"""Stage generate: codes for num_samples samples, one seed each: of classes in turn, of given labels, or of captions.

One Parquet file per shard_size samples. The codes of a sample depend only on its seed and its condition. A file that was committed
before a crash is not computed again, and neither are the files of a smaller set of the same samples in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from enat.config import ENATConfig, check_choices, check_in
from enat.sampler_config import IMAGES_PER_PASS, SamplerConfig
from enat.training.averages import exponent_of
from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import tasks
from pipelines.cluster.data_stream import map_by_workers, stream_records
from pipelines.cluster.device import device_name, peak_memory_gb, wait_for
from pipelines.cluster.resources import Execution
from pipelines.data.captions import CaptionFeatures, CaptionsSummary
from pipelines.data.dataset import INDEX
from pipelines.data.samples import (
    EACH_CLASS,
    NONE,
    MeasuredPasses,
    SamplePlan,
    Samples,
    SamplesSummary,
    caption_order,
    drawn_rows,
    masked_positions,
    num_given_of,
    num_masked_of,
    sample_label,
    sample_seed,
    samples_cost,
    shard_name,
    shard_ranges,
    write_samples,
)
from pipelines.data.sources.config import DatasetConfig
from pipelines.data.token_map import TokenMap
from pipelines.workflow import config as configuration
from pipelines.workflow.config import added
from pipelines.workflow.models import ModelSummary, averages_of, weights_of_step
from pipelines.workflow.stage import Input, Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    import ray
    import ray.data
    import torch

    from enat.model import TextCondition


CAPTION_CHOICES = ("drawn", "in_order")
PRECISIONS = ("fp32", "bf16")
_ROW_BYTES = 20  # of a sample without its codes
AVERAGED = "averaged.safetensors"
_PASSES = TypeAdapter(MeasuredPasses)
_MOST_EMA_ERROR = 0.1  # distance of profiles over the norm of the wanted one


@dataclass(frozen=True, kw_only=True)
class GenerateExecution(Execution):
    """Workers that generate samples."""

    compile: bool = False
    """Compile every block with torch.compile: a slower start, faster steps. It changes codes by rounding at most."""
    cuda_graph: bool = False
    """Record the sampler as one CUDA graph. Faster for models whose kernels take less time than their launch, such as ENAT-S. Needs
    GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuda_graph and not self.gpus_per_worker:
            raise ValueError("cuda_graph needs GPUs; set gpus_per_worker, or leave it out")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Samples of the model. Sample i depends on the seed and on i, not on workers or batches."""

    num_samples: int = 50_000
    """Number of samples, at least 2. Unit: images."""
    replicates: int = added(1)
    """Number of independent sets of num_samples samples, with the same labels or captions. Scores are means over them, and their
    spread is reported. The first set is the same for any number."""
    shard_size: int = 1024
    """Samples per Parquet file. An interrupted stage loses at most one file per worker. Unit: images."""
    checkpoint: int | None = added(None)
    """Generate with the EMA weights of this step of the training, which train.execution.keep_every keeps. Null takes the last step.
    Unit: steps."""
    ema_length: float | None = added(None)
    """Generate with an average of the weights of this relative length, put together from those that train.execution.ema_lengths
    kept, in (0, 0.2886]. It ends at `checkpoint`. Null takes the weights averaged by train.ema_decay."""
    guide_checkpoint: int | None = added(None)
    """Autoguidance (arXiv 2406.02507): guide away from what the EMA weights of this earlier step of the same training predict for
    the same label, instead of from the prediction for the null label. train.execution.keep_every keeps such weights.
    sampler.guidance_scale is w in earlier + w (last - earlier). It costs what guidance by the null label costs, and also guides
    models without labels. Null takes the null label. Unit: steps."""
    labels: tuple[int, ...] = ()
    """Classes to generate, in turn. Empty takes each class in turn."""
    caption_choice: str = "drawn"
    """Captions of a text model. "drawn": by the seed, one caption each of different images, then a second one of each, and so on.
    "in_order": as in the dataset. If captions run out, they start again with other seeds."""
    mask_ratio: float | None = None
    """Start from codes of the token map with this share of them masked, in (0, 1], and with the label of their row. Rows and
    positions are drawn by the seed. Null starts with all codes masked."""
    precision: str = "fp32"
    """Number format of the model: "fp32", or "bf16" by autocast."""
    forward_batch_size: int = IMAGES_PER_PASS
    """Images that the model always computes together, by index. A shard_size that it divides wastes no work. Unit: images."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The sampler."""
    dataset: DatasetConfig | None = None
    """Captions for a text model. Null takes the run's dataset. Other models do not use it."""
    seed: int | None = None
    """Seed of the samples. Null takes the run's seed."""
    execution: GenerateExecution = field(default_factory=GenerateExecution)
    """The workers of this stage. worker_batch_size images are computed in passes side by side on the threads of a CPU."""

    def __post_init__(self) -> None:
        check_in(self, "[2, inf)", "num_samples")
        check_in(self, "[1, inf)", "shard_size", "forward_batch_size", "replicates", "checkpoint", "guide_checkpoint")
        check_in(self, "(0, 1]", "mask_ratio")
        if self.ema_length is not None:
            exponent_of(self.ema_length)
        check_choices(self, caption_choice=CAPTION_CHOICES, precision=PRECISIONS)
        if self.guide_checkpoint is not None and self.sampler.guide_layers is not None:
            raise ValueError(
                "generate.guide_checkpoint and generate.sampler.guide_layers are both given; guidance leads away from one of them, "
                "so leave one out"
            )
        if self.execution.cuda_graph and self.sampler.entropy_bound is not None:
            raise ValueError(
                "generate.execution.cuda_graph records a sampler whose numbers of tokens are fixed, and sampler.entropy_bound "
                "chooses them at each step; leave one of them out"
            )
        if self.mask_ratio is not None and self.labels:
            raise ValueError("generate.mask_ratio takes the labels of the token map's rows; give no generate.labels with it")


def run(config: GenerateConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads a model; for a model of captions also caption features, and with mask_ratio a token map.

    Writes the codes of the samples, one Parquet file per shard_size samples. Measures time per image and peak memory. Raises
    ValueError if the model cannot do what the config asks for.
    """
    model = inputs["model"]
    architecture = ModelSummary.read(model).model
    scheme = label_scheme(config, architecture)
    if scheme == "captions" and "captions" not in inputs:
        raise ValueError("this model is conditioned on captions, so generate needs their features; give captions.encoder")
    shards = shard_ranges(config.num_samples, config.shard_size, config.replicates)
    averaged, ema_error = _averaged(config, model, context)
    if config.guide_checkpoint is not None:
        weights_of_step(model, config.guide_checkpoint, "generate.guide_checkpoint")
    names = [shard_name(part) for part in range(len(shards))]
    num_samples = config.num_samples * config.replicates
    done = context.store.resume_parts(context.stage, context.key)
    done |= _taken_over(config, inputs, names, done, context)
    todo = [{"part": part} for part, name in enumerate(names) if name not in done]
    if todo:
        config = replace(config, execution=context.connect_for(config.execution, "generate"))
        plan = tasks.put(_plan(config, architecture, inputs, context.store))

        def task(num_rows: int) -> _Task:
            num_workers = min(config.execution.count, num_rows)
            return _Task(config, model, averaged, inputs.get("captions"), plan, num_workers, context.for_workers())

        def job(rows: list[dict[str, int]]) -> ray.data.Dataset:
            import ray.data

            planned = ray.data.from_items(rows, override_num_blocks=len(rows))
            arguments = (task(len(rows)),)
            return map_by_workers(planned, _Sample, arguments, config.execution, len(rows), is_alone=context.is_alone)

        with context.bar(num_samples, "samples") as bar:
            bar.update(sum(record["rows"] for record in done.values()))
            for record in stream_records(todo, job, in_process=lambda: _Sample(task(len(todo)))):
                bar.advance(record["rows"])
    records = context.store.read_parts(context.stage, context.key)
    assert list(records) == names and sum(record["rows"] for record in records.values()) == num_samples
    own = [record for record in records.values() if not record.get("is_taken_over")]
    seconds = sum(record["seconds"] + record["start_seconds"] for record in own)
    measured = _measured_passes(list(records.values()))
    return StageResult(
        files=[FileRecord(**record["file"]) for record in records.values()],
        records=[averaged] if averaged is not None else [],
        summary=_summary(config, architecture, ", ".join(sorted({record["device"] for record in records.values()})), measured),
        metrics={
            **_metrics(config, list(records.values())),
            **({} if ema_error is None else {"ema_error": ema_error}),
            **({} if measured is None else {"passes_per_image": measured.num_passes}),
        },
        worker_seconds=seconds,
        device_seconds=config.execution.device_seconds(seconds),
        work=[_done(config, architecture, own, measured)] if own else [],
    )


def _measured_passes(records: Sequence[Mapping[str, Any]]) -> MeasuredPasses | None:
    """Means over the parts; None for a sampler that determines its passes."""
    parts = [_PASSES.validate_python(record["measured"]) for record in records if record.get("measured") is not None]
    assert len(parts) in (0, len(records))
    return MeasuredPasses.merged(parts, [record["rows"] for record in records]) if parts else None


def foresee(config: GenerateConfig, inputs: Mapping[str, Any]) -> Foreseen:
    architecture = inputs["model"].model
    num_samples = config.num_samples * config.replicates
    return Foreseen(
        summary=_summary(config, architecture, device=""),
        work=[_sampling(config, architecture)],
        size=num_samples * (2 * architecture.num_tokens + _ROW_BYTES),
        num_parts=len(shard_ranges(config.num_samples, config.shard_size, config.replicates)),
    )


def _sampling(config: GenerateConfig, architecture: ENATConfig) -> Work:
    summary = _summary(config, architecture, device="")
    num_given = num_given_of(summary, architecture)
    has_guide = config.guide_checkpoint is not None
    steps = range(config.sampler.num_steps)
    passes = sum(config.sampler.num_passes_at(step, architecture, num_given, has_guide=has_guide) for step in steps)
    layers = architecture.encoder_layers + architecture.decoder_layers
    return Work(
        name="sampling",
        count=config.num_samples * config.replicates,
        macs=samples_cost(summary, architecture).executed_transformer_macs,
        workers=config.execution,
        num_pieces=len(shard_ranges(config.num_samples, config.shard_size, config.replicates)),
        precision=config.precision,
        batch_size=config.forward_batch_size,
        num_blocks=passes * layers / config.forward_batch_size,
        is_most=config.sampler.entropy_bound is not None,
    )


def _done(
    config: GenerateConfig, architecture: ENATConfig, records: Sequence[Mapping[str, Any]], measured: MeasuredPasses | None
) -> Done:
    """records: of the samples that this run made."""
    seconds = sum(record["seconds"] for record in records)
    work = replace(_sampling(config, architecture), count=sum(record["rows"] for record in records))
    if measured is not None:
        work = replace(work, macs=measured.cost.executed_transformer_macs)
    return Done(work, seconds, seconds / sum(each["seconds"] / each["num_workers"] for each in records))


def _taken_over(
    config: GenerateConfig, inputs: Mapping[str, Manifest], names: Sequence[str], done: Mapping[str, Any], context: StageContext
) -> dict[str, dict[str, Any]]:
    """Copy the files of fewer of these samples that are among the artifacts of this run, and return their records by name.

    Times of an image stay those of their making, and what they took does not count again.
    """
    found: dict[str, dict[str, Any]] = {}
    if config.sampler.entropy_bound is not None:  # the passes of a part are measured where it is made
        return found
    asked = configuration.redacted(config)
    for earlier in context.made.values():
        is_same_stage = (earlier.stage, earlier.stage_version) == (context.stage, STAGE.version)
        if not is_same_stage or config.replicates > 1 or _question(earlier.config) != _question(asked):
            continue
        if {name: each["digest"] for name, each in earlier.inputs.items()} != {name: each.digest for name, each in inputs.items()}:
            continue
        num_full = min(earlier.config["num_samples"], config.num_samples) // config.shard_size
        for part, name in enumerate(names[:num_full]):
            if name in done or name in found:
                continue
            file = context.store.put_file(context.stage, context.key, name, context.store.fetch(earlier, name))
            record = _record_of(earlier, part, config.shard_size, file)
            context.store.put_part(context.stage, context.key, name, record)
            found[name] = record
    return found


def _question(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the codes of a sample, and their files."""
    return {name: value for name, value in config.items() if name not in ("num_samples", "execution", "dataset")}


def _record_of(earlier: Manifest, part: int, rows: int, file: FileRecord) -> dict[str, Any]:
    per_image, together = (earlier.metrics[f"sampling_{name}"] for name in ("worker_seconds_per_image", "images_per_second"))
    return {
        "part": part,
        "rows": rows,
        "file": asdict(file),
        "seconds": rows * per_image,
        "start_seconds": 0.0,
        "num_workers": per_image * together,
        "peak_memory_gb": earlier.metrics["peak_memory_gb"],
        "device": SamplesSummary.read(earlier).device,
        "is_taken_over": True,
    }


def _summary(
    config: GenerateConfig, architecture: ENATConfig, device: str, measured: MeasuredPasses | None = None
) -> SamplesSummary:
    return SamplesSummary(
        num_samples=config.num_samples,
        replicates=config.replicates,
        shard_size=config.shard_size,
        num_classes=architecture.num_classes,
        labels=label_scheme(config, architecture),
        mask_ratio=config.mask_ratio,
        sampler=config.sampler,
        train_steps=config.checkpoint,
        guide_steps=config.guide_checkpoint,
        ema_length=config.ema_length,
        precision=config.precision,
        batch_size=config.forward_batch_size,
        device=device,
        measured=measured,
    )


def _averaged(config: GenerateConfig, model: Manifest, context: StageContext) -> tuple[FileRecord | None, float | None]:
    """The average of the weights that the config asks for, if it is not one that the model has as such, and the error of its
    profile. Raises ValueError if the model did not keep what is needed."""
    from enat.checkpoint import load_enat, save_weights
    from enat.training.averages import Average, combine, read_combination

    if config.ema_length is None:
        weights_of_step(model, config.checkpoint)
        return None, None
    kept = averages_of(model)
    if not kept:
        raise ValueError(
            f"generate.ema_length is {config.ema_length:g}, but train/{model.key[:12]} kept no averages to make it from. Remove it "
            "and train again with train.execution.ema_lengths"
        )
    wanted = Average(config.checkpoint or ModelSummary.read(model).num_steps, config.ema_length)
    found = combine([*kept], wanted)
    if found.error > _MOST_EMA_ERROR:
        raise ValueError(
            f"generate.ema_length is {config.ema_length:g}, which the averages of train/{model.key[:12]} cannot make at step "
            f"{wanted.step}: the best combination is off by {100 * found.error:.0f}%, at most {100 * _MOST_EMA_ERROR:.0f}% are "
            "allowed. Give a length nearer to those of train.execution.ema_lengths, or train with a smaller keep_every"
        )
    files = [context.store.fetch(model, name) for name in kept.values()]
    averaged = load_enat(files[0])
    averaged.load_state_dict({**averaged.state_dict(), **read_combination(files, found.weights.tolist())})
    return context.write(AVERAGED, lambda path: save_weights(path, averaged)), found.error


def _metrics(config: GenerateConfig, records: list[dict[str, Any]]) -> dict[str, float]:
    """Of making codes; stage evaluate measures decoding. Seconds per image do not include loading the model.

    sampling_images_per_second: of all workers together.   peak_memory_gb: of the worker with the highest peak.
    """
    num_samples = config.num_samples * config.replicates
    per_image = sum(record["seconds"] for record in records) / num_samples
    return {
        "samples": num_samples,
        "sampling_images_per_second": num_samples / sum(record["seconds"] / record["num_workers"] for record in records),
        "sampling_worker_seconds_per_image": per_image,
        "sampling_device_seconds_per_image": config.execution.device_seconds(per_image),
        "peak_memory_gb": max(record["peak_memory_gb"] for record in records),
    }


def label_scheme(config: GenerateConfig, model: ENATConfig) -> str:
    """How labels are chosen, in words. Raises ValueError if the model cannot do what the config asks for."""
    config.sampler.check_model(model)
    if model.text_width is not None:
        for name, given in (("labels", config.labels), ("mask_ratio", config.mask_ratio)):
            if given:
                raise ValueError(f"generate.{name} is for models of classes, and this model is conditioned on captions")
        return "captions"
    if wrong := [label for label in config.labels if not 0 <= label < max(1, model.num_classes)]:
        raise ValueError(f"generate.labels has {wrong[0]}, but the classes of this model are 0 to {max(1, model.num_classes) - 1}")
    if config.mask_ratio is not None:
        return "token map rows"
    if config.labels:
        return "given"
    return EACH_CLASS if model.num_classes else "none"


def _plan(config: GenerateConfig, model: ENATConfig, inputs: Mapping[str, Manifest], store: ArtifactStore) -> SamplePlan:
    assert config.seed is not None
    if model.text_width is not None:
        order = _caption_order(config, inputs["captions"], store)
        return SamplePlan.of_captions(np.resize(order, config.num_samples))
    if config.mask_ratio is None:
        labels = [sample_label(index, model.num_classes, config.labels) for index in range(config.num_samples)]
        return SamplePlan.of_labels(np.array(labels, np.int64))
    token_map = TokenMap.open(store, inputs["token_map"])
    token_map.info.require(
        "the model",
        tokenizer_digest=ModelSummary.read(inputs["model"]).tokenizer_digest,
        grid_size=model.grid_size,
        codebook_size=model.codebook_size,
    )
    if not len(token_map):
        raise ValueError(f"the token map of {token_map.info.dataset} has no rows to begin with")
    rows = drawn_rows(len(token_map), config.num_samples, config.seed)
    codes, row_labels = token_map.take(rows, np.zeros(len(rows), bool))
    # A row without a label has the null label of the map, which differs from the model's if the model has no classes.
    row_labels = np.where(row_labels < model.num_classes, row_labels, model.null_label)
    return SamplePlan(row_labels, np.full_like(rows, NONE), rows, codes.astype(np.uint16))


def _caption_order(config: GenerateConfig, captions: Manifest, store: ArtifactStore) -> np.ndarray:
    num_captions = CaptionsSummary.read(captions).info.num_captions
    if config.caption_choice == "in_order":
        return np.arange(num_captions)
    index = store.read_input(captions, "dataset")
    if index is None:
        place = f"dataset/{captions.inputs['dataset']['key'][:12]}"
        raise ValueError(f"{place}, the index of these captions, is no longer in {store.uri}; make it again")
    first = pq.read_table(store.fetch(index, INDEX), columns=["first_caption"])["first_caption"].to_numpy()
    assert config.seed is not None
    return caption_order(first, num_captions, config.seed)


@dataclass(frozen=True)
class _Task:
    """The input of a worker. averaged: weights that the stage itself stored, None for those of the model.

    plan: reference to a SamplePlan.   num_workers: of the stage.
    """

    config: GenerateConfig
    model: Manifest
    averaged: FileRecord | None
    captions: Manifest | None
    plan: Any
    num_workers: int
    context: WorkerContext


class _Sample:
    """Part number -> a Parquet file in the store, and a record of it. One actor holds one model."""

    def __init__(self, task: _Task) -> None:
        from enat.checkpoint import load_enat
        from enat.sampling.cuda_graph import GraphedLoop
        from pipelines.sampling.fixed_batches import PassSampler, fix_numerics, pass_pool, passes_at_once

        started = time.monotonic()
        self.config, self.context, self.num_workers = task.config, task.context, task.num_workers
        execution, images_per_pass = self.config.execution, self.config.forward_batch_size
        fix_numerics(execution.device)
        sizes = {"batch_size": execution.worker_batch_size, "images_per_pass": images_per_pass}
        self.pool = pass_pool(passes_at_once(execution.device, **sizes, num_threads=execution.num_threads))
        self.plan: SamplePlan = tasks.get(task.plan)
        if task.averaged is None:
            weights = task.context.store.fetch(task.model, weights_of_step(task.model, self.config.checkpoint))
        else:
            weights = task.context.store.fetch_file(task.context.stage, task.context.key, task.averaged)
        self.model, self.guide = load_enat(weights).to(execution.device), None
        if self.config.guide_checkpoint is not None:
            earlier = weights_of_step(task.model, self.config.guide_checkpoint, "generate.guide_checkpoint")
            self.guide = load_enat(task.context.store.fetch(task.model, earlier)).to(execution.device)
        for model in filter(None, (self.model, self.guide)):
            if self.config.precision == "bf16":
                model.hold_bf16()
            if execution.compile:
                model.compile_blocks()
        self.captions = None if task.captions is None else CaptionFeatures.open(task.context.store, task.captions)
        assert self.config.seed is not None
        self.sampler = PassSampler(
            model=self.model,
            sampler=self.config.sampler,
            run_seed=self.config.seed,
            images_per_pass=images_per_pass,
            is_bf16=self.config.precision == "bf16",
            conditions=self._condition,
            starts=self._start,
            guide=self.guide,
            loop=GraphedLoop() if execution.cuda_graph else None,
        )
        if execution.compile or execution.device == "cuda":
            self._warm_up()
        self.start_seconds = time.monotonic() - started  # reported once, with the first part

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        import torch

        from pipelines.sampling.fixed_batches import split_into_passes

        started = time.monotonic()
        part, config, plan = int(batch["part"][0]), self.config, self.plan
        assert config.seed is not None
        shard = shard_ranges(config.num_samples, config.shard_size, config.replicates)[part]
        index = np.array(shard)
        of_plan = index % config.num_samples
        passes = split_into_passes(shard.start, shard.stop, config.forward_batch_size)
        codes, num_masked = zip(*self.pool.map(self._sample, passes), strict=True)
        samples = Samples(
            index=index,
            labels=plan.labels[of_plan],
            codes=torch.cat(codes).numpy(),
            seeds=np.array([sample_seed(config.seed, i) for i in index.tolist()]),
            captions=plan.captions[of_plan],
            rows=plan.rows[of_plan],
        )
        file = self.context.write(shard_name(part), lambda path: write_samples(path, samples))
        record = {
            "part": part,
            "rows": len(index),
            "file": asdict(file),
            "seconds": time.monotonic() - started,
            "start_seconds": self.start_seconds,
            "num_workers": self.num_workers,
            "measured": self._measured(torch.cat(num_masked).numpy()),
            "peak_memory_gb": peak_memory_gb(config.execution.device),
            "device": device_name(config.execution.device),
        }
        self.start_seconds = 0.0
        self.context.store.put_part(self.context.stage, self.context.key, shard_name(part), record)
        return {"record": [record]}

    def _sample(self, index: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (R, L), and the masked tokens in the input of each step (R, steps)."""
        states = self.sampler.states(index)
        return states[:, -1], (states[:, :-1] == self.model.config.mask_id).sum(dim=-1)

    def _measured(self, num_masked: np.ndarray) -> dict[str, Any] | None:
        """For the record of a part, if what the sampler does depends on the samples."""
        if self.config.sampler.entropy_bound is None:
            return None
        num_given = num_given_of(_summary(self.config, self.model.config, device=""), self.model.config)
        guide = self.guide.config if self.guide is not None else None
        return asdict(MeasuredPasses.of(num_masked, self.model.config, self.config.sampler, num_given, guide))

    def _warm_up(self) -> None:
        """Sample one pass, in which code is compiled and kernels are loaded: neither is time of an image."""
        from pipelines.sampling.fixed_batches import split_into_passes

        first = split_into_passes(0, min(self.config.shard_size, self.config.num_samples), self.config.forward_batch_size)[0]
        self.pool.submit(self.sampler.states, first).result()
        wait_for(self.config.execution.device)

    def _condition(self, samples: np.ndarray) -> torch.Tensor | TextCondition:
        import torch

        from enat.model import TextCondition

        of_plan = samples % self.config.num_samples
        if self.model.config.text_width is None:
            return torch.from_numpy(self.plan.labels[of_plan])
        assert self.captions is not None
        return TextCondition(*map(torch.from_numpy, self.captions.take(self.plan.captions[of_plan])))

    def _start(self, samples: np.ndarray) -> torch.Tensor | None:
        """int64 (P, L): codes of rows of the token map, equally many masked in each; None if all codes begin masked."""
        import torch

        if self.plan.start is None:
            return None
        assert self.config.mask_ratio is not None and self.config.seed is not None
        tokens = self.plan.start[samples % self.config.num_samples].astype(np.int64)
        num_tokens = tokens.shape[1]
        num_masked = num_masked_of(self.config.mask_ratio, num_tokens)
        for row, sample in zip(tokens, samples.tolist(), strict=True):
            row[masked_positions(sample_seed(self.config.seed, sample), num_tokens, num_masked)] = self.model.config.mask_id
        return torch.from_numpy(tokens)


def _describe(manifest: Manifest) -> str:
    summary = SamplesSummary.read(manifest)
    sets = f"{summary.replicates} x " if summary.replicates > 1 else ""
    return f"{sets}{summary.num_samples:,} samples, {summary.sampler.num_steps} steps, guidance {summary.sampler.guidance_scale:g}"


STAGE = Stage(
    "generate",
    4,
    run,
    reads={
        "model": Input(("train",)),
        "captions": Input(("captions",), lambda config, run: run.train.model.text),
        "token_map": Input(("token_map",), lambda config, run: config.mask_ratio is not None),
    },
    config=GenerateConfig,
    imports=("torch", "enat.sampling.sampler", "pipelines.stages.generate"),
    does_without_ray=True,
    summary=SamplesSummary,
    foresee=foresee,
    kind="generation",
    files=("part-*.parquet", AVERAGED),
    describe=_describe,
    reevaluation="measured",
)
