"""Whether a cluster has the resources for the stages of a run. Each worker needs its CPUs and GPUs on one node.

Only current nodes count. Nodes that an autoscaler could add are not visible; the variable AUTOSCALER states that there is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.cluster.resources import Workers

AUTOSCALER = "ENAT_CLUSTER_GROWS"  # set to 1 if the cluster adds nodes on demand: stages then wait for nodes
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
            if min(left.values()) > -_TOLERANCE and rest.room_for(workers) >= workers.num_workers:
                return True
        return False

    def describe(self) -> str:
        count = len(self.nodes)
        return f"{self.total('CPU'):g} CPUs and {self.total('GPU'):g} GPUs on {count} node{'s' if count != 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """The workers that a stage requests. node: its id, for example train@small."""

    node: str
    workers: Workers

    @property
    def min_workers(self) -> int:
        """The smallest sufficient number. Only elastic training can start with fewer than num_workers."""
        return getattr(self.workers, "min_workers", None) or self.workers.num_workers

    @property
    def section(self) -> str:
        """The section of the config that sets it."""
        return f"{self.node.partition('@')[0].partition('/')[0]}.execution"

    def describe(self) -> str:
        each = f"{self.workers.cpus_per_worker:g} CPU" + (f" + {self.workers.gpus_per_worker:g} GPU" if _gpus(self) else "")
        count = f"{self.min_workers} to " if self.min_workers != self.workers.num_workers else ""
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
    """Print one line per stage."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "workers", "the cluster now has room for"):
        table.add_column(column)
    for verdict in verdicts:
        enough = "[green]enough[/]" if verdict.room >= verdict.request.workers.num_workers else "[yellow]enough to start[/]"
        table.add_row(
            verdict.request.node, verdict.request.describe(), f"{verdict.room} {enough if verdict.fits else '[red]too little[/]'}"
        )
    console.print(table)
    console.print(f"\nthe cluster now has {capacity.describe()}", highlight=False)
    for problem in dict.fromkeys(verdict.problem for verdict in verdicts if verdict.problem):
        console.print(f"[red]![/] {problem}", highlight=False)
