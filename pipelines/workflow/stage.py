"""A stage, a node of a graph of stages, and what a stage may touch while it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.tracking.run import RunHandle, TrackingConfig
from pipelines.workflow.costs import Prices
from pipelines.workflow.progress import Bar

MAIN = "main"  # what a run's own model is called beside its variants


@dataclass(frozen=True)
class Stage:
    """version: raised whenever the code of a stage changes what it makes; it is part of every key.

    accept: says whether an artifact that is there will do for a config, where that has limits which are no part of the key.
    Raises ValueError where it will not.
    publish: makes an artifact known to others, given its inputs. Called whether it was made or reused, since those others may be
    new; so it must do no harm when done again. It observes: what it raises is one warning.
    """

    name: str
    version: int
    run: Callable[[Any, Mapping[str, Manifest], StageContext], StageResult]
    accept: Callable[[Any, Manifest], None] | None = None
    publish: Callable[[Manifest, Mapping[str, Manifest], PublishContext], None] | None = None


@dataclass(frozen=True)
class Node:
    """A stage as part of a pipeline. inputs: the stage's name for an input -> id of the node that makes it.

    identity: of the config, by whoever has it already: that of a dataset takes a listing of all its files.
    """

    id: str
    stage: Stage
    config: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    identity: Any = None


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage made: files that are the artifact, and records that tell how it went.

    worker_seconds: summed over workers.   device_seconds: those of accelerators.
    """

    files: Sequence[FileRecord]
    records: Sequence[FileRecord] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    worker_seconds: float = 0.0
    device_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What any worker of a stage may touch: the store under the stage's own key, and its tracking run."""

    stage: str
    key: str
    store: ArtifactStore
    run: RunHandle

    def write(self, name: str, write: Callable[[Path], object]) -> FileRecord:
        """Store what `write` puts at the path it is given."""
        with tempfile.TemporaryDirectory(prefix=f"enat-{self.stage}-") as folder:
            path = Path(folder) / name
            write(path)
            return self.store.put_file(self.stage, self.key, name, path)


@dataclass(frozen=True, kw_only=True)
class StageContext(WorkerContext):
    """The driver's: also the terminal, and the way to Ray, which a stage that needs it connects to first."""

    console: Console
    connect: Callable[[], None]

    def bar(self, total: int, unit: str) -> Bar:
        return Bar(self.console, self.stage, total, unit)

    def for_workers(self) -> WorkerContext:
        return WorkerContext(stage=self.stage, key=self.key, store=self.store, run=self.run)


@dataclass(frozen=True, kw_only=True)
class PublishContext:
    """Where an artifact lies, and the tracking run of its stage. node: its id in the pipeline, such as evaluate@variant."""

    store: ArtifactStore
    run: RunHandle
    tracking: TrackingConfig
    node: str
    prices: Prices | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all stages of one pipeline run share. connect: to Ray, once a stage needs it.   prices: for costs in money."""

    store: ArtifactStore
    run: RunHandle
    tracking: TrackingConfig
    console: Console
    connect: Callable[[], None]
    prices: Prices | None = None


@dataclass(frozen=True)
class Planned:
    """One line of a plan. key: None while an input does not exist yet, since keys hold the digests of inputs."""

    node: Node
    key: str | None
    manifest: Manifest | None
    parts_done: int = 0

    @property
    def is_reused(self) -> bool:
        return self.manifest is not None


@dataclass(frozen=True)
class Done:
    """One line of a closing summary. seconds: waited for here; a reused artifact's own cost is in its manifest."""

    node: Node
    manifest: Manifest
    is_reused: bool
    seconds: float


class StageError(RuntimeError):
    """A stage broke down. What it had committed stays, and the same command continues from it."""
