"""Stages, their keys, the plan, and running it.

A stage is a function `(config, inputs, context) -> StageResult`; a node is a stage with its config and the nodes it reads from.
Once the inputs of a node exist, the driver looks up its key in the store: existing artifacts are reused, missing ones are computed
and committed. Nodes that do not need each other run side by side, each in a thread, as far as the cluster has room. Ray distributes
the work inside a stage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from pipelines.artifacts.last_used import UseRecorder
from pipelines.artifacts.lease import Leases
from pipelines.artifacts.manifest import Manifest, inputs_of, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection, waiting
from pipelines.cluster.capacity import Capacity, Grant, Room, has_autoscaler, with_count
from pipelines.cluster.resources import Workers
from pipelines.formatting import one_line
from pipelines.storage.base import digest_of
from pipelines.workflow import config as configuration
from pipelines.workflow.interruption import StageThread
from pipelines.workflow.node_run import NodeRun, Session
from pipelines.workflow.progress import show_start
from pipelines.workflow.stage import FinishedStage, Node, PlannedStage, Sibling, titles_of

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between looks at an artifact that another run is making


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
    return [*look_up(nodes, store, given)]


def look_up(nodes: Sequence[Node], store: ArtifactStore, given: Mapping[str, Manifest] | None = None) -> Iterator[PlannedStage]:
    """The same, one node after the other."""
    found: dict[str, Manifest | None] = dict(given or {})
    for node in nodes:
        inputs = {name: found[id] for name, id in node.inputs.items() if node.stage.is_in_key(name)}
        known = {name: manifest for name, manifest in inputs.items() if manifest is not None}
        if len(known) < len(inputs):
            found[node.id] = None
            yield PlannedStage(node, None, None)
            continue
        key = stage_key(node, known)
        manifest = found[node.id] = store.read_manifest(node.stage.name, key)
        yield PlannedStage(node, key, manifest, 0 if manifest else len(store.read_parts(node.stage.name, key)))


def with_dependents(nodes: Iterable[Node], id: str) -> set[str]:
    """The ids of a node and of all that wait for it, directly or not. The nodes are in the order of the graph."""
    found = {id}
    for node in nodes:
        if found.intersection(node.inputs.values()):
            found.add(node.id)
    return found


def execute(
    nodes: Sequence[Node],
    session: Session,
    given: Mapping[str, Manifest] | None = None,
    check: Callable[[Node, Manifest], None] = lambda node, made: None,
    num_jobs: int | None = 1,
) -> list[FinishedStage]:
    """Run the nodes: reuse what the store has, compute the rest. Nodes must come after those they read.

    given: as for plan.   check: raises ValueError if an artifact shows that a later stage cannot work.
    num_jobs: nodes that are computed at once; 1 computes them in this thread, None as many as the cluster has room for.
    Returns the nodes in their order. Raises ValueError for bad input, StageError otherwise: the first one. Beside other nodes, a
    node that fails ends only those that read it. After bad input nothing new is started. What was started is finished in any case.
    """
    return _Execution(nodes, replace(session, titles=titles_of(nodes)), given or {}, check, num_jobs).run()


@dataclass(frozen=True)
class _Ended:
    """What a thread tells the driver: the artifact of a node, or the error."""

    node: Node
    outcome: FinishedStage | BaseException


@dataclass(frozen=True)
class _ConnectionRequest:
    """A stage needs Ray, which only the main thread can start: the processes of a local cluster end with the thread that started
    them."""

    answer: Future[None]


class _Execution:
    """One call of `execute`. Its methods run in the thread of the caller, except for _request_connection.

    Nodes that are over are in `_finished` or `_errors`, those at work in `_running`.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        session: Session,
        given: Mapping[str, Manifest],
        check: Callable[[Node, Manifest], None],
        num_jobs: int | None,
    ) -> None:
        self._nodes, self._session, self._check, self._num_jobs = nodes, session, check, num_jobs
        self._use_recorder, self._leases = UseRecorder(session.store), Leases(session.store)
        self._given, self._found = given, dict(given)
        self._finished: dict[str, FinishedStage] = {}
        self._errors: dict[str, Exception] = {}
        self._running: dict[str, StageThread] = {}
        self._grants: dict[str, Grant] = {}
        self._recorded: set[str] = set()
        self._told: set[str] = set()  # nodes that are known to wait for another run
        self._room: Room | None = None
        self._capacity: Capacity | None = None
        self._is_connected = False
        self._events: SimpleQueue[_Ended | _ConnectionRequest] = SimpleQueue()

    def run(self) -> list[FinishedStage]:
        with self._use_recorder, self._leases:
            for manifest in self._given.values():
                self._use_recorder.record(*name_of(manifest), inputs_of(manifest))
            if self._num_jobs != 1 and connection.is_connected():
                self._connect()  # the room is known from the beginning
            try:
                while (is_held := self._start_all()) or self._running:
                    self._handle_event(_LOOK_SECONDS if is_held else None)
            except KeyboardInterrupt:
                self._interrupt()
                raise
            for error in self._errors.values():
                raise error
        return [self._finished[node.id] for node in self._nodes]

    # Starting ------------------------------------------------------------------------------------------------------------------

    def _start_all(self) -> bool:
        """Reuse and start what can be. Returns whether a node waits for another run only."""
        is_held, is_changed = False, True
        while is_changed:
            is_held = is_changed = False
            for node in self._nodes:
                if self._is_startable(node):
                    started = self._start(node)
                    is_held |= started is None
                    is_changed |= bool(started)
        return is_held

    def _is_startable(self, node: Node) -> bool:
        if node.id in self._finished or node.id in self._errors or node.id in self._running:
            return False
        if self._errors and (self._num_jobs == 1 or any(isinstance(error, ValueError) for error in self._errors.values())):
            return False
        if not all(id in self._found for id in node.inputs.values()):
            return False
        return not any(self._shares_work(node, other) for other in self._nodes if other.id in self._running)

    def _shares_work(self, node: Node, other: Node) -> bool:
        """Whether two nodes run one after the other, because the second takes over work of the first."""
        name = node.stage.shares_work_on
        ids = [each.inputs.get(name) for each in (node, other)] if name is not None and node.stage is other.stage else [None]
        return ids[0] is not None and self._found[ids[0]] == self._found[str(ids[-1])]

    def _start(self, node: Node) -> bool | None:
        """Reuse or start a node. Returns False if there is no room for it yet, None if another run is making its artifact."""
        inputs = {name: self._found[id] for name, id in node.inputs.items()}
        try:
            work = NodeRun(node, stage_key(node, inputs), inputs, self._session)
            if node.id not in self._recorded:  # a node that waits is looked at again and again
                self._recorded.add(node.id)
                # With all artifacts of the run: inputs of a later stage must not be removed while this stage runs.
                self._use_recorder.record(node.stage.name, work.key, map(name_of, self._found.values()))
            if self._reuse(work):
                return True
            if node.stage.workers(node.config) is not None and not self._is_connected:
                self._connect()  # here, because its time is of no stage
            if (grant := self._take_room(node)) is None:
                return False
            if (holder := self._leases.take(node.stage.name, work.key)) is not None:
                self._give_back(grant)
                self._tell_of(holder, node)
                return None
            if self._reuse(work):  # the holder of the lease made it since the look before
                self._give_back(grant)
                self._leases.release(node.stage.name, work.key)
                return True
        except Exception as error:  # noqa: BLE001 (raised when the others have finished)
            self._end(node, error)
            return True
        self._compute(work, grant)
        return True

    def _rest_waits_for(self, node: Node) -> bool:
        """Whether nothing else of the run can be computed beside a node."""
        later = with_dependents(self._nodes, node.id)
        return all(other.id in later or other.id in self._finished or other.id in self._errors for other in self._nodes)

    def _reuse(self, work: NodeRun) -> bool:
        made = self._session.store.read_manifest(work.node.stage.name, work.key)
        if made is not None:
            self._end(work.node, work.reuse(made))
        return made is not None

    def _tell_of(self, holder: str, node: Node) -> None:
        if node.id not in self._told:
            self._told.add(node.id)
            self._print(f"[dim]{node.id} is being made by another run on {one_line(holder)}; waiting for it[/]")

    def _compute(self, work: NodeRun, grant: Grant) -> None:
        """Compute a node: in this thread, or begin to in another."""
        node, is_alone = work.node, self._num_jobs == 1
        show_start(self._session.console, node.id)
        session = replace(
            self._session,
            made=dict(self._found),
            siblings=self._siblings(node),
            connect=self._session.connect if is_alone else self._request_connection,
            spare_cpus=grant.spare_cpus,
            is_alone=is_alone or self._rest_waits_for(node),
        )
        compute = replace(work, session=session, started=time.monotonic()).compute
        if is_alone:
            try:
                self._end(node, compute())
            except Exception as error:  # noqa: BLE001 (raised when the others have finished)
                self._end(node, error)
            finally:
                self._leases.release(node.stage.name, work.key)
            return

        def end(outcome: FinishedStage | BaseException) -> None:
            self._leases.release(node.stage.name, work.key)
            self._events.put(_Ended(node, outcome))

        self._grants[node.id], self._running[node.id] = grant, StageThread(node.id, compute, end)
        self._running[node.id].start()

    def _siblings(self, node: Node) -> list[Sibling]:
        siblings = []
        for other in self._nodes[self._nodes.index(node) + 1 :]:
            if other.stage is node.stage and self._found.keys() >= {*other.inputs.values()} and self._shares_work(node, other):
                inputs = {name: self._found[id] for name, id in other.inputs.items()}
                key = stage_key(other, inputs)
                if self._session.store.read_manifest(other.stage.name, key) is None:
                    siblings.append(Sibling(config=other.config, inputs=inputs, key=key))
        return siblings

    def _take_room(self, node: Node) -> Grant | None:
        """None if the node has to wait."""
        if self._num_jobs is not None and len(self._running) >= self._num_jobs:
            return None
        if self._num_jobs == 1:
            return Grant()
        if self._room is None:  # not known yet, or of a cluster that grows
            return Grant() if self._is_connected or not self._running else None
        num_others = sum(self._is_startable(other) for other in self._nodes) - 1
        grant = self._room.take(self._workers(node), num_others)
        return Grant() if grant is None and not self._running else grant  # alone: the stage itself tells what is missing

    def _workers(self, node: Node) -> Workers | None:
        return node.stage.workers(with_count(node.config, self._capacity) if self._capacity is not None else node.config)

    def _give_back(self, grant: Grant) -> None:
        if self._room is not None:
            self._room.give_back(grant)

    # Events --------------------------------------------------------------------------------------------------------------------

    def _handle_event(self, timeout: float | None = None) -> None:
        """timeout: seconds to wait for one; None waits as long as it takes."""
        while True:  # not in one wait: a signal that arrives just before it would not end it
            try:
                event = self._events.get(timeout=timeout or _LOOK_SECONDS)
                break
            except Empty:
                if timeout is not None:
                    return
        if isinstance(event, _Ended):
            self._running.pop(event.node.id)
            self._give_back(self._grants.pop(event.node.id))
            self._end(event.node, event.outcome)
            return
        try:
            self._connect()
            event.answer.set_result(None)
        except BaseException as error:
            event.answer.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def _connect(self) -> None:
        self._session.connect()
        if self._num_jobs != 1 and not self._is_connected:
            self._capacity = connection.capacity()
            # The stage at work has its place already, but not on record.
            self._room = Room(self._capacity) if not has_autoscaler() else None
            for node in self._nodes:
                if node.id in self._running and self._room is not None:
                    self._grants[node.id] = self._room.take(self._workers(node), 0) or Grant()
        self._is_connected = True

    def _request_connection(self) -> None:
        """From the thread of a stage."""
        request = _ConnectionRequest(Future())
        self._events.put(request)
        waiting.result_of(request.answer)

    def _end(self, node: Node, outcome: FinishedStage | BaseException) -> None:
        if isinstance(outcome, FinishedStage):
            self._found[node.id] = outcome.manifest
            self._finished[node.id] = outcome
            verb = "reused" if outcome.is_reused else f"made in {outcome.seconds:.1f} s"
            self._print(f"[green]✓[/] {node.id:<22} {outcome.manifest.key[:12]}  [dim]{verb}[/]")
            try:
                self._check(node, outcome.manifest)
            except ValueError as error:
                self._errors[node.id] = error
        elif isinstance(outcome, Exception):
            self._errors[node.id] = outcome
            if self._running or any(map(self._is_startable, self._nodes)):  # else it is raised at once
                self._print(f"[red]✗[/] {node.id:<22} {one_line(str(outcome))}")
        else:
            raise outcome

    def _interrupt(self) -> None:
        """End all threads. A second interrupt waits for none of them."""
        for thread in self._running.values():
            thread.interrupt()
        if self._running:
            self._print(f"stopping {', '.join(self._running)} (interrupt again to stop immediately)")
        while any(thread.is_alive() for thread in self._running.values()):  # the interrupt may have taken an event with it
            with suppress(Empty):
                event = self._events.get(timeout=_POLL_SECONDS)
                if isinstance(event, _ConnectionRequest):
                    event.answer.set_exception(KeyboardInterrupt())

    def _print(self, line: str) -> None:
        self._session.console.print(line, highlight=False, soft_wrap=True)
