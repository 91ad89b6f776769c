"""Stage train: an ENAT on a token map, by Ray Train and DeepSpeed.

Result: EMA weights (`model.safetensors`), raw weights and the history of the run. Checkpoints lie in the store under the stage's
own key until the artifact is committed, so the same command continues an interrupted run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from enat.checkpoint import save_weights
from enat.model import ENATConfig
from enat.tokenizer import VQGANConfig
from pipelines import cluster
from pipelines.artifacts import FileRecord, Manifest
from pipelines.engine import is_whole
from pipelines.external import local_file
from pipelines.progress import Reporter
from pipelines.token_map import TokenMapInfo
from pipelines.train_loop import HISTORY, RAW_WEIGHTS, WEIGHTS, TrainConfig, TrainTask, initial_model, train_loop
from pipelines.weights import open_enat
from pipelines.workflow import Stage, StageContext, StageResult

_log = logging.getLogger(__name__)
_RUN_NAME = "ray-train"
_SNAPSHOT = "checkpoint_manager_snapshot.json"


def run(config: TrainConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    if config.weights is not None:
        return _imported(config, config.weights, inputs["tokenizer"], context)
    info = TokenMapInfo(**inputs["token_map"].summary["info"])
    architecture = config.model.architecture(info)
    info.require(
        "the model",
        tokenizer_digest=inputs["tokenizer"].digest,
        grid_size=architecture.grid_size,
        codebook_size=architecture.codebook_size,
    )
    started = time.monotonic()
    if config.num_steps == 0:
        files, history = _untrained(config, architecture, context), list[dict[str, float]]()
    else:
        context.connect()
        cluster.require(config.execution, "train")
        with context.bar(config.num_steps, "steps") as bar, bar.reporter() as reporter:
            result = _fit(config, architecture, inputs, context, reporter)
        files, history = result["files"], result["history"]
    record = context.write(HISTORY, lambda path: path.write_text(json.dumps(history)))
    seconds = (time.monotonic() - started) * config.execution.num_workers
    metrics = {f"final/{name}": value for name, value in (history[-1] if history else {}).items()}
    return StageResult(
        files=files,
        records=[record],
        summary=_summary(architecture, info, config.num_steps, is_imported=False),
        metrics=metrics,
        worker_seconds=seconds,
        device_seconds=seconds if config.execution.gpus_per_worker else 0.0,
    )


def _imported(config: TrainConfig, weights: str, tokenizer: Manifest, context: StageContext) -> StageResult:
    """Published weights, as if they had been trained here on codes of this tokenizer."""
    codes = VQGANConfig(**tokenizer.summary["config"])
    info = TokenMapInfo(
        dataset="imported",
        resolution=codes.resolution,
        grid_size=codes.grid_size,
        codebook_size=codes.codebook_size,
        num_classes=config.model.num_classes or ENATConfig.num_classes,
        tokenizer_digest=tokenizer.digest,
    )
    architecture = config.model.architecture(info)
    model = open_enat(local_file(weights, "train.weights", config.s3), architecture)
    return StageResult(
        files=[context.write(WEIGHTS, lambda path: save_weights(path, model))],
        records=[context.write(HISTORY, lambda path: path.write_text("[]"))],
        summary=_summary(architecture, info, num_steps=0, is_imported=True),
    )


def _summary(architecture: ENATConfig, info: TokenMapInfo, num_steps: int, is_imported: bool) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(architecture),
        "parameters": sum(tensor.numel() for tensor in initial_model(architecture, 0).parameters()),
        "tokenizer_digest": info.tokenizer_digest,
        "num_steps": num_steps,
        "dataset": info.dataset,
        "is_imported": is_imported,
    }


def _untrained(config: TrainConfig, architecture: ENATConfig, context: StageContext) -> list[FileRecord]:
    assert config.seed is not None
    model = initial_model(architecture, config.seed)
    return [context.write(name, lambda path: save_weights(path, model)) for name in (WEIGHTS, RAW_WEIGHTS)]


def _fit(
    config: TrainConfig, architecture: ENATConfig, inputs: Mapping[str, Manifest], context: StageContext, reporter: Reporter
) -> dict[str, Any]:
    execution = config.execution
    storage = context.store.work_uri(context.stage, context.key)
    if "://" in storage:
        raise ValueError(f"training keeps its checkpoints in the store, and {storage} is no folder; choose one with store=...")
    task = TrainTask(
        config=config,
        architecture=architecture,
        context=context.for_workers(),
        token_map=inputs["token_map"],
        tokenizer=inputs["tokenizer"],
        reporter=reporter,
        resume_from=_newest_checkpoint_without_snapshot(Path(storage) / _RUN_NAME),
    )
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if execution.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=execution.num_workers,
            use_gpu=bool(execution.gpus_per_worker),
            resources_per_worker={"CPU": execution.cpus_per_worker, "GPU": execution.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=_RUN_NAME,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=execution.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        result: dict[str, Any] = trainer.fit().return_value
    finally:
        signal.signal(signal.SIGINT, interrupt)  # fit() leaves its own handler behind
    return result


def _newest_checkpoint_without_snapshot(folder: Path) -> str | None:
    """Ray Train finds its checkpoints through a snapshot file that it writes in place. A driver killed in that moment leaves a
    torn one, which Ray Train refuses to start with: then the file goes, and the newest whole checkpoint is named here."""
    snapshot = folder / _SNAPSHOT
    if not snapshot.is_file():
        return None
    try:
        json.loads(snapshot.read_bytes())
    except ValueError:
        snapshot.unlink()
    else:
        return None
    whole = [path for path in sorted(folder.glob("step-*")) if is_whole(path)]
    _log.warning("the record of checkpoints was torn; training continues from %s", whole[-1].name if whole else "the start")
    return str(whole[-1]) if whole else None


STAGE = Stage("train", 1, run)
