"""Checkpoints of a training run: written without stopping it, read by any number of workers.

Every rank puts one file of tensors into the store and then a record of it; a checkpoint is there once the records of all ranks
of one attempt are. Records hold sizes and sha256 of files, so a damaged checkpoint is noticed and the one before it is taken.
An attempt is one life of a group of workers: files of two lives, which need not agree in every bit, never mix.
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
from pipelines.storage.base import StoreError
from pipelines.workflow.stage import WorkerContext

_RECORD = re.compile(r"checkpoint-(\d{8,})-(\w+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint by rank, and the state, which is a file of rank 0."""

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
    """All of a run, oldest first, also those that some ranks have not written."""
    found: dict[tuple[int, str, int], dict[int, tuple[str, dict[str, Any]]]] = {}
    for name, record in context.store.read_parts(context.stage, context.key).items():
        if match := _RECORD.fullmatch(name):
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
    """A checkpoint whose files are here, each as its sha256 says."""

    state: Mapping[str, Any]
    files: tuple[Path, ...]

    def tensors(self) -> Fragments:
        return Fragments(self.files)


def open_checkpoint(store: ArtifactStore, context: WorkerContext, checkpoint: Checkpoint) -> OpenedCheckpoint:
    """Raises DamagedFileError where a file is gone or damaged, another StoreError where it cannot be looked at."""
    assert checkpoint.state is not None
    paths = [store.fetch_file(context.stage, context.key, record) for record in checkpoint.tensors]
    state = store.fetch_file(context.stage, context.key, checkpoint.state)
    return OpenedCheckpoint(json.loads(state.read_bytes()), tuple(paths))


@dataclass(frozen=True)
class SoFar:
    """What a run that goes on has behind it. worker_seconds: summed over workers, up to the checkpoint of `step`."""

    step: int = 0
    worker_seconds: float = 0.0


def read_so_far(context: WorkerContext) -> SoFar:
    """By the newest whole checkpoint whose state can be read; those that cannot are told of where training goes on from them."""
    for checkpoint in reversed([found for found in find_checkpoints(context) if found.is_whole]):
        assert checkpoint.state is not None
        try:
            state = json.loads(context.store.fetch_file(context.stage, context.key, checkpoint.state).read_bytes())
        except DamagedFileError:
            continue
        return SoFar(state["step"], worker_seconds_of(state))
    return SoFar()


def worker_seconds_of(state: Mapping[str, Any]) -> float:
    seconds: float = state.get("worker_seconds", 0.0)  # without them: of a checkpoint from before there was this
    return seconds


def is_milestone(step: int, keep_every: int | None) -> bool:
    """Whether a checkpoint of this step stays until the end."""
    return keep_every is not None and step % keep_every == 0


class NoReadableCheckpointError(StoreError):
    """There are whole checkpoints, and not one of them is as it was written."""


def newest_checkpoint(context: WorkerContext, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole one whose every byte is right. Newer ones, which are not, are told of and removed: they would be in the way
    of those that are written from here on.

    Where none is as it was written this raises NoReadableCheckpointError and removes nothing. Weeks of training may lie in them, a
    bucket may have earlier versions of the files, and whether to begin anew is for people to say. Whatever else keeps a file from
    being read (no room in the cache, no network) is raised as it is, since the checkpoint may be as good as ever.
    """
    damaged: list[tuple[Checkpoint, DamagedFileError]] = []
    for checkpoint in reversed([found for found in find_checkpoints(context) if found.is_whole]):
        try:
            open_checkpoint(context.store, context, checkpoint)
        except DamagedFileError as error:
            damaged.append((checkpoint, error))
            continue
        for other, damage in damaged:
            tell(f"the checkpoint of step {other.step} is damaged and removed, the one before it is taken ({damage.what})")
            discard(context, other)
        return checkpoint
    if damaged:
        newest, damage = damaged[0]
        steps = ", ".join(str(checkpoint.step) for checkpoint, _ in damaged)
        raise NoReadableCheckpointError(
            f"no checkpoint can be read (steps {steps}; that of step {newest.step}: {damage.what}); bring the files back, or "
            f"remove {context.store.place(context.stage, context.key)}/{PARTS} to train from the start"
        )
    return None


def discard(context: WorkerContext, checkpoint: Checkpoint) -> None:
    """Records first: what is half removed is no checkpoint."""
    for part in checkpoint.parts:
        context.store.discard_part(context.stage, context.key, part)
    context.store.discard_files(context.stage, context.key, checkpoint.files)


def milestone_weights(
    context: WorkerContext, model: ENAT, keep_every: int | None, tell: Callable[[str], None]
) -> Iterator[FileRecord]:
    """EMA weights from the checkpoints that were kept for good, as files of their own. model: of the same sizes, left as it is."""
    kept = {found.step: found for found in find_checkpoints(context) if found.is_whole and is_milestone(found.step, keep_every)}
    for step, checkpoint in sorted(kept.items()):
        try:
            fragments = open_checkpoint(context.store, context, checkpoint).tensors()
        except DamagedFileError as error:
            tell(f"the weights of step {step} are not kept: {error.what}")
            continue
        earlier = ENAT(model.config)
        earlier.load_state_dict(model.state_dict())  # for what is no parameter
        fragments.fill("ema", earlier)
        yield context.write(f"model-step-{step:08d}.safetensors", partial(save_weights, module=earlier))


class CheckpointWriter:
    """A rank's way of writing checkpoints: memory is copied at once, everything else is done by a thread.

    keep_last, keep_every: whole checkpoints that stay; rank 0 removes the others.
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
        """Begin writing. tensors: of this rank, copied here.   state: of all ranks, JSON; that of rank 0 is kept.

        Waits for the checkpoint before, so that memory holds one copy at most. Raises what writing that one failed with.
        """
        self.wait()
        started = time.perf_counter()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        text = json.dumps(state) if self._rank == 0 else None
        self._writing = self._thread.submit(self._write, step, copies, text)
        self.seconds_waited += time.perf_counter() - started

    def wait(self) -> None:
        """Until what was begun is in the store."""
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
        """step: the last one begun. What others have left above it is neither counted, since it may be damaged, nor removed, since
        it may be all there is."""
        found = [checkpoint for checkpoint in find_checkpoints(self._context) if checkpoint.step <= step]
        # A step that is reached again, after a rollback or a restart, replaces what an earlier attempt left, which may be damaged.
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
    """kind: "weight", "ema" or a moment.   start: place of the fragment's first value in the flattened parameter."""
    return f"{kind}/{parameter}@{start}"


class Fragments:
    """Parameters and what belongs to them, in pieces that lie in the files of any number of ranks. Read where they are needed."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._places: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for path in files:
            file = safe_open(str(path), framework="pt")  # mapped: closed with the last slice of it
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                parameter, _, start = rest.rpartition("@")
                piece = file.get_slice(key)
                self._places.setdefault((kind, parameter), []).append((int(start), piece.get_shape()[0], piece))

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._places}

    def read(self, kind: str, parameter: str, start: int, length: int) -> Tensor:
        """float32 (length,): values start..start+length-1 of the flattened parameter. Raises KeyError where some are missing."""
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
        """Put whole values into a module's parameters."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.read(kind, name, 0, parameter.numel()).view_as(parameter))


def owners(module: torch.nn.Module, world_size: int) -> dict[str, int]:
    """Which rank writes a parameter that all ranks have: consecutive ones, about as many values for every rank."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    total, start, found = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        found[name] = (2 * start + size) * world_size // (2 * total)  # where its middle lies
        start += size
    return found


def own_share(kind: str, module: torch.nn.Module, rank: int, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """What one rank writes of values that all ranks have: its parameters, whole."""
    owner = owners(module, world_size)
    for name, parameter in module.named_parameters():
        if owner[name] == rank:
            yield fragment_name(kind, name, 0), parameter.detach().view(-1)
