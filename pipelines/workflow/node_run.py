"""One node of a run: its artifact is reused, or computed and committed, and made known to tracking. What all nodes share."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection, hardware
from pipelines.cluster.capacity import has_autoscaler, with_count
from pipelines.cluster.resources import ALL
from pipelines.storage.base import StorageError
from pipelines.tracking import run as tracking_run
from pipelines.tracking.run import RunHandle, TrackingConfig
from pipelines.workflow import config as configuration
from pipelines.workflow.inputs import read_checkpoint, tracked_inputs
from pipelines.workflow.model_runs import ModelRuns
from pipelines.workflow.provenance import code_version
from pipelines.workflow.stage import FinishedStage, Node, PublishContext, Sibling, Stage, StageContext, StageError
from pipelines.workflow.work import WORK_TAG, Prices, read_prediction, to_provenance, to_tag

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all stages of one pipeline run share. connect: connects to Ray.   prices: for costs in money.

    stages: all stages by name, also those that this run does not use: artifacts of theirs may be among the inputs.
    made: artifacts so far, by the ids of their nodes.   siblings, spare_cpus, is_alone: of the node that is computed.
    predicted: seconds that were predicted before the run, by the ids of nodes: value, low and high.
    titles: see titles_of.
    models: the tracking runs of models, below which those of their stages are. None: all stages are below `run`, also reused ones.
    """

    store: ArtifactStore
    run: RunHandle
    tracking: TrackingConfig
    console: Console
    connect: Callable[[], None]
    prices: Prices | None = None
    stages: Mapping[str, Stage] = field(default_factory=dict)
    made: Mapping[str, Manifest] = field(default_factory=dict)
    siblings: Sequence[Sibling] = ()
    spare_cpus: int | None = None
    is_alone: bool = True
    predicted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    models: ModelRuns | None = None

    def run_of(self, node: str) -> RunHandle:
        """The tracking run of the model that a node belongs to. node: its id."""
        return self.run if self.models is None else self.models.of(node)


@dataclass(frozen=True)
class NodeRun:
    """A node with its key and the artifacts that it reads."""

    node: Node
    key: str
    inputs: Mapping[str, Manifest]
    session: Session
    started: float = field(default_factory=time.monotonic)

    def reuse(self, made: Manifest) -> FinishedStage:
        """Take an existing artifact. Raises ValueError if it does not meet a limit of the config.

        The run that made it is linked to, if tracking has it. Otherwise the reused artifact gets a run of its own.
        """
        recorded = None
        if self.session.models is not None:
            recorded = self.session.run.find({"enat.stage": self.node.stage.name, "enat.key": self.key})
        with self._tracked() if recorded is None else nullcontext(recorded) as run:
            _clean_up(self.session.store, made)  # what a run before could not remove
            if self.node.stage.accept is not None:
                self.node.stage.accept(self.node.config, made)
            return self._finish(made, run, is_reused=True, is_recorded=recorded is not None)

    def compute(self) -> FinishedStage:
        """Make the artifact. If an identical run was faster, its artifact is adopted, also if its cleaning up made this one fail.

        Raises ValueError for bad input, StageError otherwise."""
        store, name = self.session.store, (self.node.stage.name, self.key)
        with self._tracked() as run:
            try:
                committed = store.commit(self._made(run))
            except Exception as error:
                if (found := store.read_manifest(*name)) is None:
                    raise
                committed = found
                _log.info("%s was made by another run meanwhile; this run ended with %s", self.node.id, error, exc_info=True)
            _clean_up(store, committed)
            return self._finish(committed, run, is_reused=False)

    def _made(self, run: tracking_run.RunHandle) -> Manifest:
        """Run the stage."""
        started, node, session = time.monotonic(), self.node, self.session
        config = self._config()
        context = StageContext(
            stage=node.stage.name,
            key=self.key,
            store=session.store,
            run=run,
            console=session.console,
            connect=session.connect,
            node=node.id,
            made=session.made,
            siblings=session.siblings,
            spare_cpus=session.spare_cpus,
            is_alone=session.is_alone,
        )
        try:
            result = node.stage.run(config, self.inputs, context)
        except Exception as error:
            cause = _raised_by_worker(error)
            if isinstance(cause, ValueError):  # the message without the worker's traceback
                cause.args = tuple(_own(each) if isinstance(each, str) else each for each in cause.args)
                raise cause from error
            if cause is None and isinstance(error, ValueError):
                raise
            if cause is None and _was_interrupted(error):
                raise KeyboardInterrupt from error
            _log.exception("stage %s failed", node.id)
            raise StageError(f"stage {node.id} failed: {_root_cause(error)}") from error
        for name in (file.name for file in (*result.files, *result.records) if node.stage.files):
            assert any(fnmatchcase(name, pattern) for pattern in node.stage.files), f"{name} is not a file of stage {node.id}"
        seconds = time.monotonic() - started
        read = {name: manifest for name, manifest in self.inputs.items() if node.stage.is_in_key(name)}
        return Manifest(
            stage=node.stage.name,
            key=self.key,
            stage_version=node.stage.version,
            config=configuration.redacted(node.config),
            inputs={name: {"stage": m.stage, "key": m.key, "digest": m.digest} for name, m in read.items()},
            files=tuple(result.files),
            records=tuple(result.records),
            summary=result.summary.to_dict() if result.summary is not None else {},
            metrics={name: float(value) for name, value in result.metrics.items()},
            provenance={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code": code_version(),
                "host_cpus": os.cpu_count(),
                "seconds": seconds,
                "worker_seconds": result.worker_seconds,
                "device_seconds": result.device_seconds,
                **to_provenance(result.work, seconds, _hardware(), session.predicted.get(node.id)),
            },
        )

    def _config(self) -> Any:
        """The config with the number of workers that the cluster has room for, if it asks for all."""
        workers = self.node.stage.workers(self.node.config)
        if workers is None or workers.num_workers != ALL:
            return self.node.config
        self.session.connect()
        if not has_autoscaler():
            return with_count(self.node.config, connection.capacity())
        if (largest := hardware.grown()) is None:
            raise ValueError(
                f"{self.node.stage.name}.execution.num_workers is {ALL}, but this cluster adds nodes on demand; give a number, or "
                f"set the variable {hardware.SIZE} on the cluster to its largest size, such as 2x8xGPU"
            )
        return with_count(self.node.config, largest.capacity)

    def _finish(self, made: Manifest, run: tracking_run.RunHandle, *, is_reused: bool, is_recorded: bool = False) -> FinishedStage:
        """is_recorded: whether `run` is of an earlier command, which has ended it."""
        seconds = time.monotonic() - self.started
        self._publish(made, run, is_recorded=is_recorded)
        if not is_recorded:
            self._record(made, run, is_reused=is_reused)
            run.finish()
        if (models := self.session.models) is not None:
            models.record(self.node, run, is_reused=is_recorded)
            models.end(self.node.id)
        return FinishedStage(self.node, made, is_reused, seconds)

    def _record(self, made: Manifest, run: tracking_run.RunHandle, *, is_reused: bool) -> None:
        tags = {"enat.digest": made.digest, "enat.reused": str(is_reused).lower(), "enat.code": str(made.provenance["code"])}
        costs = {f"cost/{name}": made.provenance[name] for name in ("seconds", "worker_seconds", "device_seconds")}
        if (work := to_tag(made)) is not None:
            tags[WORK_TAG] = work
        predicted = read_prediction(made.provenance) or {}
        costs |= {f"cost/predicted_seconds{'' if side == 'value' else f'_{side}'}": value for side, value in predicted.items()}
        values = {**made.metrics, **costs}
        if self.node.stage.has_curves:
            tags |= {f"enat.value.{name}": repr(float(value)) for name, value in values.items()}
        else:
            run.log_metrics(values)
        run.set_tags(tags)

    def _publish(self, made: Manifest, run: tracking_run.RunHandle, *, is_recorded: bool) -> None:
        node, session = self.node, self.session
        if node.stage.publish is None:
            return
        try:
            titles = {name: session.titles[id] for name, id in {"": node.id, **node.inputs}.items() if id in session.titles}
            context = PublishContext(
                store=session.store,
                run=run,
                tracking=session.tracking,
                node=node.id,
                prices=session.prices,
                stages=session.stages,
                model_run=session.run_of(node.id),
                is_recorded=is_recorded,
                titles=titles,
            )
            node.stage.publish(made, self.inputs, context)
        except Exception as error:  # noqa: BLE001 (the artifact exists, which is the purpose of the run)
            _log.warning("%s was made, but not published (%s)", node.id, _root_cause(error))
            _log.info("publishing %s failed", node.id, exc_info=True)

    @contextmanager
    def _tracked(self) -> Iterator[tracking_run.RunHandle]:
        """The tracking run of the stage. It ends even if the stage fails."""
        node, session = self.node, self.session
        tags = {"enat.stage": node.stage.name, "enat.node": node.id, "enat.key": self.key}
        tags |= {f"enat.input.{name}": f"{manifest.stage}/{manifest.key}" for name, manifest in self.inputs.items()}
        parent = session.run_of(node.id)
        with tracking_run.ending(tracking_run.start_run(session.run.uri, session.tracking, node.id, tags, parent)) as run:
            run.log_params(self._params())
            run.log_inputs(tracked_inputs(session.store, session.stages, self.inputs.values()))
            if (checkpoint := read_checkpoint(node.config, self.inputs)) is not None:
                run.log_model_input(checkpoint)
            yield run

    def _params(self) -> dict[str, Any]:
        """Comparisons compare all settings of samples. Of other stages those that differ from their defaults tell more."""
        config = self.node.config
        if self.node.stage.kind != "generation" and dataclasses.is_dataclass(config):
            return configuration.changed(config)
        return {name: value for name, value in configuration.flat(configuration.redacted(config)).items() if value is not None}


def _hardware() -> dict[str, str]:
    """Product names of the devices that the stages of this run use. Empty if they cannot be had: an artifact is worth more."""
    try:
        machines = connection.machines() if connection.is_connected() else hardware.of_this_machine()
    except Exception:  # noqa: BLE001 (the work is done, and is committed next)
        _log.warning("the names of the cluster's devices could not be read; its artifacts are of no use for predictions")
        _log.info("reading the names of devices failed", exc_info=True)
        return {}
    return {device: name for device in (hardware.CPU, hardware.GPU) if (name := machines.name_of(device)) is not None}


def _clean_up(store: ArtifactStore, committed: Manifest) -> None:
    """Remove what is left of the work on an artifact. A failure costs a warning: the next run that uses the artifact repeats it."""
    try:
        store.discard_work(committed)
    except (OSError, StorageError) as error:
        place = f"{committed.stage}/{committed.key[:12]}"
        _log.warning("temporary files of %s could not be removed (%s); the next run or `enat artifacts gc` does it", place, error)


def _raised_by_worker(error: Exception) -> BaseException | None:
    """What a worker raised, if the error is Ray's report of it."""
    if "ray" not in sys.modules:
        return None
    from ray.exceptions import RayTaskError

    return error.cause if isinstance(error, RayTaskError) else None


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error comes from Ctrl-C: what it interrupts, such as the taking of a lock, may not be able to clean up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _root_cause(error: BaseException) -> str:
    """The innermost message. Ray wraps errors of workers in its own errors."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        failures = getattr(error, "worker_failures", None)
        if isinstance(failures, dict) and failures:
            inner = next(iter(failures.values()))
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    lines = _own(str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}" if not isinstance(error, ValueError) else lines[-1]


def _own(message: str) -> str:
    """Without what Ray Data 2.60 appends to messages of workers: "Failed to ... after 1/1 attempts", and its settings."""
    return re.split(r"\nFailed to .+ after \d+/\d+ attempts ", message)[0]
