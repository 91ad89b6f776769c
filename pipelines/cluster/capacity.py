"""Whether a cluster has the resources for the stages of a run. Each worker needs its CPUs and GPUs on one node.

Only current nodes count. Nodes that an autoscaler could add are not visible; the variable AUTOSCALER states that there is one.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.cluster.resources import ALL, Execution, Workers

if TYPE_CHECKING:
    from rich.console import Console

ConfigT = TypeVar("ConfigT")
AUTOSCALER = "ENAT_CLUSTER_GROWS"  # set to 1 if the cluster adds nodes on demand: stages then wait for nodes
FEEDERS_OF_GPU = 8  # CPUs: a GPU encodes some 1,500 images/s of 256 pixels, a CPU decodes 200 to 250
_TOLERANCE = 1e-9  # for sums such as three times a third of a CPU


@dataclass(frozen=True)
class Capacity:
    """nodes: resources of each live node, for example {"CPU": 8.0, "GPU": 1.0}, in use or not."""

    nodes: tuple[Mapping[str, float], ...]

    def total(self, resource: str) -> float:
        return math.fsum(node.get(resource, 0.0) for node in self.nodes)

    def room_for(self, workers: Workers) -> int:
        """How many of the workers fit, each on one node."""
        asked = {name: each for name, each in _each(workers).items() if each > 0}
        return sum(min(int(node.get(name, 0.0) / each + _TOLERANCE) for name, each in asked.items()) for node in self.nodes)

    def has_room_beside(self, workers: Workers, other: Workers) -> bool:
        """Whether one of the other workers fits on a node beside all of the workers."""
        asked = _each(other)
        for number, node in enumerate(self.nodes):
            left = {name: node.get(name, 0.0) - each for name, each in asked.items()}
            rest = Capacity((*self.nodes[:number], {**node, **left}, *self.nodes[number + 1 :]))
            if min(left.values()) > -_TOLERANCE and rest.room_for(workers) >= workers.count:
                return True
        return False

    def describe(self) -> str:
        count = len(self.nodes)
        return f"{self.total('CPU'):g} CPUs and {self.total('GPU'):g} GPUs on {count} node{'s' if count != 1 else ''}"


def with_count(config: ConfigT, capacity: Capacity) -> ConfigT:
    """A stage's config whose workers have a number, where it says "all": as many as the cluster has room for.

    A config with an attribute `most_workers` gets at most so many.
    """
    workers = getattr(config, "execution", None)
    if not isinstance(workers, Workers) or workers.num_workers != ALL:
        return config
    count = min(capacity.room_for(workers), getattr(config, "most_workers", sys.maxsize))
    return replace(config, execution=replace(workers, num_workers=max(1, count)))  # type: ignore[type-var]  # with that field


@dataclass(frozen=True)
class Grant:
    """What a stage may use of a cluster that it shares with other stages.

    taken: (number of the node, resources).   spare_cpus: CPUs for tasks that feed its workers; None is all that the cluster has.
    """

    taken: tuple[tuple[int, Mapping[str, float]], ...] = ()
    spare_cpus: int | None = None


class Room:
    """What is left of a cluster beside the stages that hold a grant. Ray may place workers elsewhere, which only delays them."""

    def __init__(self, capacity: Capacity) -> None:
        self._free = [dict(node) for node in capacity.nodes]

    def take(self, workers: Workers | None, num_others: int) -> Grant | None:
        """A grant for these workers and for CPUs that feed them, or None if the workers do not fit now.

        Workers of images (Execution) are fed, by up to one CPU each, and those with a GPU by up to eight, if CPUs are left.
        num_others: stages that could start as well, for which CPUs are left.
        """
        if workers is None:
            return Grant(spare_cpus=0)
        fewest, taken = getattr(workers, "min_workers", None) or workers.count, list[tuple[int, Mapping[str, float]]]()
        for _ in range(workers.count):
            if (place := self._place_of(workers)) is None:
                break
            taken.append((place, _each(workers)))
            self._add(*taken[-1], sign=-1)
        if len(taken) < fewest:
            self.give_back(Grant(tuple(taken)))
            return None
        spare = 0
        if isinstance(workers, Execution):
            wanted = getattr(workers, "num_decoders", None) or len(taken) * (FEEDERS_OF_GPU if workers.gpus_per_worker else 1)
            share = sum(int(node.get("CPU", 0.0) + _TOLERANCE) for node in self._free) // (num_others + 1)
            while spare < min(wanted, share):
                place = max(range(len(self._free)), key=lambda number: self._free[number].get("CPU", 0.0))
                taken.append((place, {"CPU": 1.0}))
                self._add(*taken[-1], sign=-1)
                spare += 1
        return Grant(tuple(taken), spare)

    def give_back(self, grant: Grant) -> None:
        for place, resources in grant.taken:
            self._add(place, resources, sign=1)

    def _place_of(self, workers: Workers) -> int | None:
        """The fullest node that has what one worker needs."""
        fitting = [
            number
            for number, node in enumerate(self._free)
            if all(node.get(name, 0.0) + _TOLERANCE >= each for name, each in _each(workers).items())
        ]
        return min(
            fitting, key=lambda number: (self._free[number].get("GPU", 0.0), self._free[number].get("CPU", 0.0)), default=None
        )

    def _add(self, place: int, resources: Mapping[str, float], *, sign: int) -> None:
        for name, each in resources.items():
            if each:
                self._free[place][name] = self._free[place].get(name, 0.0) + sign * each


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """The workers that a stage requests. node: its id, for example train@small."""

    node: str
    workers: Workers

    @property
    def min_workers(self) -> int:
        """The smallest sufficient number. Only elastic training can start with fewer than num_workers."""
        if self.workers.num_workers == ALL:
            return 1
        return getattr(self.workers, "min_workers", None) or self.workers.count

    @property
    def section(self) -> str:
        """The section of the config that sets it."""
        return f"{self.node.partition('@')[0].partition('/')[0]}.execution"

    def describe(self) -> str:
        each = f"{self.workers.cpus_per_worker:g} CPU" + (f" + {self.workers.gpus_per_worker:g} GPU" if _gpus(self) else "")
        count = f"{self.min_workers} to " if self.workers.num_workers not in {self.min_workers, ALL} else ""
        return f"{count}{self.workers.num_workers} x {each}"


@dataclass(frozen=True)
class Verdict:
    """room: workers that fit into the cluster if nothing else runs."""

    request: ResourceRequest
    room: int
    problem: str | None

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def is_all(self) -> bool:
        """Whether all workers fit, not only enough to start."""
        wanted = self.request.workers.num_workers
        return self.room >= (self.request.min_workers if wanted == ALL else self.request.workers.count)


def judge(request: ResourceRequest, capacity: Capacity) -> Verdict:
    """Whether the workers fit, or at least the smallest sufficient number."""
    room = capacity.room_for(request.workers)
    return Verdict(request, room, None if room >= request.min_workers else _problem(request, capacity, room))


def has_autoscaler() -> bool:
    return os.environ.get(AUTOSCALER, "0") == "1"


def _problem(request: ResourceRequest, capacity: Capacity, room: int) -> str:
    for resource, each in _each(request.workers).items():
        wanted, have = each * request.min_workers, capacity.total(resource)
        if wanted > have + _TOLERANCE:
            return (
                f"{request.section} asks for {wanted:g} {resource}s ({request.min_workers} workers), but the cluster has {have:g}; "
                f"lower num_workers or {resource.lower()}s_per_worker"
            )
    own = f"{request.workers.cpus_per_worker:g} CPUs" + (f" and {request.workers.gpus_per_worker:g} GPUs" if _gpus(request) else "")
    return (
        f"{request.section} asks for {request.min_workers} workers with {own} each, but the cluster's nodes have room for {room}; "
        "a worker needs all of its own on one node, so lower num_workers or what each takes"
    )


def _each(workers: Workers) -> dict[str, float]:
    return {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}


def _gpus(request: ResourceRequest) -> bool:
    return request.workers.gpus_per_worker > 0


def to_json(verdict: Verdict) -> dict[str, Any]:
    workers = verdict.request.workers
    return {
        "num_workers": workers.num_workers,
        "min_workers": verdict.request.min_workers,
        "cpus_per_worker": workers.cpus_per_worker,
        "gpus_per_worker": workers.gpus_per_worker,
        "room_now": verdict.room,
        "fits": verdict.fits,
        "problem": verdict.problem,
    }


def show(verdicts: Sequence[Verdict], capacity: Capacity, console: Console) -> None:
    """Print one line per stage, in 80 columns for usual names. Names of stages stay in one piece."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "workers", "room now"):
        table.add_column(column, no_wrap=column == "stage")
    for verdict in verdicts:
        enough = "[green]enough[/]" if verdict.is_all else "[yellow]enough to start[/]"
        table.add_row(
            verdict.request.node, verdict.request.describe(), f"{verdict.room} {enough if verdict.fits else '[red]too little[/]'}"
        )
    console.print(table)
    console.print(f"\nthe cluster now has {capacity.describe()}", highlight=False)
    for problem in dict.fromkeys(verdict.problem for verdict in verdicts if verdict.problem):
        console.print(f"[red]![/] {problem}", highlight=False)
