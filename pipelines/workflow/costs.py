"""The cost of a result: hours of workers and devices of everything it was made from, and money if prices are given.

The lineage of an artifact is read from the manifests in the store. A reused artifact counts with the cost of making it, once, no
matter how many later stages read it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.artifacts.lineage import read_lineage
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.workflow.stage import Stage
from pipelines.workflow.summary import SummaryError
from pipelines.workflow.work import Prices

_log = logging.getLogger(__name__)

KINDS = ("training", "tokenizing", "generation", "evaluation")
OTHER = "other"  # of a stage that has no kind, or is not known
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class LineageCost:
    """worker_seconds, device_seconds: by kind; all of KINDS, and OTHER if a stage has no kind.

    imported: artifacts that were made elsewhere. Only stages with is_counted_if_imported count for them.   missing: ancestors whose
    cost is not known, because the store has no readable manifest with it. Their own ancestors are unknown, too. Both: "stage/key".
    """

    worker_seconds: Mapping[str, float]
    device_seconds: Mapping[str, float]
    imported: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def lineage_cost(store: ArtifactStore, manifest: Manifest, stages: Mapping[str, Stage]) -> LineageCost:
    """The cost of an artifact and everything it was made from. stages: by name."""
    worker_seconds = dict.fromkeys(KINDS, 0.0)
    device_seconds = dict.fromkeys(KINDS, 0.0)
    imported, missing = [], []
    for name, found in read_lineage(store, manifest).items():
        place = "/".join(name)
        if not isinstance(found, Manifest):
            if found is not None:
                _log.warning("the cost of an artifact is not known: %s", found)
            missing.append(place)
            continue
        stage = stages.get(found.stage)
        try:
            is_imported = stage is not None and stage.summary.read(found).is_from_outside
        except SummaryError as error:
            _log.warning("the cost of an ancestor is not known: %s", error)
            missing.append(place)
            continue
        if is_imported:
            imported.append(place)
        if is_imported and stage is not None and not stage.is_counted_if_imported:
            continue
        if (took := _seconds(found)) is None:
            missing.append(place)
        else:
            kind = (stage.kind if stage is not None else None) or OTHER
            for seconds, value in zip((worker_seconds, device_seconds), took, strict=True):
                seconds[kind] = seconds.get(kind, 0.0) + value
    return LineageCost(
        worker_seconds=worker_seconds,
        device_seconds=device_seconds,
        imported=tuple(sorted(imported)),
        missing=tuple(sorted(missing)),
    )


def cost_metrics(
    store: ArtifactStore, manifest: Manifest, stages: Mapping[str, Stage], prices: Prices | None = None
) -> dict[str, float]:
    """Hours by kind and in total, as metrics: cost/training_device_hours, cost/training_worker_hours, cost/total_..., and so on.

    cost/imported_artifacts and cost/missing_artifacts count what the sums leave out. If the second is not 0, the sums are lower
    bounds. cost/total_money is in the currency of the prices, and exists only if prices are given.
    """
    cost = lineage_cost(store, manifest, stages)
    worker_hours = {kind: seconds / _SECONDS_PER_HOUR for kind, seconds in cost.worker_seconds.items()}
    device_hours = {kind: seconds / _SECONDS_PER_HOUR for kind, seconds in cost.device_seconds.items()}
    worker_hours["total"], device_hours["total"] = sum(worker_hours.values()), sum(device_hours.values())
    metrics = {f"cost/{kind}_device_hours": hours for kind, hours in device_hours.items()}
    metrics |= {f"cost/{kind}_worker_hours": hours for kind, hours in worker_hours.items()}
    metrics |= {"cost/imported_artifacts": float(len(cost.imported)), "cost/missing_artifacts": float(len(cost.missing))}
    if prices is not None:
        metrics["cost/total_money"] = prices.of(worker_hours["total"], device_hours["total"])
    return metrics


def _seconds(manifest: Manifest) -> tuple[float, float] | None:
    """Worker- and device-seconds; None if the manifest has no valid numbers. Others may write to a shared store."""
    values = [manifest.provenance.get(name) for name in ("worker_seconds", "device_seconds")]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value) and value >= 0]
    return (numbers[0], numbers[1]) if len(numbers) == len(values) else None
