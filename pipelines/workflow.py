"""Stages, their keys, the plan, and running it.

A stage is a function `(config, inputs, context) -> StageResult`; a node is a stage with its config and the nodes it reads from.
The driver walks the nodes in order and asks the store for each key: what is there is reused, what is not is computed and
committed. Ray does the distribution inside a stage; nothing here schedules anything.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError
from rich.console import Console

from pipelines import code_package, tracking
from pipelines import config as configuration
from pipelines.artifacts import ArtifactStore, FileRecord, Manifest, digest_of
from pipelines.costs import Prices
from pipelines.inventory import inputs_of, name_of
from pipelines.progress import Bar
from pipelines.uses import Uses

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How a stage is spread over a cluster. Never part of a key: it must not change what comes out."""

    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"execution.num_workers is {self.num_workers}; at least 1 is needed")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ValueError("execution.cpus_per_worker must be above 0 and gpus_per_worker at least 0")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def num_threads(self) -> int:
        """For torch, which would otherwise take every core of the machine in every worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def resources(self) -> dict[str, float]:
        """For ray.remote and Ray Data."""
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}

    def device_seconds(self, worker_seconds: float) -> float:
        """Seconds of accelerators that workers held for so long: a worker may hold several, or share one."""
        return worker_seconds * self.gpus_per_worker


@dataclass(frozen=True, kw_only=True)
class Execution(Workers):
    """batch_size: images that one worker computes at once."""

    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"execution.batch_size is {self.batch_size}; it must be at least 1")


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
    run: tracking.RunHandle

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
    run: tracking.RunHandle
    tracking: tracking.TrackingConfig
    node: str
    prices: Prices | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all stages of one pipeline run share. connect: to Ray, once a stage needs it.   prices: for costs in money."""

    store: ArtifactStore
    run: tracking.RunHandle
    tracking: tracking.TrackingConfig
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


def stage_key(node: Node, inputs: Mapping[str, Manifest]) -> str:
    return digest_of(
        {
            "stage": node.stage.name,
            "version": node.stage.version,
            "config": node.identity if node.identity is not None else configuration.identity(node.config),
            "inputs": {name: manifest.digest for name, manifest in inputs.items()},
        }
    )


def plan(nodes: Sequence[Node], store: ArtifactStore, given: Mapping[str, Manifest] | None = None) -> list[Planned]:
    """What a run would reuse and compute. Nodes must come after those they read from.

    given: artifacts that nodes may read by these ids without a node that makes them.
    """
    found: dict[str, Manifest | None] = dict(given or {})
    planned = []
    for node in nodes:
        inputs = {name: found[id] for name, id in node.inputs.items()}
        known = {name: manifest for name, manifest in inputs.items() if manifest is not None}
        if len(known) < len(inputs):
            found[node.id] = None
            planned.append(Planned(node, None, None))
            continue
        key = stage_key(node, known)
        manifest = found[node.id] = store.read_manifest(node.stage.name, key)
        planned.append(Planned(node, key, manifest, 0 if manifest else len(store.read_parts(node.stage.name, key))))
    return planned


def execute(nodes: Sequence[Node], session: Session, given: Mapping[str, Manifest] | None = None) -> list[Done]:
    """Walk the nodes: reuse what the store has, compute the rest. given: as of plan.

    Raises ValueError for bad input, StageError otherwise.
    """
    found: dict[str, Manifest] = dict(given or {})
    done = []
    with Uses(session.store) as uses:
        for manifest in found.values():
            uses.note(*name_of(manifest), inputs_of(manifest))
        for node in nodes:
            inputs = {name: found[id] for name, id in node.inputs.items()}
            key = stage_key(node, inputs)
            started = time.monotonic()
            with _stage_run(node, key, inputs, session) as run:
                # With all that the run has: what a later stage needs must not go while this one is at work.
                uses.note(node.stage.name, key, map(name_of, found.values()))
                made = session.store.read_manifest(node.stage.name, key)
                is_reused = made is not None
                if made is None:
                    made = _compute(node, key, inputs, run, session)
                elif node.stage.accept is not None:
                    node.stage.accept(node.config, made)
                seconds = time.monotonic() - started
                _publish(node, made, inputs, run, session)
                _finish_stage_run(run, made, is_reused)
            found[node.id] = made
            done.append(Done(node, made, is_reused, seconds))
            verb = "reused" if is_reused else f"made in {seconds:.1f} s"
            session.console.print(f"[green]✓[/] {node.id:<22} {key[:12]}  [dim]{verb}[/]", highlight=False)
    return done


def _compute(node: Node, key: str, inputs: Mapping[str, Manifest], run: tracking.RunHandle, session: Session) -> Manifest:
    store = session.store
    started = time.monotonic()
    try:
        context = StageContext(
            stage=node.stage.name, key=key, store=store, run=run, console=session.console, connect=session.connect
        )
        result = node.stage.run(node.config, inputs, context)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):  # bad input that a worker found: its own sentence, without the worker's traceback
            raise ValueError(str(error.cause)) from error
        _log.exception("stage %s failed", node.id)
        raise StageError(f"stage {node.id} failed: {_root_cause(error)}") from error
    except ValueError:
        raise
    except Exception as error:
        _log.exception("stage %s failed", node.id)
        raise StageError(f"stage {node.id} failed: {_root_cause(error)}") from error
    manifest = Manifest(
        stage=node.stage.name,
        key=key,
        stage_version=node.stage.version,
        config=configuration.redacted(node.config),
        inputs={name: {"stage": m.stage, "key": m.key, "digest": m.digest} for name, m in inputs.items()},
        files=tuple(result.files),
        records=tuple(result.records),
        summary=dict(result.summary),
        metrics={name: float(value) for name, value in result.metrics.items()},
        provenance={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": code_version(),
            "host_cpus": os.cpu_count(),
            "seconds": time.monotonic() - started,
            "worker_seconds": result.worker_seconds,
            "device_seconds": result.device_seconds,
        },
    )
    committed = store.commit(manifest)
    store.discard_work(node.stage.name, key)
    return committed


def _publish(node: Node, manifest: Manifest, inputs: Mapping[str, Manifest], run: tracking.RunHandle, session: Session) -> None:
    if node.stage.publish is None:
        return
    try:
        context = PublishContext(store=session.store, run=run, tracking=session.tracking, node=node.id, prices=session.prices)
        node.stage.publish(manifest, inputs, context)
    except Exception as error:  # noqa: BLE001 (the artifact is there, and that is what the run is for)
        _log.warning("%s is made, but not published (%s)", node.id, _root_cause(error))
        _log.info("publishing %s failed", node.id, exc_info=True)


@contextmanager
def _stage_run(node: Node, key: str, inputs: Mapping[str, Manifest], session: Session) -> Iterator[tracking.RunHandle]:
    """The tracking run of a stage, which ends whatever happens to it."""
    tags = {"enat.stage": node.stage.name, "enat.node": node.id, "enat.key": key}
    tags |= {f"enat.input.{name}": f"{manifest.stage}/{manifest.key}" for name, manifest in inputs.items()}
    with tracking.ending(tracking.start_run(session.run.uri, session.tracking, node.id, tags, session.run)) as run:
        run.log_params(configuration.redacted(node.config))
        yield run


def _finish_stage_run(run: tracking.RunHandle, manifest: Manifest, is_reused: bool) -> None:
    run.set_tags(
        {"enat.digest": manifest.digest, "enat.reused": str(is_reused).lower(), "enat.code": str(manifest.provenance["code"])}
    )
    seconds = {name: manifest.provenance[name] for name in ("seconds", "worker_seconds", "device_seconds")}
    run.log_metrics({**manifest.metrics, **{f"cost/{name}": value for name, value in seconds.items()}})
    run.finish()


def _root_cause(error: BaseException) -> str:
    """The innermost message: Ray wraps what a worker raised in its own errors."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        failures = getattr(error, "worker_failures", None)
        if isinstance(failures, dict) and failures:
            inner = next(iter(failures.values()))
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}" if not isinstance(error, ValueError) else lines[-1]


@cache
def code_version() -> str:
    """Package version with the git commit, and with the beginning of a digest of its changes where there are any."""
    try:
        return code_package.state_of().label
    except ValueError as error:
        label = f"{package_version('enat-lab')}+unknown"
        _log.warning("which code this is cannot be told, and results will say %s (%s)", label, error)
        return label
