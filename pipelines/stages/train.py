"""Stage train: an ENAT on a token map, by Ray Train and DeepSpeed.

Checkpoints are in the store under the stage's own key until the artifact is committed. The same command continues an interrupted
run, with any number of workers.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from rich.console import Console

from enat.config import ENATConfig, VQGANConfig
from enat.cost import mean_training_macs, num_parameters
from pipelines.artifacts.manifest import FileRecord, Manifest, name_of
from pipelines.cluster import connection, waiting
from pipelines.data.captions import CaptionsSummary
from pipelines.data.token_map import TokenMapInfo, TokenMapSummary
from pipelines.formatting import printable, show_size
from pipelines.registry import model_card
from pipelines.storage.external import local_file
from pipelines.training.config import TrainConfig
from pipelines.training.task import HISTORY, RAW_WEIGHTS, SCORES, Scoring, TrainResult, TrainTask, initial_model, read_scores
from pipelines.workflow.interruption import on_interrupt
from pipelines.workflow.models import WEIGHTS, ModelSummary, TokenizerSummary
from pipelines.workflow.progress import Reporter
from pipelines.workflow.stage import Input, PublishContext, Stage, StageContext, StageResult
from pipelines.workflow.work import Done, Foreseen, Work

if TYPE_CHECKING:
    from pipelines.training.checkpoints import ResumePoint
    from pipelines.training.trainer import RayTrainer


_SHOWN_FIRST = ("step", "loss", "token_accuracy", "images_per_second", "model_flops_utilization")


def run(config: TrainConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads a token map and its tokenizer, and caption features for a model of captions; or a tokenizer and published weights.

    Writes EMA weights, raw weights, the history, and the EMA weights of steps that are to be kept. Measures the loss and speed of
    the last step. Raises KeyboardInterrupt if it was asked to stop; its checkpoint is saved.
    """
    from pipelines.training.checkpoints import read_resume_point

    if config.weights is not None:
        return _imported(config, config.weights, inputs["tokenizer"], context)
    info = TokenMapSummary.read(inputs["token_map"]).info
    captions = CaptionsSummary.read(inputs["captions"]).info if "captions" in inputs else None
    architecture = config.model.architecture(info, captions)
    info.require(
        "the model",
        tokenizer_digest=inputs["tokenizer"].digest,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
    )
    started, before = time.monotonic(), read_resume_point(context)
    if before.step and (missing := sorted({*config.execution.ema_lengths} - {*before.ema_lengths})):
        raise ValueError(
            f"train.execution.ema_lengths has {missing[0]:g}, and training resumes from step {before.step}, whose checkpoint has "
            f"no such average; leave it out, or remove {context.store.place(context.stage, context.key)} to train from the start"
        )
    if config.num_steps == 0:
        trained = TrainResult(_untrained(config, architecture, context), (), [], 0, 0, 0, 0)
    else:
        context.connect_for(config.execution, "train")
        with context.bar(config.num_steps, "steps") as bar, bar.reporter() as reporter:
            trained = _fit(config, architecture, inputs, context, reporter)
        if trained.error is not None:
            raise trained.error
        if not trained.files:
            context.console.print(f"training stopped at step {trained.step}, which is saved; the same command continues from there")
            raise KeyboardInterrupt
    record = context.write(HISTORY, lambda path: path.write_text(json.dumps(trained.history)))
    scores, scoring_seconds = _scores(config, inputs, context)
    seconds = before.worker_seconds + (time.monotonic() - started) * _mean_workers(config, trained, before)
    last = trained.history[-1] if trained.history else {}
    names = sorted(last, key=lambda name: name not in _SHOWN_FIRST)
    summary = dataclasses.replace(
        _summary(architecture, info, config.num_steps, is_imported=False),
        skipped_draws=trained.skipped_draws,
        num_restarts=trained.num_restarts,
        num_rollbacks=trained.num_rollbacks,
    )
    return StageResult(
        files=trained.files,
        records=[record, *scores, *trained.milestones],
        summary=summary,
        metrics={f"final/{name}": last[name] for name in names} | scoring_seconds,
        worker_seconds=seconds,
        device_seconds=config.execution.device_seconds(seconds),
        work=_done(config, architecture, trained.history),
    )


def foresee(config: TrainConfig, inputs: Mapping[str, Any]) -> Foreseen:
    if config.weights is not None:
        info = _imported_info(config, inputs["tokenizer"].config, "")
        architecture, captions = config.model.architecture(info), None
    else:
        info, captions = inputs["token_map"].info, inputs["captions"].info if "captions" in inputs else None
        architecture = config.model.architecture(info, captions)
    num_kept = 0 if config.execution.keep_every is None else (config.num_steps - 1) // config.execution.keep_every
    num_averages = len(config.execution.ema_lengths) * (num_kept + 1)
    parameters = num_parameters(architecture)
    return Foreseen(
        summary=ModelSummary(
            model=architecture,
            parameters=parameters,
            tokenizer_digest=info.tokenizer_digest,
            num_steps=0 if config.weights is not None else config.num_steps,
            dataset=info.dataset,
            is_imported=config.weights is not None,
        ),
        work=[_training(config, architecture)] if config.weights is None else [],
        size=4 * parameters * (1 if config.weights is not None else 2 + num_kept + num_averages),
    )


def _training(config: TrainConfig, architecture: ENATConfig) -> Work:
    """The optimizer's steps. The mean over the masks of training."""
    execution = config.execution
    layers = architecture.encoder_layers + architecture.decoder_layers
    rows = min(config.group_size, config.batch_size // execution.count) / execution.microbatches
    return Work(
        name="training",
        count=config.num_steps * config.batch_size,
        macs=mean_training_macs(architecture, config.masking),
        workers=execution,
        precision=config.precision,
        batch_size=max(1, round(rows)),
        num_blocks=3 * layers / rows,  # the backward pass launches about twice as many kernels as the forward pass
        synced_bytes=(2 if execution.reduce_in == "bf16" else 4) * num_parameters(architecture) / config.batch_size,
    )


def _done(config: TrainConfig, architecture: ENATConfig, history: list[dict[str, float]]) -> list[Done]:
    """The steps with their time, without the time between intervals. Elastic training changes the number of workers.

    Nothing if a row has no time: the checkpoint that was resumed may be of an older version.
    """
    if not all({"step", "step_seconds", "num_workers"} <= row.keys() for row in history):
        return []
    intervals = [(each["step"] - step, each) for step, each in zip([0.0, *(row["step"] for row in history)], history, strict=False)]
    seconds = sum(steps * row["step_seconds"] for steps, row in intervals)
    worker_seconds = sum(steps * row["step_seconds"] * row["num_workers"] for steps, row in intervals)
    return [Done(_training(config, architecture), worker_seconds, worker_seconds / seconds)] if seconds else []


def _scores(
    config: TrainConfig, inputs: Mapping[str, Manifest], context: StageContext
) -> tuple[list[FileRecord], dict[str, float]]:
    """The scores along the training as a record, and what they cost. Steps whose scores failed are told."""
    if config.scores is None or not (found := read_scores(context)):
        return [], {}
    failed = {step: row["error"] for step, row in found.items() if "error" in row}
    for step, error in failed.items():
        context.console.print(f"the scores of step {step} are missing: {printable(error)}", markup=False, highlight=False)
    rows = [row for step, row in sorted(found.items()) if step not in failed]
    reference = "/".join(name_of(inputs["reference"]))
    content = json.dumps({"reference": reference, "num_samples": config.scores.num_samples, "rows": rows})
    record = context.write(SCORES, lambda path: path.write_text(content))
    return [record], {"scoring_seconds": sum(row["seconds"] for row in rows)}


def _scores_by_step(content: bytes, reference: Manifest) -> dict[int, dict[str, float]]:
    """The scores in a file that _scores wrote, with the names of the run's curves; none if another reference was compared with."""
    found = json.loads(content)
    if found["reference"] != "/".join(name_of(reference)):
        return {}
    left_out = ("step", "seconds")
    return {row["step"]: {f"scores/{name}": value for name, value in row.items() if name not in left_out} for row in found["rows"]}


def _mean_workers(config: TrainConfig, trained: TrainResult, before: ResumePoint) -> float:
    """The mean number of workers over the steps of this command; elastic runs change it."""
    num_workers = [row["num_workers"] for row in trained.history if row["step"] > before.step] or [config.execution.count]
    return sum(num_workers) / len(num_workers)


def _imported(config: TrainConfig, weights: str, tokenizer: Manifest, context: StageContext) -> StageResult:
    """Published weights, as if they had been trained here on codes of this tokenizer."""
    from enat.checkpoint import open_enat, save_weights

    codes = TokenizerSummary.read(tokenizer).config
    info = _imported_info(config, codes, tokenizer.digest)
    architecture = config.model.architecture(info)
    model = open_enat(local_file(weights, "train.weights", config.s3), architecture)
    return StageResult(
        files=[context.write(WEIGHTS, lambda path: save_weights(path, model))],
        records=[context.write(HISTORY, lambda path: path.write_text("[]"))],
        summary=_summary(architecture, info, num_steps=0, is_imported=True),
    )


def _imported_info(config: TrainConfig, codes: VQGANConfig, tokenizer_digest: str) -> TokenMapInfo:
    """Of the token map that published weights were trained on."""
    return TokenMapInfo(
        dataset="imported",
        resolution=codes.resolution,
        grid_size=codes.grid_size,
        codebook_size=codes.codebook_size,
        num_classes=config.model.num_classes or ENATConfig.num_classes,
        tokenizer_digest=tokenizer_digest,
    )


def _summary(architecture: ENATConfig, info: TokenMapInfo, num_steps: int, is_imported: bool) -> ModelSummary:
    return ModelSummary(
        model=architecture,
        parameters=num_parameters(architecture),
        tokenizer_digest=info.tokenizer_digest,
        num_steps=num_steps,
        dataset=info.dataset,
        is_imported=is_imported,
    )


def _untrained(config: TrainConfig, architecture: ENATConfig, context: StageContext) -> tuple[FileRecord, ...]:
    from enat.checkpoint import save_weights

    assert config.seed is not None
    model = initial_model(architecture, config.seed)
    return tuple(context.write(name, lambda path: save_weights(path, model)) for name in (WEIGHTS, RAW_WEIGHTS))


def _fit(
    config: TrainConfig, architecture: ENATConfig, inputs: Mapping[str, Manifest], context: StageContext, reporter: Reporter
) -> TrainResult:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig

    from pipelines.training.rendezvous import Rendezvous
    from pipelines.training.trainer import LossReports, RayTrainer, train

    execution = config.execution
    task = TrainTask(
        config=config,
        architecture=architecture,
        context=context.for_workers(),
        token_map=inputs["token_map"],
        tokenizer=inputs["tokenizer"],
        captions=inputs.get("captions"),
        reporter=reporter,
        scoring=_scoring(config, architecture, inputs, context),
    )
    # A new folder: in a used one Ray Train would resume from a record of its own.
    with tempfile.TemporaryDirectory(prefix="enat-ray-train-", ignore_cleanup_errors=True) as storage:
        trainer = RayTrainer(
            train,
            is_local=connection.is_local(),
            train_loop_config={"task": task},
            backend_config=Rendezvous(backend="nccl" if execution.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(execution.min_workers, execution.count) if execution.min_workers else execution.count,
                elastic_resize_monitor_interval_s=execution.resize_seconds,
                use_gpu=bool(execution.gpus_per_worker),
                resources_per_worker={"CPU": execution.cpus_per_worker, "GPU": execution.gpus_per_worker},
            ),
            run_config=RunConfig(
                name="train",
                storage_path=storage,
                callbacks=[LossReports(reporter)],
                failure_config=FailureConfig(max_failures=execution.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        result: TrainResult = _wait_for(trainer, reporter, context.console)
    return result


def _scoring(
    config: TrainConfig, architecture: ENATConfig, inputs: Mapping[str, Manifest], context: StageContext
) -> Scoring | None:
    from pipelines.evaluation.extractors import ReferenceSummary
    from pipelines.evaluation.training_scores import BetweenSteps, ScoringTask, start_scoring

    if config.scores is None:
        return None
    if "sliced_distance" in config.scores.metrics and not ReferenceSummary.read(inputs["reference"]).num_kept:
        raise ValueError("train.scores.metrics has sliced_distance, which needs features of single images; set reference.num_kept")
    assert config.sampler is not None and config.seed is not None
    task = ScoringTask(
        config=config.scores,
        architecture=architecture,
        sampler=config.sampler,
        seed=config.seed,
        is_bf16=config.precision == "bf16",
        context=context.for_workers(),
        tokenizer=inputs["tokenizer"],
        reference=inputs["reference"],
        captions=inputs.get("captions"),
    )
    scoring = start_scoring(task, config.execution)
    if isinstance(scoring, BetweenSteps):
        context.console.print("scores are computed between steps: the cluster has no room for them beside the training")
    return scoring


def _wait_for(trainer: RayTrainer, reporter: Reporter, console: Console) -> Any:
    """The result of rank 0. The first SIGINT or SIGTERM asks the workers to save and stop; a second one stops at once.

    Ray Train waits in a thread of its own. In the main thread it would install its own handler of SIGINT, which loses the steps
    since the last checkpoint.
    """
    answer: Future[Any] = Future()

    def fit() -> None:
        try:
            answer.set_result(trainer.fit().return_value)
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            answer.set_exception(error)

    def save_and_stop() -> None:
        console.print("saving a checkpoint, then stopping (interrupt again to stop immediately)")
        reporter.request_stop()

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    with on_interrupt(save_and_stop):
        return waiting.result_of(answer)


def _publish(manifest: Manifest, inputs: Mapping[str, Manifest], context: PublishContext) -> None:
    """Its history, as far as a tracking server that was away missed it, and its model card."""
    rows = json.loads(context.store.fetch(manifest, HISTORY).read_bytes())
    context.run.log_missing_history(rows, manifest.key)
    scores: dict[int, dict[str, float]] = {}
    if any(record.name == SCORES for record in manifest.records):
        content = context.store.fetch(manifest, SCORES).read_bytes()
        scores = _scores_by_step(content, inputs["reference"]) if "reference" in inputs else {}
        if not context.is_recorded:
            context.run.log_bytes(content, SCORES)  # for comparisons
    model_card.list_models(manifest, inputs, context, scores)
    model_card.publish(manifest, inputs, context)


def _describe(manifest: Manifest) -> str:
    summary, preset = ModelSummary.read(manifest), manifest.config.get("model", {}).get("preset")
    parameters = f"{show_size(summary.parameters).removesuffix('B').replace('k', 'K').strip()} parameters"
    how = "imported" if summary.is_imported else f"{summary.num_steps:,} steps"
    loss = manifest.metrics.get("final/loss")
    return ", ".join([*([preset] if preset else []), parameters, how, *([f"loss {loss:.4g}"] if loss is not None else [])])


STAGE = Stage(
    "train",
    2,
    run,
    reads={
        "tokenizer": Input(("tokenizer",)),
        "token_map": Input(("token_map",), lambda config, run: config.weights is None),
        "captions": Input(("captions",), lambda config, run: config.model.text),
        "reference": Input(("reference",), lambda config, run: config.scores is not None, is_in_key=False),
    },
    config=TrainConfig,
    summary=ModelSummary,
    foresee=foresee,
    kind="training",
    has_curves=True,
    files=(WEIGHTS, RAW_WEIGHTS, HISTORY, SCORES, "model-step-*.safetensors", "average-*.safetensors"),
    external=("weights",),
    workers=lambda config: config.execution if config.weights is None and config.num_steps > 0 else None,
    describe=_describe,
    publish=_publish,
)
