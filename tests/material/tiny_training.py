"""Training small enough for tests: a token map of drawn codes, and ranks as plain processes on gloo.

Ranks are forked by a server that has imported torch, Ray and DeepSpeed once; a run then takes a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from enat.checkpoint import save_weights
from enat.sampler_config import SamplerConfig
from enat.text import TextFeatures
from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.captions import (
    CaptionFeatures,
    CaptionFeaturesInfo,
    CaptionsSummary,
    captions_name,
    write_captions,
    write_empty,
)
from pipelines.data.token_map import TokenMap, TokenMapInfo, TokenMapSummary, TokenRows, write_shard
from pipelines.tracking.run import RunHandle
from pipelines.training.checkpoints import find_checkpoints
from pipelines.training.config import ModelConfig, TrainConfig, TrainExecution
from pipelines.training.loop import Trainer
from pipelines.training.task import Scoring, TrainResult, TrainTask
from pipelines.workflow.stage import WorkerContext

_FORKS = multiprocessing.get_context("forkserver")
_PRELOADED = ["material.tiny_training", "deepspeed", "torch._dynamo", "torch._inductor.lowering", "ray.train.torch"]


# Ranks ---------------------------------------------------------------------------------------------------------------------


class RankLostError(Exception):
    """A rank ended without a result."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 400) -> list[Any]:
    """The results of function(*arguments) on every rank of a new process group. Raises the error of the first rank that fails."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the server imports DeepSpeed
    _FORKS.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        work = pickle.dumps((dict(os.environ), f"file://{folder}/rendezvous", world_size, function, arguments))
        ranks = []
        for rank in range(world_size):
            receiving, sending = _FORKS.Pipe(duplex=False)
            process = _FORKS.Process(target=_run_rank, args=(sending, rank, work))
            process.start()
            sending.close()
            ranks.append((process, receiving))
        try:
            answers = _answers(ranks, timeout)
            for process, _ in ranks:
                process.join(10)
            return answers
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _answers(ranks: Sequence[tuple[Any, Any]], timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    waiting = {receiving: rank for rank, (_, receiving) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout)
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} gave no answer in {timeout:g} s")
        for receiving in ready:
            rank = waiting.pop(receiving)  # type: ignore[index]
            try:
                value, error, trace = pickle.loads(receiving.recv_bytes())  # type: ignore[union-attr]
            except EOFError as lost:
                raise RankLostError(f"rank {rank}") from lost
            if error is not None:
                error.add_note(f"on rank {rank}:\n{trace}")
                raise error
            answers[rank] = value
    return [answers[rank] for rank in range(len(ranks))]


def _run_rank(sending: Any, rank: int, work: bytes) -> None:
    environment, rendezvous, world_size, function, arguments = pickle.loads(work)
    os.environ.update(environment, LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))  # as Ray Train sets them
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls functions that torch has renamed
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        answer = function(*arguments), None, ""
    except Exception as error:
        answer = None, error, traceback.format_exc()
    sending.send_bytes(pickle.dumps(answer))
    if answer[1] is None:
        with suppress(RuntimeError):  # another rank failed meanwhile
            dist.barrier()  # a rank that left early would fail the others
    os._exit(0)


# Training data -------------------------------------------------------------------------------------------------------------

GRID, CODEBOOK, CLASSES, ROWS, TEXT_TOKENS, TEXT_WIDTH = 4, 32, 2, 20, 3, 8

CONFIG = TrainConfig(
    model=ModelConfig(encoder_layers=2, decoder_layers=1, embed_dim=32, num_heads=2),
    num_steps=12,
    batch_size=16,
    num_groups=4,
    learning_rate=1e-3,
    warmup_steps=4,
    ema_decay=0.9,
    sampler=SamplerConfig(),
    seed=0,
    execution=TrainExecution(checkpoint_every=4, log_every=1, max_failures=0, peak_tflops=0.1),
)


def changed(config: TrainConfig = CONFIG, *, execution: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    """The config with some fields replaced, including fields of its execution and its model."""
    if isinstance(fields.get("model"), dict):
        fields["model"] = replace(config.model, **fields["model"])
    return replace(config, execution=replace(config.execution, **(execution or {})), **fields)


@dataclass(frozen=True)
class Material:
    """A store with the inputs of training, and their manifests by the names that the stage gives them."""

    store: ArtifactStore
    inputs: dict[str, Manifest]

    @property
    def token_map(self) -> TokenMap:
        return TokenMap.open(self.store, self.inputs["token_map"])

    @property
    def captions(self) -> CaptionFeatures:
        return CaptionFeatures.open(self.store, self.inputs["captions"])

    def architecture(self, config: TrainConfig) -> Any:
        info = TokenMapSummary.read(self.inputs["token_map"]).info
        captions = CaptionsSummary.read(self.inputs["captions"]).info if config.model.text else None
        return config.model.architecture(info, captions)


def make_material(store: ArtifactStore, vqgan: Any, folder: Path) -> Material:
    """Codes whose distribution depends on the class, two captions for every image, and a tokenizer for previews."""
    rng = np.random.default_rng(0)
    labels = [row % CLASSES for row in range(ROWS)]
    codes = np.stack([(label * 16 + rng.integers(0, 8, GRID**2)) % CODEBOOK for label in labels])
    rows = TokenRows(
        codes=codes,
        codes_flipped=codes.reshape(-1, GRID, GRID)[:, :, ::-1].reshape(-1, GRID**2).copy(),
        keys=[f"{row:03d}" for row in range(ROWS)],
        labels=labels,
        source_sha256=[bytes([row]) * 32 for row in range(ROWS)],
        captions=[(f"image {row}", f"picture {row}") for row in range(ROWS)],
        first_captions=[2 * row for row in range(ROWS)],
    )

    def commit(stage: str, summary: dict[str, Any], **writers: Callable[[Path], object]) -> Manifest:
        files = []
        for name, write in writers.items():
            path = folder / name
            write(path)
            files.append(store.put_file(stage, stage * 4, name, path))
        fields = {"stage_version": 1, "config": {}, "inputs": {}, "summary": summary}
        return store.commit(Manifest(stage=stage, key=stage * 4, files=tuple(files), **fields))

    tokenizer = commit(
        "tokenizer",
        summary_of("tokenizer", config=vqgan.config),
        **{"vqgan.safetensors": lambda path: save_weights(path, vqgan)},
    )
    info = TokenMapInfo(
        dataset="drawn",
        resolution=16,
        grid_size=GRID,
        codebook_size=CODEBOOK,
        num_classes=CLASSES,
        tokenizer_digest=tokenizer.digest,
        num_captions=2 * ROWS,
    )
    token_map = commit(
        "token_map",
        summary_of("token_map", info=info, rows=ROWS),
        **{"part-00000.parquet": lambda path: write_shard(path, info, rows)},
    )
    text = CaptionFeaturesInfo(
        num_captions=2 * ROWS, captions_per_file=2 * ROWS, num_positions=TEXT_TOKENS, width=TEXT_WIDTH, encoder_digest="0" * 64
    )

    def features(count: int) -> TextFeatures:
        hidden, pooled = rng.normal(size=(count, TEXT_TOKENS, TEXT_WIDTH)), rng.normal(size=(count, TEXT_WIDTH))
        values = [torch.from_numpy(array).half() for array in (hidden, pooled)]
        return TextFeatures(*values, torch.full((count,), TEXT_TOKENS))

    captions = commit(
        "captions",
        summary_of("captions", info=text),
        **{
            captions_name(0): lambda path: write_captions(path, text, 0, features(2 * ROWS)),
            "empty.safetensors": lambda path: write_empty(path, text, features(1)),
        },
    )
    return Material(store, {"tokenizer": tokenizer, "token_map": token_map, "captions": captions})


@pytest.fixture(scope="session")
def material(vqgan: Any, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(open_store(str(tmp_path_factory.mktemp("store"))), vqgan, tmp_path_factory.mktemp("material"))


# Training on ranks ---------------------------------------------------------------------------------------------------------


@dataclass
class ScriptedReporter:
    """Takes the roles of the driver and of Ray's watcher of nodes. Every rank polls it once a step, in the training thread.

    stop_at, preempt_at: the step after which training is asked to stop, or this rank's node announces its end.
    """

    stop_at: int | None = None
    preempt_at: int | None = None
    messages: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    num_asked: int = 0

    def report(self, done: int, note: str = "") -> None:
        pass

    def tell(self, message: str) -> None:
        self.messages.append(message)

    def log(self, message: str) -> None:
        self.logged.append(message)

    def take_losses(self) -> tuple[int, list[str]]:
        return 0, []

    def is_stop_requested(self) -> bool:
        self.num_asked += 1
        return self.stop_at is not None and self.num_asked >= self.stop_at

    @property
    def preemption_info(self) -> str | None:
        return "the node goes" if self.preempt_at is not None and self.num_asked >= self.preempt_at else None


@dataclass(frozen=True)
class Trained:
    """The result of training: EMA weights, raw weights, the history of the run, and messages."""

    ema: dict[str, torch.Tensor]
    raw: dict[str, torch.Tensor]
    history: list[dict[str, float]]
    result: TrainResult | None = None
    messages: tuple[str, ...] = ()

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.history]


def train_rank(trainer_class: type[Trainer], task: TrainTask, reporters: Sequence[ScriptedReporter]) -> Any:
    """Train as train_loop does, with a reporter in the role of Ray for every rank."""
    import ray.train.v2._internal.execution.context as ray_context

    reporter = reporters[dist.get_rank()]
    ray_context.get_train_context = lambda: SimpleNamespace(preemption_context=reporter)
    with closing(trainer_class(replace(task, reporter=reporter), torch.device("cpu"))) as trainer:  # type: ignore[arg-type]
        return trainer.run(), reporter.messages


def train(
    material: Material,
    config: TrainConfig,
    key: str,
    *,
    world_size: int = 1,
    trainer_class: type[Trainer] = Trainer,
    run: RunHandle | None = None,
    scoring: Scoring | None = None,
    **script: Any,
) -> Trained:
    """Train on processes of this machine, under a key of the store. script: of every rank, see ScriptedReporter."""
    task = TrainTask(
        config=config,
        architecture=material.architecture(config),
        context=WorkerContext(stage="train", key=key, store=material.store, run=run or RunHandle("", None)),
        token_map=material.inputs["token_map"],
        tokenizer=material.inputs["tokenizer"],
        captions=material.inputs["captions"] if config.model.text else None,
        reporter=None,  # type: ignore[arg-type]
        scoring=scoring,
    )
    reporters = [ScriptedReporter(**script) for _ in range(world_size)]
    result, messages = run_ranks(world_size, train_rank, trainer_class, task, reporters)[0]
    weights = [load_file(material.store.fetch_file("train", key, record)) for record in result.files] or [{}, {}]
    return Trained(*weights, result.history, result, tuple(messages))


# Results -------------------------------------------------------------------------------------------------------------------


def assert_close(trained: Trained, plain: Trained, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """The same steps, losses to a relative rtol, raw and EMA weights to atol."""
    assert trained.column("step") == plain.column("step")
    np.testing.assert_allclose(trained.column("loss"), plain.column("loss"), rtol=rtol)
    for mine, theirs in ((trained.raw, plain.raw), (trained.ema, plain.ema)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].dtype == torch.float32
            torch.testing.assert_close(mine[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def read_history(store: ArtifactStore, key: str, record: Any) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads(store.fetch_file("train", key, record).read_text())
    return history


def worker_context(material: Material, key: str) -> WorkerContext:
    return WorkerContext(stage="train", key=key, store=material.store, run=RunHandle("", None))


def checkpoint_steps(material: Material, key: str) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(worker_context(material, key)) if checkpoint.is_whole]


def read_weights(material: Material, key: str, record: Any) -> dict[str, torch.Tensor]:
    return load_file(material.store.fetch_file("train", key, record))


def damage_newest_checkpoint(store: ArtifactStore, context: WorkerContext) -> str:
    """Flip a bit of its last file of tensors, and return the path of the file."""
    record = find_checkpoints(context)[-1].tensors[-1]
    path = Path(store.uri) / context.stage / context.key / record.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return record.path


def assert_same_bits(mine: Trained, other: Trained) -> None:
    for ours, theirs in ((mine.raw, other.raw), (mine.ema, other.ema)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert mine.column("step") == other.column("step") and mine.column("loss") == other.column("loss")
