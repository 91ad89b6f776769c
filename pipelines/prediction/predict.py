"""What the stages of a plan will take: seconds, hours of devices, bytes and money, each with a range, and the whole run.

Each stage that is to be computed states its work (Stage.foresee) from its config and from what its inputs tell, or will tell. Rates
turn work into seconds. The whole run is simulated on the cluster: stages that do not need each other run side by side, as far as
there is room.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.capacity import Capacity, Grant, Room, with_count
from pipelines.cluster.hardware import Machines
from pipelines.cluster.resources import Workers
from pipelines.prediction.rates import Rate, Rates, start_seconds
from pipelines.workflow.stage import Node, PlannedStage
from pipelines.workflow.summary import Summary, SummaryError
from pipelines.workflow.work import Foreseen, Prices, UnforeseeableError, Work, busy_seconds

_HOUR = 3600.0
Foresee = Callable[[Any, Mapping[str, Any]], Foreseen]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A value with the range in which it is expected."""

    value: float
    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def __add__(self, other: Range) -> Range:
        return Range(value=self.value + other.value, low=self.low + other.low, high=self.high + other.high)

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


_NOTHING = Range(value=0.0, low=0.0, high=0.0)


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """Of one stage that is to be computed.

    is_most: whether it is an upper bound.   problem: a sentence, if nothing can be predicted.
    workers: of the stage, None if it runs on the driver.
    num_measured: earlier artifacts with which the rate of its longest work was measured; 0 if that rate is computed.
    """

    node: str
    seconds: Range = _NOTHING
    worker_hours: Range = _NOTHING
    device_hours: Range = _NOTHING
    size: float = 0.0
    num_measured: int = 0
    workers: Workers | None = None
    problem: str | None = None
    is_most: bool = False

    @property
    def source(self) -> str:
        """Where the rate comes from."""
        return "measured" if self.num_measured else "computed"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of a run. seconds: from its start to its end on these machines.   money: None without prices.
    critical: nodes that each begin when the one before ends. The last of them ends the run.
    """

    stages: Mapping[str, StagePrediction]
    machines: Machines
    seconds: Range
    worker_hours: Range
    device_hours: Range
    size: float
    money: Range | None
    currency: str | None
    critical: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return all(stage.problem is None for stage in self.stages.values())


def predict(
    planned: Sequence[PlannedStage],
    rates: Rates,
    machines: Machines,
    *,
    prices: Prices | None = None,
    num_jobs: int | None = None,
    foreseen_by: Mapping[str, Foresee] | None = None,
    given: Mapping[str, Summary] | None = None,
) -> Prediction:
    """Of the stages that are not reused. num_jobs: as for `enat run`.

    foreseen_by: replaces Stage.foresee, by the name of the stage, where the caller knows more than a config tells.
    given: summaries of inputs that no stage of the plan makes, by id.
    """
    told: dict[str, Summary | None] = {**(given or {})}
    stages: dict[str, StagePrediction] = {}
    for item in planned:
        node, manifest = item.node, item.manifest
        if manifest is not None:
            told[node.id] = _summary_of(node, manifest)
            continue
        foreseen, stages[node.id] = _predict_stage(item, told, rates, machines, foreseen_by or {})
        told[node.id] = foreseen.summary
    nodes = {item.node.id: item.node for item in planned if item.node.id in stages}
    bounds = [
        _simulate(nodes, {id: getattr(stage.seconds, bound) for id, stage in stages.items()}, stages, machines.capacity, num_jobs)
        for bound in ("value", "low", "high")
    ]
    worker_hours = sum((stage.worker_hours for stage in stages.values()), _NOTHING)
    device_hours = sum((stage.device_hours for stage in stages.values()), _NOTHING)
    money = None
    if prices is not None:
        money = worker_hours * prices.worker_hour + device_hours * prices.device_hour
    return Prediction(
        stages=stages,
        machines=machines,
        seconds=Range(value=bounds[0][0], low=bounds[1][0], high=bounds[2][0]),
        worker_hours=worker_hours,
        device_hours=device_hours,
        size=math.fsum(stage.size for stage in stages.values()),
        money=money,
        currency=prices.currency if prices is not None else None,
        critical=bounds[0][1],
    )


def _summary_of(node: Node, manifest: Manifest) -> Summary | None:
    """None for an artifact of a version that this program cannot read: a run says so if it needs it."""
    try:
        return node.stage.summary.read(manifest)
    except SummaryError:
        return None


def _predict_stage(
    item: PlannedStage,
    told: Mapping[str, Summary | None],
    rates: Rates,
    machines: Machines,
    foreseen_by: Mapping[str, Foresee],
) -> tuple[Foreseen, StagePrediction]:
    node = item.node
    foresee = foreseen_by.get(node.stage.name, node.stage.foresee)
    if foresee is None:
        return Foreseen(), StagePrediction(node=node.id, problem=f"stage {node.stage.name} does not state its work")
    unknown = [id for id in node.inputs.values() if told.get(id) is None]
    if unknown:
        return Foreseen(), StagePrediction(node=node.id, problem=f"depends on {unknown[0]}, which is not known yet")
    try:
        config = with_count(node.config, machines.capacity)
        foreseen = foresee(config, {name: summary for name, id in node.inputs.items() if (summary := told[id]) is not None})
    except UnforeseeableError as error:
        return Foreseen(), StagePrediction(node=node.id, problem=str(error))
    workers = node.stage.workers(config)
    if workers is not None and (room := machines.capacity.room_for(workers)) < workers.count:
        few = getattr(workers, "min_workers", None) or workers.count
        if room < few:
            problem = f"needs {few} workers, and {machines.described} has room for {room}"
            return foreseen, StagePrediction(node=node.id, workers=workers, problem=problem)
    try:
        timed = [(work, rates.rate_of(node.stage.name, work, machines)) for work in foreseen.work if work.count]
    except ValueError as error:
        return foreseen, StagePrediction(node=node.id, workers=workers, problem=str(error))
    return foreseen, _of_works(node, timed, workers, foreseen, _share_left(foreseen, item.parts_done))


def _of_works(
    node: Node, timed: Sequence[tuple[Work, Rate]], workers: Workers | None, foreseen: Foreseen, left: float
) -> StagePrediction:
    """left: share of the work that is left after an interrupted run."""

    def seconds(side: Callable[[Rate], float]) -> float:
        return busy_seconds((left * work.count * side(rate) / work.num_workers, work.is_beside) for work, rate in timed)

    longest = max(timed, key=lambda each: each[0].count * each[1].seconds / each[0].num_workers, default=None)
    start = longest[1].start_seconds if longest is not None else None
    start = start if start is not None else start_seconds([work for work, _ in timed])
    factor = longest[1].factor if longest is not None else 2.0
    found = Range(
        value=start + seconds(lambda rate: rate.seconds),
        low=start / factor + seconds(lambda rate: rate.seconds / rate.factor),
        high=start * factor + seconds(lambda rate: rate.seconds * rate.factor),
    )
    hours = found * (1 / _HOUR)
    return StagePrediction(
        node=node.id,
        seconds=found,
        worker_hours=hours * (workers.count if workers is not None else 1),
        device_hours=hours * (workers.count * workers.gpus_per_worker if workers is not None else 0),
        size=foreseen.size,
        num_measured=longest[1].num_measured if longest is not None else 0,
        workers=workers,
        is_most=any(work.is_most for work, _ in timed),
    )


def _share_left(foreseen: Foreseen, parts_done: int) -> float:
    return max(0.0, 1 - parts_done / foreseen.num_parts) if foreseen.num_parts else 1.0


def _simulate(
    nodes: Mapping[str, Node],
    seconds: Mapping[str, float],
    stages: Mapping[str, StagePrediction],
    capacity: Capacity,
    num_jobs: int | None,
) -> tuple[float, tuple[str, ...]]:
    """The end of the run, and the nodes on its critical path. As the driver does: in order, what is ready and has room starts."""
    room, now, order = Room(capacity), 0.0, count()
    waiting, ended = dict(nodes), set[str]()
    running: list[tuple[float, int, str, Grant]] = []
    started_by: dict[str, str | None] = {}
    last: str | None = None
    while waiting or running:
        for id, node in list(waiting.items()):
            if any(other in nodes and other not in ended for other in node.inputs.values()):
                continue
            if num_jobs is not None and len(running) >= num_jobs:
                break
            grant = room.take(stages[id].workers, 0)
            if grant is None and running:
                continue
            del waiting[id]
            started_by[id] = last
            heapq.heappush(running, (now + seconds[id], next(order), id, grant or Grant()))
        now, _, last, grant = heapq.heappop(running)
        room.give_back(grant)
        ended.add(last)
    path: list[str] = []
    while last is not None:
        path.append(last)
        last = started_by[last]
    return now, tuple(reversed(path))
