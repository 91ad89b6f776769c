"""How long one unit of work takes: as it was measured with earlier artifacts, or else computed from the peak of the hardware.

Measured: of the earlier work of the same stage and name on the same hardware that is most like the new one, in proportion to its
MACs. Computed: MACs over a share of the published peak of a GPU, or of the peak of this machine's matrix products, but at least the
time to launch a GPU's kernels; and the bytes that workers exchange, over the bandwidth between them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster.hardware import CPU, Gpu, Machines, known_gpus, short_name
from pipelines.storage.base import StorageError
from pipelines.tracking import search
from pipelines.workflow.work import WORK_TAG, MeasuredWork, Work, measured_work, work_of

_log = logging.getLogger(__name__)

_READ_AT_MOST = 48  # artifacts of a stage
_NEWEST = 5  # of equally similar measurements that a rate is the median of
_EQUALLY_SIMILAR = 0.05
_SAME_WORK = 1.15  # factor of the range around a rate measured with the same work: what two runs of the same differ by
_COMPUTED = 2.0  # factor of the range around a computed rate
_WIDEST = 4.0
_TOO_FAR = 2.8  # distance from which on a computed rate of products is not less certain
_OTHER_PRECISION = 1.5  # distances of work that differs
_OTHER_CPUS = 0.7
_OTHER_HARDWARE = 1.0  # of CPUs of a cluster that are not known

# Shares of the peak that computed rates assume, by precision on GPUs: convolutions and attention at low precision are bound by
# memory, not by products. Those of large models; small ones are bound by the launches.
_SHARE_OF_GPU = {"fp32": 0.6, "tf32": 0.4, "bf16": 0.35, "fp16": 0.35}
_SHARE_OF_CPU = 0.3
_GPU_BLOCK_SECONDS = 0.3e-3  # to launch the kernels of one transformer block
_LINK_SHARE = 0.7  # of a bandwidth, that an all-reduce reaches
_CPU_PEAK = 50e9  # FLOP/s of a core that cannot be measured from here
_START_SECONDS = {True: 5.0, False: 0.5}  # of a stage with and without workers


@dataclass(frozen=True)
class Rate:
    """seconds: of one worker for one unit.   factor: the true one is expected within seconds/factor .. seconds*factor.

    num_measured: artifacts that it was measured with; 0 if it is computed.   start_seconds: of the stage, None if not measured.
    """

    seconds: float
    factor: float
    num_measured: int = 0
    start_seconds: float | None = None


class Rates:
    """What earlier artifacts measured. by_stage: the work of artifacts by stage, the newest first."""

    def __init__(self, by_stage: Mapping[str, Sequence[MeasuredWork]]) -> None:
        self._by_stage = by_stage

    def rate_of(self, stage: str, work: Work, machines: Machines) -> Rate:
        return self._measured(stage, work, machines) or computed_rate(work, machines)

    def _measured(self, stage: str, work: Work, machines: Machines) -> Rate | None:
        found = sorted(
            (
                (distance, number, each)
                for number, each in enumerate(self._by_stage.get(stage, ()))
                if each.name == work.name and (distance := _distance(each, work, machines)) is not None
            ),
            key=lambda item: item[:2],
        )
        if not found or (work.macs and found[0][0] > _TOO_FAR):
            return None
        alike = [item for item in found if item[0] <= found[0][0] + _EQUALLY_SIMILAR][:_NEWEST]
        each_seconds = [_seconds_for(each, work) for _, _, each in alike]
        middle = median(each_seconds)
        spread = max(max(each_seconds) / middle, middle / min(each_seconds))
        factor = min(_WIDEST, max(_SAME_WORK, spread) * math.exp(alike[0][0] / 4))
        return Rate(middle, factor, len(alike), median(each.start_seconds for _, _, each in alike))


def _seconds_for(measured: MeasuredWork, work: Work) -> float:
    """Of one worker for one unit of other work, in proportion to MACs and to the CPUs of a worker."""
    seconds = measured.seconds / measured.count
    if work.macs and measured.macs:
        seconds *= work.macs / measured.macs
    return seconds * measured.cpus / work.cpus if work.device == CPU else seconds


def _distance(measured: MeasuredWork, work: Work, machines: Machines) -> float | None:
    """How different earlier work was, 0 for the same; None if it was done on other hardware."""
    hardware = machines.name_of(work.device)
    is_same = hardware == (measured.hardware if work.device == CPU else short_name(measured.hardware))
    if not is_same and not (work.device == CPU and hardware is None):
        return None
    if bool(work.macs) != bool(measured.macs):
        return None
    distance = 0.0 if is_same else _OTHER_HARDWARE
    distance += abs(math.log(work.macs / measured.macs)) if work.macs else 0.0
    distance += 0.2 * abs(math.log2(work.batch_size / measured.batch_size))
    distance += 0.1 * abs(math.log2(max(1.0, work.count) / max(1.0, measured.count)))
    distance += 0.2 * abs(math.log2(work.num_workers / measured.num_workers))
    distance += _OTHER_PRECISION * (work.precision != measured.precision)
    return distance + _OTHER_CPUS * (work.cpus != measured.cpus)


def computed_rate(work: Work, machines: Machines) -> Rate:
    """From published peaks of the hardware and shares of them that are assumed."""
    if work.device == CPU:
        peak = cpu_peak() if machines.cpu is not None else _CPU_PEAK
        return Rate(2 * work.macs / (peak * work.cpus * _SHARE_OF_CPU) + work.cpu_seconds / work.cpus, _COMPUTED)
    gpu = known_gpus().get(machines.gpu or "")
    if gpu is None:
        raise ValueError(
            f"the speed of {machines.gpu or 'the GPUs'} is not known; give --cluster with a known one, such as 1x8xH200"
        )
    peak = 1e12 * gpu.tflops[work.precision]
    seconds = max(2 * work.macs / (peak * _SHARE_OF_GPU[work.precision]), work.num_blocks * _GPU_BLOCK_SECONDS)
    return Rate(seconds + _exchange_seconds(work, machines, gpu) + work.cpu_seconds, _COMPUTED)


def _exchange_seconds(work: Work, machines: Machines, gpu: Gpu) -> float:
    """An all-reduce among the workers, in rings, inside nodes and between them, none of it hidden behind other work."""
    if not work.synced_bytes or work.num_workers == 1:
        return 0.0
    per_node = max(1, int(max(node.get("GPU", 0.0) for node in machines.capacity.nodes)))
    volume = 2 * work.synced_bytes * work.num_workers * (1 - 1 / work.num_workers)  # a unit is computed by one of the workers
    inside, between = gpu.link_gb_per_second, min(gpu.link_gb_per_second, per_node * gpu.network_gb_per_second)
    return volume / (1e9 * _LINK_SHARE * (inside if work.num_workers <= per_node else between))


def start_seconds(works: Sequence[Work]) -> float:
    """Of a stage that was never measured."""
    return _START_SECONDS[any(work.workers is not None for work in works)]


@cache
def cpu_peak() -> float:
    """FLOP/s of one core of this machine in matrix products of float32."""
    import numpy as np

    size = 768
    one = np.ones((size, size), np.float32)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter(), time.process_time()
        one @ one
        # Of all threads that numpy used: their number is not known here.
        best = min(best, max(time.perf_counter() - started[0], time.process_time() - started[1]))
    return 2 * size**3 / best


def read_rates(store: ArtifactStore, stages: Iterable[str], tracking_uri: str | None = None) -> Rates:
    """From the manifests of a store, of each stage a sample that is spread evenly if there are many. Of stages that it has none of,
    from the runs at an MLflow URI.
    """
    by_stage: dict[str, list[MeasuredWork]] = {}
    wanted = sorted(set(stages))
    try:
        for stage in wanted:
            keys = store.keys(stage)
            names = [(stage, key) for key in keys[:: -(-len(keys) // _READ_AT_MOST)]] if keys else []
            found = [each for each in store.read_manifests(names) if isinstance(each, Manifest)]
            found.sort(key=lambda manifest: str(manifest.provenance.get("created", "")), reverse=True)
            by_stage[stage] = [work for manifest in found for work in work_of(manifest)]
    except (OSError, StorageError) as error:  # a prediction may not stop a command
        _log.warning("earlier measurements could not be read (%s)", error)
    missing = [stage for stage in wanted if not by_stage.get(stage)]
    if missing and tracking_uri is not None and _exists(tracking_uri):
        by_stage |= _tracked(tracking_uri, missing)
    return Rates(by_stage)


def _exists(uri: str) -> bool:
    """Whether there may be runs: importing MLflow to learn that there is no database takes seconds."""
    path = uri.removeprefix("sqlite:///")
    return path == uri or Path(path).is_file()


def _tracked(uri: str, stages: Sequence[str]) -> dict[str, list[MeasuredWork]]:
    """From the newest runs of the stages."""
    found: dict[str, list[MeasuredWork]] = {}
    try:
        ids = [*search.experiments(uri).values()]
        for stage in stages:
            chosen = f"tags.`enat.stage` = '{stage}' AND tags.`{WORK_TAG}` LIKE '%hardware%'"
            runs = search.search_runs(uri, ids, chosen, limit=_READ_AT_MOST)
            found[stage] = [work for run in runs for work in measured_work(stage, _parsed(run.tags[WORK_TAG]))]
    except (ValueError, search.TrackingError) as error:
        _log.info("measurements of tracked runs could not be read (%s)", error)
    return found


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
