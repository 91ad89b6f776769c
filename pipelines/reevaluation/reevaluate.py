"""Evaluate registered models again: those whose evaluation is missing, too old, or not what would be measured now.

An evaluation that is too old is checked: it is measured again beside the existing one, and both are compared. The record contains
the time of the measurement. Reading a record does not update its timestamp.

It is safe to start two at the same time: artifacts are content-addressed, and both write the same tags. A lease on the version
keeps two processes from doing the same work. It expires, and nothing depends on it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

import psutil
from rich.console import Console

from pipelines.artifacts.manifest import Manifest, inputs_of
from pipelines.cluster import connection
from pipelines.evaluation.protocol import SCORES
from pipelines.formatting import show_age
from pipelines.reevaluation import plan as reevaluation_plan
from pipelines.reevaluation.drift import ScoreChange, Tolerances, find_drift, words
from pipelines.reevaluation.plan import Model, Plan, Request
from pipelines.registry import evaluation_record
from pipelines.registry.evaluation_record import EvaluationRecord
from pipelines.registry.influences import Evaluated, evaluated
from pipelines.run import prediction as run_prediction
from pipelines.run import runner
from pipelines.stages import generate
from pipelines.storage.base import digest_of
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import run as tracking
from pipelines.tracking import search
from pipelines.tracking.registry import ModelVersion
from pipelines.tracking.run import RunHandle
from pipelines.workflow import driver, provenance
from pipelines.workflow import stage as workflow_stage
from pipelines.workflow.model_runs import ModelRuns
from pipelines.workflow.stage import FinishedStage, PlannedStage, PublishContext

_log = logging.getLogger(__name__)
MODELS = ("enat-*", "nat-*")
LEASE = "enat.lease"
_AGAIN = "to be computed again"
_LEASE_LENGTH = timedelta(hours=6)  # after which the work of a lost machine is free; on one machine a lease ends with its process


@dataclass(frozen=True, kw_only=True)
class Options:
    """match: patterns of model names.   older_than: seconds.   limit: models that are evaluated at most; those that fail, or
    that another process evaluates, do not count.

    is_fresh: also check evaluations that are not too old.   is_dry_run: only list what is due.
    """

    match: Sequence[str] = MODELS
    alias: str = "newest"
    older_than: float | None = None
    tolerances: Tolerances = field(default_factory=Tolerances)
    limit: int | None = None
    is_fresh: bool = False
    is_dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result for one version. verdict: fresh, due, busy, evaluated, drift or failed.   note: why, in words.

    was, now: scores.   evaluation: the artifact that counts, "evaluate/<key>".   seconds: waited for.   worker_seconds,
    device_seconds: of what was computed and not reused.
    """

    version: ModelVersion
    verdict: str
    note: str = ""
    was: Mapping[str, float] = field(default_factory=dict)
    now: Mapping[str, float] = field(default_factory=dict)
    moved: Sequence[ScoreChange] = ()
    evaluation: str | None = None
    seconds: float = 0.0
    worker_seconds: float = 0.0
    device_seconds: float = 0.0
    num_computed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A version and what is known of it before anything is computed. reason: why it is due; None if it is not.

    is_check: the evaluation exists, and is measured again all the same.
    """

    model: Model
    recorded: EvaluationRecord | None
    last: Manifest | None
    plan: Plan
    planned: Sequence[PlannedStage]
    reason: str | None
    is_check: bool

    @property
    def current(self) -> Manifest | None:
        """The evaluation that the plan would reuse."""
        return self.planned[-1].manifest

    @property
    def was(self) -> Mapping[str, float]:
        return self.recorded.scores if self.recorded else {}


def reevaluate(request: Request, source: str, options: Options, console: Console) -> list[Outcome]:
    """Evaluate what is due. Returns an outcome for every model, ordered by name.

    source: where the request came from, for tracking.   Raises ValueError for a request by which no model can be evaluated, and
    TrackingError if the registry cannot be read.
    """
    config = request.config
    uri = runner.tracking_uri(config)
    is_certain = options.is_fresh and options.older_than is None and not options.is_dry_run
    if is_certain and connection.address_of(config.cluster) != connection.LOCAL:
        sampling = config.generate.execution
        runner.connect(config, console, () if sampling.gpus_per_worker else generate.STAGE.imports)  # while the registry is asked
    with console.status("asking the registry"):
        at_alias = search.versions_at(uri, options.alias)
        named = [version for version in at_alias if any(fnmatchcase(version.name, pattern) for pattern in options.match)]
    if not named and (tuple(options.match) != MODELS or options.alias != Options.alias):  # a slip, not an empty registry
        raise ValueError(f"no registered model that matches {', '.join(options.match)} has the alias {options.alias}")
    outcomes: dict[str, Outcome] = {}
    due: list[_Case] = []
    with console.status("looking at models and their stores"):
        for version in (
            version for version in named if "enat.artifact" in version.tags
        ):  # the others were not registered by this program
            found = _examined(version, request, options)
            if isinstance(found, Outcome):
                outcomes[version.name] = found
            else:
                due.append(found)
    # Models that were never evaluated come first, then those evaluated longest ago.
    due.sort(key=lambda case: case.recorded.evaluated.timestamp() if case.recorded else -math.inf)
    evaluator = _Evaluator(request, source, options, console, uri, num_cases=min(len(due), options.limit or len(due)))
    with evaluator.ending(outcomes):
        num_evaluated = 0
        for case in due:
            is_left = options.is_dry_run or (options.limit is not None and num_evaluated >= options.limit)
            assert case.reason is not None
            left = Outcome(version=case.model.version, verdict="due", note=case.reason, was=case.was)
            outcome = outcomes[case.model.version.name] = left if is_left else evaluator.evaluate(case)
            num_evaluated += outcome.verdict in ("evaluated", "drift")
    return [outcomes[name] for name in sorted(outcomes)]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    verdicts = {outcome.verdict for outcome in outcomes}
    return 1 if "failed" in verdicts else 3 if "drift" in verdicts else 0


# What is due ---------------------------------------------------------------------------------------------------------------


def _examined(version: ModelVersion, request: Request, options: Options) -> _Case | Outcome:
    """A case for a version that is due, an outcome for one that is not due or cannot be evaluated."""
    try:
        case = _examine(version, request, options)
    except Exception as error:  # noqa: BLE001 (one model must not stop the others)
        return _failed(version, error)
    if case.reason is not None:
        return case
    assert case.recorded is not None and case.last is not None
    if not options.is_dry_run:  # a removal of unused artifacts must keep it until it is due
        case.model.store.record_use(case.last.stage, case.last.key, inputs_of(case.last))
    note = f"evaluated {_ago(case.recorded.evaluated)} ago" + (f"; {case.recorded.drift}" if case.recorded.drift else "")
    return Outcome(version=version, verdict="fresh", note=note, was=case.was, now=case.was, evaluation=case.recorded.evaluation)


def _examine(version: ModelVersion, request: Request, options: Options) -> _Case:
    model = reevaluation_plan.open_model(version, request.config)
    recorded = EvaluationRecord.of(version.tags)
    last = None
    if recorded is not None:
        stage, _, key = recorded.evaluation.partition("/")
        last = model.store.read_manifest(stage, key)
        if last is None and not request.has_config:
            raise ValueError(
                f"its evaluation {stage}/{key[:12]} is no longer in {model.store.uri}; give a CONFIG to evaluate it again"
            )
    plan = reevaluation_plan.make_plan(model, last, request)
    planned = driver.plan(plan.nodes, model.store, plan.given)
    reason, is_old = None, False
    if recorded is None:
        reason = "never evaluated"
    elif last is None:
        reason = "its evaluation is gone from the store"
    elif planned[-1].key != last.key:
        reason = reevaluation_plan.changes(last, model.store, planned, plan.given)
    elif options.older_than is not None:
        age = (datetime.now(UTC) - recorded.evaluated).total_seconds()
        is_old = age >= options.older_than
        reason = f"evaluated {show_age(age)} ago" if is_old else None
    elif options.is_fresh:
        reason = _AGAIN
    is_check = planned[-1].is_reused and (is_old or options.is_fresh)
    return _Case(model=model, recorded=recorded, last=last, plan=plan, planned=planned, reason=reason, is_check=is_check)


def _ago(moment: datetime) -> str:
    return show_age((datetime.now(UTC) - moment).total_seconds())


def _failed(version: ModelVersion, error: Exception, **fields: Any) -> Outcome:
    _log.info("%s version %s failed", version.name, version.version, exc_info=error)
    message = " ".join(str(error).split()) or type(error).__name__
    is_expected = isinstance(error, ValueError | workflow_stage.StageError | search.TrackingError)
    return Outcome(
        version=version, verdict="failed", note=message if is_expected else f"{type(error).__name__}: {message}", **fields
    )


# Evaluating ----------------------------------------------------------------------------------------------------------------


class _Evaluator:
    """Evaluates one case after another. Its tracking run begins with the first one. num_cases: that are to be evaluated."""

    def __init__(self, request: Request, source: str, options: Options, console: Console, uri: str, *, num_cases: int) -> None:
        self.request, self.source, self.options, self.console, self.uri = request, source, options, console, uri
        self.num_cases = num_cases
        self.parent: RunHandle | None = None

    def evaluate(self, case: _Case) -> Outcome:
        version, started = case.model.version, time.monotonic()
        self.console.print(f"\n[bold]{version.name}[/] version {version.version}: {case.reason}", highlight=False)
        try:
            with self._lease(version) as (held_by, tags):
                if held_by is not None:
                    return Outcome(version=version, verdict="busy", note=f"{held_by} evaluates it", was=case.was)
                again = self._meanwhile(case, tags)
                return again if isinstance(again, Outcome) else self._evaluate(again, started)
        except Exception as error:  # noqa: BLE001 (one model must not stop the others)
            return _failed(version, error, was=case.was, seconds=time.monotonic() - started)

    def _meanwhile(self, case: _Case, tags: Mapping[str, str]) -> _Case | Outcome:
        """The case as it is now, or what another process made of it since it was looked at."""
        now = EvaluationRecord.of(tags)
        if now == case.recorded:
            return case
        again = _examine(replace(case.model.version, tags=tags), self.request, self.options)
        if again.reason not in (None, _AGAIN):
            return again
        assert now is not None
        note = "evaluated meanwhile by another process"
        version = case.model.version
        return Outcome(version=version, verdict="fresh", note=note, was=case.was, now=now.scores, evaluation=now.evaluation)

    def _evaluate(self, case: _Case, started: float) -> Outcome:
        model, version = case.model, case.model.version
        model.store.check_writable()
        is_check = case.is_check
        plan = reevaluation_plan.recomputed(case.plan, self._token(case)) if is_check else case.plan
        before = case.current if is_check else case.last
        baseline = before.metrics if before is not None else case.was

        def moved_in(result: Manifest) -> list[ScoreChange] | None:
            """None if the two are not comparable."""
            if before is not None:
                is_comparable = reevaluation_plan.is_comparable(before, result, model.store)
            else:  # the artifact of the recorded evaluation no longer exists
                samples = reevaluation_plan.input_of(model.store, result, "samples")
                is_comparable = case.recorded is not None and case.recorded.is_comparable(result, samples)
            earlier = Evaluated(baseline) if before is None else evaluated(model.store, before)
            return find_drift(earlier, evaluated(model.store, result), self.options.tolerances) if is_comparable else None

        def publish(result: Manifest, context: PublishContext) -> None:
            moved = moved_in(result)
            tags = {"enat.model": version.name, "enat.model_version": version.version, "enat.is_check": str(is_check).lower()}
            tags |= {name: version.tags[name] for name in ("enat.dataset",) if name in version.tags}  # it may have been corrected
            run = context.model_run if context.is_recorded and context.model_run is not None else context.run
            run.set_tags(tags | ({} if moved is None else {evaluation_record.DRIFT: words(moved)}))

        done = self._execute(reevaluation_plan.publishing(plan, publish), case)
        result = done[-1].manifest
        moved = moved_in(result)
        kept = case.current if is_check else result
        assert kept is not None
        computed = [item for item in done if not item.is_reused]
        is_measured = is_check or any(item.node.stage.reevaluation == "measured" for item in computed)
        self._tag(case, kept, result, moved, is_measured)
        return Outcome(
            version=version,
            verdict="drift" if moved else "evaluated",
            note=self._note(case, moved, is_measured),
            was={name: baseline[name] for name in SCORES if name in baseline},
            now={name: result.metrics[name] for name in SCORES if name in result.metrics},
            moved=moved or (),
            evaluation=f"{kept.stage}/{kept.key}",
            seconds=time.monotonic() - started,
            worker_seconds=sum(item.manifest.provenance["worker_seconds"] for item in computed),
            device_seconds=sum(item.manifest.provenance["device_seconds"] for item in computed),
            num_computed=len(computed),
        )

    def _note(self, case: _Case, moved: list[ScoreChange] | None, is_measured: bool) -> str:
        assert case.reason is not None
        if moved:
            return words(moved)
        notes = [case.reason]
        if case.is_check and moved is not None:
            notes.append("computed again, nothing moved")
        if not is_measured:
            notes.append("everything was reused")
        if moved is None and case.recorded is not None:
            notes.append("not comparable with the old scores")
        return "; ".join(notes)

    def _token(self, case: _Case) -> str:
        """Names a check. It stays the same until the check is done, so a killed check resumes."""
        since = case.recorded.evaluated.isoformat() if case.recorded else ""
        return digest_of([since, provenance.code_version()])[:16]

    def _execute(self, plan: Plan, case: _Case) -> list[FinishedStage]:
        config, model = self.request.config, case.model
        if self.parent is None:
            tags = {"enat.config": self.source, "enat.code": provenance.code_version()}
            self.parent = tracking.start_run(self.uri, config.tracking, "reevaluate", tags)
            runner.pin_code(self.parent)
        named = {
            "enat.store": without_credentials(model.store.uri),
            "enat.model": model.version.name,
            "enat.reason": case.reason or "",
        }
        name = f"{model.version.name}-v{model.version.version}"
        planned = driver.plan(plan.nodes, model.store, plan.given)
        jobs = runner.default_jobs(config.cluster)
        is_small = jobs == 1 and run_prediction.does_without_ray(
            config, planned, model.store, given=plan.given, num_alike=self.num_cases
        )
        missing = [item.node for item in planned if not item.is_reused]
        connect = runner.Connector(config, self.console, missing, is_needed=not is_small)
        with tracking.ending(tracking.start_run(self.uri, config.tracking, name, named, self.parent)) as run:
            models = ModelRuns(run, nodes=plan.nodes)  # links what is reused to the runs that made it
            session = replace(runner.open_session(config, model.store, run, self.console, connect), models=models)
            done = driver.execute(plan.nodes, session, plan.given, num_jobs=jobs)
            run.finish()
        return done

    def _tag(self, case: _Case, kept: Manifest, result: Manifest, moved: list[ScoreChange] | None, is_measured: bool) -> None:
        """Tags the version. A drift stays tagged until a later measurement finds none. kept: the evaluation that counts.
        result: the last measurement, whose time is recorded."""
        node = case.recorded.node if case.recorded and not self.request.has_config else "evaluate"
        samples = reevaluation_plan.input_of(case.model.store, kept, "samples")
        evaluated = evaluation_record.made_at(result)
        tags = evaluation_record.tags_of(kept, samples, SCORES, node=node, evaluated=evaluated)
        version = search.read_version(self.uri, case.model.version.name, case.model.version.version)
        changed = evaluation_record.replacing(tags, version.tags)
        if moved:
            changed[evaluation_record.DRIFT] = words(moved)
        elif is_measured:
            changed[evaluation_record.DRIFT] = None
        search.tag_version(self.uri, version, changed)

    @contextmanager
    def _lease(self, version: ModelVersion) -> Iterator[tuple[str | None, Mapping[str, str]]]:
        """Yields the holder of the lease if it is another process, and the current tags of the version."""
        found = search.read_version(self.uri, version.name, version.version)
        held_by = _holder_of(found.tags.get(LEASE))
        if held_by is not None:
            yield held_by, found.tags
            return
        until = (datetime.now(UTC) + _LEASE_LENGTH).isoformat(timespec="seconds")
        own = f"{socket.gethostname()} {os.getpid()} {until}"
        search.tag_version(self.uri, found, {LEASE: own})
        # MLflow has no conditional write. If two processes write at the same time, the one that is read continues.
        found = search.read_version(self.uri, version.name, version.version)
        if found.tags.get(LEASE) != own:
            yield _holder_of(found.tags.get(LEASE)) or "another process", found.tags
            return
        try:
            yield None, found.tags
        finally:
            found = search.read_version(self.uri, version.name, version.version)
            if found.tags.get(LEASE) == own:
                search.tag_version(self.uri, found, {LEASE: None})

    @contextmanager
    def ending(self, outcomes: Mapping[str, Outcome]) -> Iterator[None]:
        """Ends the tracking run in any case, with the outcomes so far."""
        status = "KILLED"
        try:
            yield
            status = "FAILED" if exit_code([*outcomes.values()]) == 1 else "FINISHED"
        finally:
            if self.parent is not None:
                verdicts = [outcome.verdict for outcome in outcomes.values()]
                self.parent.log_metrics({f"models/{verdict}": verdicts.count(verdict) for verdict in sorted(set(verdicts))})
                self.parent.finish(status)


def _holder_of(lease: str | None) -> str | None:
    """The holder of a lease; None if there is no lease, it has expired, or its process on this machine has ended."""
    try:
        host, pid, until = (lease or "").split()
        is_over = datetime.fromisoformat(until) <= datetime.now(UTC)
        is_gone = host == socket.gethostname() and not psutil.pid_exists(int(pid))
    except (ValueError, TypeError):  # none, or written by someone else
        return None
    return None if is_over or is_gone else f"process {pid} on {host}"
