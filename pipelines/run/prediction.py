"""What a run will take: the machines, the rates and the plan put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection, hardware
from pipelines.cluster.capacity import Capacity, has_autoscaler
from pipelines.cluster.resources import ALL
from pipelines.data.sources.config import DatasetConfig
from pipelines.prediction.predict import Foresee, Prediction, predict
from pipelines.prediction.rates import read_rates
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.stages import dataset
from pipelines.storage.base import StorageError
from pipelines.tracking import run as tracking
from pipelines.workflow.stage import SCRATCH, PlannedStage
from pipelines.workflow.work import Foreseen

_log = logging.getLogger(__name__)
_SMALL_SECONDS = 60.0  # of stages, in which the start of Ray and its workers would be a large part
_CLASSES, _CAPTIONS_PER_IMAGE = 1000, 5  # of ImageNet and of COCO


def machines_of(run: RunConfig, described: str | None, capacity: Capacity | None) -> hardware.Machines | None:
    """Those of a description, of a cluster with this capacity, or this machine. None if the run names another cluster.

    Raises ValueError for a description that cannot be read.
    """
    if described is not None:
        return hardware.parse_cluster(described)
    if capacity is not None:
        return hardware.of_cluster(capacity)
    if connection.address_of(run.cluster) != connection.LOCAL:
        return None
    return hardware.of_this_machine(run.cluster.num_cpus)


def unread_plan(run: RunConfig) -> list[PlannedStage]:
    """All stages of a run, without a look at datasets, weights and the store."""
    return [PlannedStage(node, None, None) for node in graph.build(run, graph.Unread())]


def of_plan(
    run: RunConfig,
    planned: Sequence[PlannedStage],
    store: ArtifactStore,
    machines: hardware.Machines,
    *,
    num_jobs: int | None,
    foreseen_by: Mapping[str, Foresee] | None = None,
) -> Prediction:
    """Rates come from the run's store and from its tracked runs."""
    names = {item.node.stage.name for item in planned if not item.is_reused}
    uri = tracking.resolve_uri(run.tracking, Path(run.workspace)) if run.tracking.enabled else None
    rates = read_rates(store, names, uri)
    return predict(planned, rates, machines, prices=run.prices, num_jobs=num_jobs, foreseen_by=foreseen_by)


def before_run(
    run: RunConfig, planned: Sequence[PlannedStage], store: ArtifactStore, connect: Callable[[], None], num_jobs: int | None
) -> Prediction | None:
    """None if nothing is to be computed, or if it cannot be told: that does not stop the run. Connects to a running cluster."""
    if all(item.is_reused for item in planned):
        return None
    try:
        machines = machines_of(run, None, None)
        if machines is None:
            connect()
            machines = (hardware.grown() if has_autoscaler() else None) or connection.machines()
        return of_plan(run, planned, store, machines, num_jobs=num_jobs)
    except (ValueError, OSError, StorageError) as error:
        _log.info("what the run will take is not known (%s)", error)
        return None


def does_without_ray(
    run: RunConfig,
    planned: Sequence[PlannedStage],
    store: ArtifactStore,
    *,
    given: Mapping[str, Manifest] | None = None,
    num_alike: int = 1,
) -> bool:
    """Whether a run on this machine is so small that it is faster without Ray, whose processes take seconds to start.

    Only if all its stages can do without Ray, and if their rates were measured. given: inputs that no stage of the plan makes, by
    id.   num_alike: plans like this one that are to be run in turn."""
    nodes = [item.node for item in planned if not item.is_reused]
    workers = [each for node in nodes if (each := node.stage.workers(node.config)) is not None]
    if not workers or connection.is_connected() or connection.address_of(run.cluster) != connection.LOCAL:
        return False
    if any(each.gpus_per_worker or each.num_workers == ALL for each in workers) or not all(n.stage.does_without_ray for n in nodes):
        return False
    stages = graph.stages()
    try:
        summaries = {
            id: stages[manifest.stage.removeprefix(SCRATCH)].summary.read(manifest) for id, manifest in (given or {}).items()
        }
        rates = read_rates(store, {node.stage.name.removeprefix(SCRATCH) for node in nodes})
        machine = hardware.of_this_machine(run.cluster.num_cpus)
        prediction = predict([*map(_unscratched, planned)], rates, machine, num_jobs=1, given=summaries)
    except (ValueError, OSError, StorageError):
        return False
    with_workers = [stage for stage in prediction.stages.values() if stage.workers is not None]
    is_measured = all(stage.problem is None and stage.num_measured for stage in with_workers)
    return is_measured and num_alike * sum(stage.seconds.value for stage in with_workers) < _SMALL_SECONDS


def _unscratched(item: PlannedStage) -> PlannedStage:
    """Under the name of the stage whose artifacts it computes again, which has rates."""
    stage = item.node.stage
    return replace(item, node=replace(item.node, stage=replace(stage, name=stage.name.removeprefix(SCRATCH))))


def foreseen_by(num_images: int | None, num_classes: int | None, num_captions: int | None) -> dict[str, Foresee]:
    """For predict: stage dataset with these numbers of images instead of those of its files. Nothing without num_images."""
    if num_images is None:
        return {}
    return {dataset.STAGE.name: partial(_dataset, num_images=num_images, num_classes=num_classes, num_captions=num_captions)}


def _dataset(
    config: DatasetConfig, inputs: Mapping[str, Any], *, num_images: int, num_classes: int | None, num_captions: int | None
) -> Foreseen:
    has_captions = config.captions is not None or config.caption_column is not None
    return dataset.foresee_images(
        config,
        num_images=num_images,
        num_classes=num_classes if num_classes is not None else config.num_classes or _CLASSES,
        num_captions=num_captions if num_captions is not None else _CAPTIONS_PER_IMAGE * num_images * has_captions,
    )
