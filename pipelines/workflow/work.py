"""What a stage has to do, in numbers: what a config asks for, and what an artifact took; prices of hours.

A stage states its work before it runs, for predictions, and again with the seconds it took, which its manifest keeps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enat.config import check_in
from pipelines.artifacts.manifest import Manifest
from pipelines.cluster.resources import Workers
from pipelines.workflow.summary import Summary

WORK_TAG = "enat.work"  # of a tracking run
_WORK, _PREDICTED = "work", "predicted_seconds"  # in the provenance of a manifest


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of hours."""

    device_hour: float = 0.0
    """Price of one accelerator. Unit: currency per hour."""
    worker_hour: float = 0.0
    """Price of one worker without its accelerator (CPUs, memory). Unit: currency per hour."""
    currency: str = "USD"
    """Three letters, as in ISO 4217."""

    def __post_init__(self) -> None:
        check_in(self, "[0, inf)", "device_hour", "worker_hour")
        if not re.fullmatch(r"[A-Z]{3}", self.currency):
            raise ValueError(f"currency is {self.currency!r}; give three capital letters, such as USD or EUR")
        if not self.device_hour and not self.worker_hour:
            raise ValueError("neither device_hour nor worker_hour is given; give at least one, or leave prices out")

    def of(self, worker_hours: float, device_hours: float) -> float:
        return worker_hours * self.worker_hour + device_hours * self.device_hour


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of work of a stage.

    count: of units, such as images.   macs: multiply-accumulates of one unit; 0 if its time is not that of matrix products.
    cpu_seconds: that one unit takes on one CPU, for work without products. An assumption, used until it has been measured.
    workers: that share the work; None for the driver.   num_pieces: so many workers at most get some.
    on_cpus: whether it uses CPUs only, also if the workers have GPUs.
    precision: of products.   batch_size: units that are computed together.
    num_blocks: transformer blocks that one unit launches, its share of a batch. On a GPU, a launch takes time of its own.
    synced_bytes: that the workers exchange for one unit.
    is_beside: whether it is done at the same time as the work before it.
    is_most: whether the numbers are upper bounds, because how much there is to do is only known once it is done.
    """

    name: str
    count: float
    macs: float = 0.0
    cpu_seconds: float = 0.0
    workers: Workers | None = None
    num_pieces: int | None = None
    on_cpus: bool = False
    precision: str = "fp32"
    batch_size: int = 1
    num_blocks: float = 0.0
    synced_bytes: float = 0.0
    is_beside: bool = False
    is_most: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.workers is None or self.on_cpus else self.workers.device

    @property
    def cpus(self) -> float:
        """That one worker uses."""
        return 1.0 if self.workers is None or self.on_cpus else self.workers.cpus_per_worker

    @property
    def num_workers(self) -> int:
        """That get some of the work, at least 1."""
        return max(1, min(1 if self.workers is None else self.workers.count, self.num_pieces or 2**31))


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a stage will make of its config and of what its inputs tell.

    summary: what it will tell later stages. What only the work itself shows is empty.   work: in the order in which it is done.
    size: of its files in bytes, roughly.   num_parts: that its work is committed in; 0 if it is committed as a whole.
    """

    summary: Summary | None = None
    work: Sequence[Work] = ()
    size: float = 0.0
    num_parts: int = 0


class UnforeseeableError(ValueError):
    """A sentence about what must be known before the work of a stage can be stated."""


@dataclass(frozen=True)
class Done:
    """Work with the seconds that it took, summed over workers. num_workers: that took part, on average."""

    work: Work
    worker_seconds: float
    num_workers: float


@dataclass(frozen=True, kw_only=True)
class MeasuredWork:
    """Work of an artifact, as its manifest keeps it.

    hardware: product name of the devices.   cpus: of each worker.   seconds: summed over workers.
    start_seconds: of the stage, in which none of its work was done: processes started, models were loaded, files were committed.
    """

    stage: str
    name: str
    hardware: str
    cpus: float
    count: float
    macs: float
    precision: str
    batch_size: int
    seconds: float
    num_workers: float
    start_seconds: float


def to_provenance(
    done: Iterable[Done], seconds: float, hardware: Mapping[str, str], predicted: Mapping[str, float] | None
) -> dict[str, Any]:
    """For a manifest. seconds: of the stage.   hardware: product name by "cpu" and "cuda".   predicted: see read_prediction."""
    rows = [
        {
            "name": each.work.name,
            "hardware": hardware.get(each.work.device, ""),
            "cpus": each.work.cpus,
            "count": each.work.count,
            "macs": each.work.macs,
            "precision": each.work.precision,
            "batch_size": each.work.batch_size,
            "seconds": each.worker_seconds,
            "num_workers": each.num_workers,
        }
        for each in done
        if each.work.count > 0
    ]
    busy = busy_seconds([(each.worker_seconds / each.num_workers, each.work.is_beside) for each in done])
    found: dict[str, Any] = {_WORK: rows, "start_seconds": max(0.0, seconds - busy)}
    return found if predicted is None else found | {_PREDICTED: dict(predicted)}


def read_prediction(provenance: Mapping[str, Any]) -> dict[str, float] | None:
    """The seconds that were predicted before the run: value, low and high. None if there was no valid prediction."""
    found = provenance.get(_PREDICTED)
    try:
        return {name: float(found[name]) for name in ("value", "low", "high")} if found is not None else None
    except (TypeError, KeyError, ValueError):
        return None


def busy_seconds(works: Iterable[tuple[float, bool]]) -> float:
    """Seconds of works (seconds, is_beside), one after the other except for those that are done beside the one before them."""
    groups: list[float] = []
    for seconds, is_beside in works:
        if is_beside and groups:
            groups[-1] = max(groups[-1], seconds)
        else:
            groups.append(seconds)
    return math.fsum(groups)


def measured_work(stage: str, provenance: Mapping[str, Any]) -> list[MeasuredWork]:
    """What a manifest keeps; nothing if it is older, or not valid: others may write to a shared store."""
    found = []
    try:
        for row in provenance.get(_WORK, ()):
            each = MeasuredWork(stage=stage, start_seconds=provenance["start_seconds"], **row)
            numbers = (each.count, each.seconds, each.num_workers, each.cpus, each.batch_size)
            if (
                isinstance(each.hardware, str)
                and all(0 < float(value) < math.inf for value in numbers)
                and all(0 <= float(value) < math.inf for value in (each.macs, each.start_seconds))
            ):
                found.append(each)
    except (TypeError, KeyError, ValueError, AttributeError):
        return []
    return found


def work_of(manifest: Manifest) -> list[MeasuredWork]:
    return measured_work(manifest.stage, manifest.provenance)


def to_tag(manifest: Manifest) -> str | None:
    """What measured_work reads, as the text of a tag; None if there is nothing."""
    kept = {name: manifest.provenance[name] for name in (_WORK, "start_seconds") if name in manifest.provenance}
    return json.dumps(kept) if kept.get(_WORK) else None
