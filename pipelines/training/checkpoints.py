"""Checkpoints of a training run: written without interrupting training, read by any number of workers.

Every rank puts one file of tensors into the store and then a record of it. A checkpoint is complete when the records of all ranks
of one attempt exist. Records contain the size and sha256 of each file, so a damaged checkpoint is detected and the previous one is
used. An attempt is one start of the worker group. Files of different attempts, which may differ in rounding, are never mixed.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from enat.checkpoint import save_weights
from enat.model import ENAT
from pipelines.artifacts.manifest import PARTS, WORK, DamagedFileError, FileRecord
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError
from pipelines.training.config import TrainExecution
from pipelines.workflow.models import average_name, milestone_name
from pipelines.workflow.stage import WorkerContext

_RECORD = re.compile(r"checkpoint-(\d{8,})-(\w+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint: tensors of every rank, and the state, written by rank 0."""

    step: int
    attempt: str
    world_size: int
    parts: tuple[str, ...]
    tensors: tuple[FileRecord, ...]
    state: FileRecord | None

    @property
    def is_whole(self) -> bool:
        return len(self.tensors) == self.world_size and self.state is not None

    @property
    def files(self) -> list[FileRecord]:
        return [*self.tensors, *([self.state] if self.state else [])]


def find_checkpoints(context: WorkerContext) -> list[Checkpoint]:
    """All checkpoints of a run, oldest first, including incomplete ones."""
    found: dict[tuple[int, str, int], dict[int, tuple[str, dict[str, Any]]]] = {}
    for name, record in context.store.read_parts(context.stage, context.key).items():
        if (match := _RECORD.fullmatch(name)) and "tensors" in record:
            step, attempt, rank, world_size = int(match[1]), match[2], int(match[3]), int(match[4])
            found.setdefault((step, attempt, world_size), {})[rank] = (name, record)
    checkpoints = []
    for (step, attempt, world_size), ranks in sorted(found.items()):
        records = [record for _, (_, record) in sorted(ranks.items())]
        state = next((FileRecord(**record["state"]) for record in records if record.get("state")), None)
        tensors = tuple(FileRecord(**record["tensors"]) for record in records)
        parts = tuple(name for name, _ in ranks.values())
        checkpoints.append(Checkpoint(step, attempt, world_size, parts, tensors, state))
    return checkpoints


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose files were verified by their sha256."""

    state: Mapping[str, Any]
    tensors: Fragments


def open_checkpoint(store: ArtifactStore, context: WorkerContext, checkpoint: Checkpoint) -> OpenedCheckpoint:
    """Fetch and verify all files. Raises DamagedFileError if a file is missing or damaged, StorageError if it cannot be read."""
    assert checkpoint.state is not None
    paths = [store.fetch_file(context.stage, context.key, record) for record in checkpoint.tensors]
    state = store.fetch_file(context.stage, context.key, checkpoint.state)
    return OpenedCheckpoint(json.loads(state.read_bytes()), Fragments(tuple(paths)))


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted run resumes. worker_seconds: time up to the checkpoint of `step`, summed over workers.

    ema_lengths: of the averages in it.
    """

    step: int = 0
    worker_seconds: float = 0.0
    ema_lengths: tuple[float, ...] = ()


def read_resume_point(context: WorkerContext) -> ResumePoint:
    """Read it from the newest complete checkpoint with a readable state. The workers report damaged ones when they resume."""
    for checkpoint in reversed([found for found in find_checkpoints(context) if found.is_whole]):
        assert checkpoint.state is not None
        try:
            state = json.loads(context.store.fetch_file(context.stage, context.key, checkpoint.state).read_bytes())
        except DamagedFileError:
            continue
        # Checkpoints of older versions have no times and no lengths.
        return ResumePoint(state["step"], state.get("worker_seconds", 0.0), tuple(state.get("ema_lengths", ())))
    return ResumePoint()


def is_milestone(step: int, keep_every: int | None) -> bool:
    """Whether the checkpoint of this step is kept until the end of training."""
    return keep_every is not None and step % keep_every == 0


class NoReadableCheckpointError(StorageError):
    """All complete checkpoints are damaged."""


def newest_checkpoint(context: WorkerContext, tell: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest complete checkpoint without damage, and report and remove newer damaged ones.

    If all are damaged, raises NoReadableCheckpointError and removes nothing: they may represent weeks of training, and a bucket may
    have earlier versions of the files, so people decide whether to train from the start. Errors that say nothing about the files
    (a full cache, no network) are raised unchanged.
    """
    damaged: list[tuple[Checkpoint, DamagedFileError]] = []
    for checkpoint in reversed([found for found in find_checkpoints(context) if found.is_whole]):
        try:
            open_checkpoint(context.store, context, checkpoint)
        except DamagedFileError as error:
            damaged.append((checkpoint, error))
            continue
        for other, damage in damaged:
            tell(
                f"removed the damaged checkpoint of step {other.step}; training resumes from step {checkpoint.step} ({damage.what})"
            )
            discard(context, other)
        return checkpoint
    if damaged:
        newest, damage = damaged[0]
        steps = ", ".join(str(checkpoint.step) for checkpoint, _ in damaged)
        raise NoReadableCheckpointError(
            f"all checkpoints are damaged (steps {steps}; step {newest.step}: {damage.what}). Restore the files, or "
            f"remove {context.store.place(context.stage, context.key)}/{PARTS} to train from the start"
        )
    return None


def discard(context: WorkerContext, checkpoint: Checkpoint) -> None:
    """Remove the records first, so that an interrupted removal leaves an incomplete checkpoint."""
    for part in checkpoint.parts:
        context.store.discard_part(context.stage, context.key, part)
    context.store.discard_files(context.stage, context.key, checkpoint.files)


def average_kind(length: float) -> str:
    """The kind of the fragments of an average of a relative length."""
    return f"ema-{length:g}"


def milestone_weights(
    context: WorkerContext, model: ENAT, config: TrainExecution, tell: Callable[[str], None]
) -> Iterator[FileRecord]:
    """Write the EMA weights of each kept checkpoint to a file, and the averages of other lengths.

    `model`: of the same architecture; it is not changed.
    """
    keep_every = config.keep_every
    kept = {found.step: found for found in find_checkpoints(context) if found.is_whole and is_milestone(found.step, keep_every)}
    for step, checkpoint in sorted(kept.items()):
        try:
            fragments = open_checkpoint(context.store, context, checkpoint).tensors
        except DamagedFileError as error:
            tell(f"the weights of step {step} are not kept: {error.what}")
            continue
        earlier = ENAT(model.config)
        earlier.load_state_dict(model.state_dict())  # copies the buffers, too
        kinds = {"ema": milestone_name(step)}
        kinds |= {average_kind(length): average_name(length, step) for length in config.ema_lengths}
        for kind, name in kinds.items():
            fragments.fill(kind, earlier)
            yield context.write(name, partial(save_weights, module=earlier))


class CheckpointWriter:
    """Writes the checkpoints of one rank: copies tensors immediately and writes them in a thread.

    keep_last, keep_every: complete checkpoints that are kept; rank 0 removes the others.
    """

    def __init__(
        self, context: WorkerContext, *, rank: int, world_size: int, attempt: str, keep_last: int, keep_every: int | None
    ) -> None:
        self._context, self._attempt = context, attempt
        self._rank, self._world_size = rank, world_size
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.seconds_waited = 0.0

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint. `tensors`: of this rank, copied here.   `state`: as JSON; rank 0 writes its own.

        Waits for the previous checkpoint, so memory holds at most one copy, and raises its error if it failed.
        """
        self.wait()
        started = time.perf_counter()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        text = json.dumps(state) if self._rank == 0 else None
        self._writing = self._thread.submit(self._write, step, copies, text)
        self.seconds_waited += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is in the store."""
        started = time.perf_counter()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
        self.seconds_waited += time.perf_counter() - started

    def _write(self, step: int, tensors: dict[str, Tensor], state: str | None) -> None:
        folder = f"{WORK}/step-{step:08d}-{self._attempt}"
        record: dict[str, Any] = {}
        record["tensors"] = self._put(f"{folder}/rank-{self._rank:05d}.safetensors", lambda path: save_file(tensors, path))
        if state is not None:
            record["state"] = self._put(f"{folder}/state.json", lambda path: path.write_text(state))
        name = f"checkpoint-{step:08d}-{self._attempt}-{self._rank:05d}-of-{self._world_size:05d}"
        self._context.store.put_part(self._context.stage, self._context.key, name, record)
        if self._rank == 0:
            self._discard_old(step)

    def _put(self, name: str, write: Callable[[Path], object]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="enat-checkpoint-") as folder:
            path = Path(folder) / Path(name).name
            write(path)
            return asdict(self._context.store.put_file(self._context.stage, self._context.key, name, path))

    def _discard_old(self, step: int) -> None:
        """Remove old checkpoints up to `step`, the last one written.

        Later steps, left by other attempts, are not counted because they may be damaged, and not removed because they may be the
        only ones.
        """
        found = [checkpoint for checkpoint in find_checkpoints(self._context) if checkpoint.step <= step]
        # After a rollback or restart, this attempt's checkpoint of a step replaces an earlier attempt's, which may be damaged.
        found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.attempt == self._attempt))
        by_step = {checkpoint.step: checkpoint for checkpoint in found if checkpoint.is_whole}
        whole = list(by_step.values())
        kept = whole[-self._keep_last :]
        for checkpoint in found:
            is_milestone_kept = checkpoint in whole and is_milestone(checkpoint.step, self._keep_every)
            is_newer = bool(kept) and checkpoint.step >= kept[-1].step and by_step.get(checkpoint.step) in (checkpoint, None)
            if checkpoint in kept or is_milestone_kept or is_newer or not kept:
                continue
            discard(self._context, checkpoint)


# Fragments -----------------------------------------------------------------------------------------------------------------


def fragment_name(kind: str, parameter: str, start: int) -> str:
    """kind: "weight", "ema", that of another average, or a moment.

    start: index of the fragment's first value in the flattened parameter.
    """
    return f"{kind}/{parameter}@{start}"


class Fragments:
    """Parameters, EMA and moments, stored as fragments in the files of any number of ranks. Values are read on demand."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._places: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for path in files:
            file = safe_open(str(path), framework="pt")  # memory-mapped until its last slice is gone
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                kind, _, rest = key.partition("/")
                parameter, _, start = rest.rpartition("@")
                piece = file.get_slice(key)
                self._places.setdefault((kind, parameter), []).append((int(start), piece.get_shape()[0], piece))

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._places}

    def read(self, kind: str, parameter: str, start: int, length: int) -> Tensor:
        """Values start..start+length-1 of the flattened parameter, float32 (length,). Raises KeyError if some are missing."""
        piece, num_found = torch.empty(length), 0
        for first, count, stored in self._places[kind, parameter]:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                piece[low - start : high - start] = stored[low - first : high - first]
                num_found += high - low
        if num_found != length:
            raise KeyError(f"{kind} of {parameter} has {num_found} of {length} values from {start} on")
        return piece

    def fill(self, kind: str, module: torch.nn.Module) -> None:
        """Set a module's parameters to the stored values."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.read(kind, name, 0, parameter.numel()).view_as(parameter))


def owners(module: torch.nn.Module, world_size: int) -> dict[str, int]:
    """The rank that writes each parameter of a replicated module: consecutive parameters, about equally many values per rank."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    total, start, found = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        found[name] = (2 * start + size) * world_size // (2 * total)  # by the middle of the parameter
        start += size
    return found


def own_share(kind: str, module: torch.nn.Module, rank: int, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a replicated module that one rank writes."""
    owner = owners(module, world_size)
    for name, parameter in module.named_parameters():
        if owner[name] == rank:
            yield fragment_name(kind, name, 0), parameter.detach().view(-1)
