"""Stages, their keys, the plan, and running it.

A stage is a function `(config, inputs, context) -> StageResult`; a node is a stage with its config and the nodes it reads from.
The driver walks the nodes in order and looks up each key in the store: existing artifacts are reused, missing ones are computed and
committed. Ray distributes the work inside a stage. Nothing here schedules anything.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from pipelines.artifacts.last_used import UseRecorder
from pipelines.artifacts.manifest import Manifest, inputs_of, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.storage.base import StorageError, digest_of
from pipelines.tracking import run as tracking_run
from pipelines.workflow import config as configuration
from pipelines.workflow.provenance import code_version
from pipelines.workflow.stage import FinishedStage, Node, PlannedStage, PublishContext, Session, Sibling, StageContext, StageError

_log = logging.getLogger(__name__)


def stage_key(node: Node, inputs: Mapping[str, Manifest]) -> str:
    return digest_of(
        {
            "stage": node.stage.name,
            "version": node.stage.version,
            "config": node.identity if node.identity is not None else configuration.identity(node.config),
            "inputs": {name: manifest.digest for name, manifest in inputs.items() if node.stage.is_in_key(name)},
        }
    )


def plan(nodes: Sequence[Node], store: ArtifactStore, given: Mapping[str, Manifest] | None = None) -> list[PlannedStage]:
    """What a run would reuse and compute. Nodes must come after those they read.

    given: artifacts that nodes may read by these ids without a node that makes them.
    """
    found: dict[str, Manifest | None] = dict(given or {})
    planned = []
    for node in nodes:
        inputs = {name: found[id] for name, id in node.inputs.items() if node.stage.is_in_key(name)}
        known = {name: manifest for name, manifest in inputs.items() if manifest is not None}
        if len(known) < len(inputs):
            found[node.id] = None
            planned.append(PlannedStage(node, None, None))
            continue
        key = stage_key(node, known)
        manifest = found[node.id] = store.read_manifest(node.stage.name, key)
        planned.append(PlannedStage(node, key, manifest, 0 if manifest else len(store.read_parts(node.stage.name, key))))
    return planned


def execute(
    nodes: Sequence[Node],
    session: Session,
    given: Mapping[str, Manifest] | None = None,
    check: Callable[[Node, Manifest], None] = lambda node, made: None,
) -> list[FinishedStage]:
    """Run the nodes in order: reuse what the store has, compute the rest. given: as for plan.

    check: raises ValueError if an artifact shows that a later stage cannot work. Raises ValueError for bad input, StageError
    otherwise.
    """
    found: dict[str, Manifest] = dict(given or {})
    done = []
    with UseRecorder(session.store) as use_recorder:
        for manifest in found.values():
            use_recorder.record(*name_of(manifest), inputs_of(manifest))
        for number, node in enumerate(nodes):
            inputs = {name: found[id] for name, id in node.inputs.items()}
            key = stage_key(node, inputs)
            started = time.monotonic()
            with _stage_run(node, key, inputs, session) as run:
                # With all artifacts of the run: inputs of a later stage must not be removed while this stage runs.
                use_recorder.record(node.stage.name, key, map(name_of, found.values()))
                made = session.store.read_manifest(node.stage.name, key)
                is_reused = made is not None
                if made is None:
                    siblings = _siblings(node, nodes[number + 1 :], found, session.store)
                    made = _compute(node, key, inputs, run, replace(session, made=dict(found), siblings=siblings))
                else:
                    _clean_up(session.store, made)  # what a run before could not remove
                    if node.stage.accept is not None:
                        node.stage.accept(node.config, made)
                seconds = time.monotonic() - started
                _publish(node, made, inputs, run, session)
                _finish_stage_run(run, made, is_reused)
            found[node.id] = made
            done.append(FinishedStage(node, made, is_reused, seconds))
            verb = "reused" if is_reused else f"made in {seconds:.1f} s"
            session.console.print(f"[green]✓[/] {node.id:<22} {key[:12]}  [dim]{verb}[/]", highlight=False)
            check(node, made)
    return done


def _siblings(node: Node, later: Sequence[Node], found: Mapping[str, Manifest], store: ArtifactStore) -> list[Sibling]:
    siblings = []
    for other in later:
        if other.stage is node.stage and found.keys() >= {*other.inputs.values()}:
            inputs = {name: found[id] for name, id in other.inputs.items()}
            key = stage_key(other, inputs)
            if store.read_manifest(other.stage.name, key) is None:
                siblings.append(Sibling(config=other.config, inputs=inputs, key=key))
    return siblings


def _compute(node: Node, key: str, inputs: Mapping[str, Manifest], run: tracking_run.RunHandle, session: Session) -> Manifest:
    """Make the artifact. If an identical run was faster, its artifact is adopted, also if its cleaning up made this one fail."""
    store = session.store
    try:
        committed = store.commit(_made(node, key, inputs, run, session))
    except Exception as error:
        if (found := store.read_manifest(node.stage.name, key)) is None:
            raise
        committed = found
        _log.info("%s was made by another run meanwhile; this run ended with %s", node.id, error, exc_info=True)
    _clean_up(store, committed)
    return committed


def _clean_up(store: ArtifactStore, committed: Manifest) -> None:
    """Remove what is left of the work on an artifact. A failure costs a warning: the next run that uses the artifact repeats it."""
    try:
        store.discard_work(committed)
    except (OSError, StorageError) as error:
        place = f"{committed.stage}/{committed.key[:12]}"
        _log.warning("temporary files of %s could not be removed (%s); the next run or `enat artifacts gc` does it", place, error)


def _made(node: Node, key: str, inputs: Mapping[str, Manifest], run: tracking_run.RunHandle, session: Session) -> Manifest:
    """Run the stage. Raises ValueError for bad input, StageError otherwise."""
    from ray.exceptions import RayTaskError

    started = time.monotonic()
    try:
        context = StageContext(
            stage=node.stage.name,
            key=key,
            store=session.store,
            run=run,
            console=session.console,
            connect=session.connect,
            made=session.made,
            siblings=session.siblings,
        )
        result = node.stage.run(node.config, inputs, context)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):  # found by a worker: the message without the worker's traceback
            error.cause.args = tuple(_own(each) if isinstance(each, str) else each for each in error.cause.args)
            raise error.cause from error
        _log.exception("stage %s failed", node.id)
        raise StageError(f"stage {node.id} failed: {_root_cause(error)}") from error
    except ValueError:
        raise
    except Exception as error:
        _log.exception("stage %s failed", node.id)
        raise StageError(f"stage {node.id} failed: {_root_cause(error)}") from error
    for name in (file.name for file in (*result.files, *result.records) if node.stage.files):
        assert any(fnmatchcase(name, pattern) for pattern in node.stage.files), f"{name} is not a file of stage {node.id}"
    return Manifest(
        stage=node.stage.name,
        key=key,
        stage_version=node.stage.version,
        config=configuration.redacted(node.config),
        inputs={
            name: {"stage": m.stage, "key": m.key, "digest": m.digest} for name, m in inputs.items() if node.stage.is_in_key(name)
        },
        files=tuple(result.files),
        records=tuple(result.records),
        summary=result.summary.to_dict() if result.summary is not None else {},
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


def _publish(node: Node, manifest: Manifest, inputs: Mapping[str, Manifest], run: tracking_run.RunHandle, session: Session) -> None:
    if node.stage.publish is None:
        return
    try:
        context = PublishContext(
            store=session.store,
            run=run,
            tracking=session.tracking,
            node=node.id,
            prices=session.prices,
            stages=session.stages,
        )
        node.stage.publish(manifest, inputs, context)
    except Exception as error:  # noqa: BLE001 (the artifact exists, which is the purpose of the run)
        _log.warning("%s was made, but not published (%s)", node.id, _root_cause(error))
        _log.info("publishing %s failed", node.id, exc_info=True)


@contextmanager
def _stage_run(node: Node, key: str, inputs: Mapping[str, Manifest], session: Session) -> Iterator[tracking_run.RunHandle]:
    """The tracking run of a stage. It ends even if the stage fails."""
    tags = {"enat.stage": node.stage.name, "enat.node": node.id, "enat.key": key}
    tags |= {f"enat.input.{name}": f"{manifest.stage}/{manifest.key}" for name, manifest in inputs.items()}
    with tracking_run.ending(tracking_run.start_run(session.run.uri, session.tracking, node.id, tags, session.run)) as run:
        run.log_params(configuration.redacted(node.config))
        yield run


def _finish_stage_run(run: tracking_run.RunHandle, manifest: Manifest, is_reused: bool) -> None:
    run.set_tags(
        {"enat.digest": manifest.digest, "enat.reused": str(is_reused).lower(), "enat.code": str(manifest.provenance["code"])}
    )
    seconds = {name: manifest.provenance[name] for name in ("seconds", "worker_seconds", "device_seconds")}
    run.log_metrics({**manifest.metrics, **{f"cost/{name}": value for name, value in seconds.items()}})
    run.finish()


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
