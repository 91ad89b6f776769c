"""Ray Data jobs over planned rows: each record arrives as soon as it is done, and lost workers are replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from pipelines.cluster import connection, local, tasks
from pipelines.cluster.capacity import has_autoscaler
from pipelines.cluster.resources import Execution

if TYPE_CHECKING:
    import ray.data

_log = logging.getLogger(__name__)
_MAX_FAILURES = 3
_FEW_ROWS = 8  # for each worker


def map_by_workers(
    dataset: ray.data.Dataset,
    worker: type,
    arguments: tuple[Any, ...],
    execution: Execution,
    num_rows: int,
    *,
    is_alone: bool = False,
) -> ray.data.Dataset:
    """Map single rows by `worker(*arguments)`, on a pool that is not larger than the work.

    is_alone: whether no other stage uses the cluster meanwhile. Few rows on CPUs are then mapped by tasks, which Ray gives to
    processes that have imported torch for an earlier stage. An actor always has a process of its own, which takes seconds to start.
    """
    import ray.data

    num_workers = min(execution.count, num_rows)
    if is_alone and not execution.gpus_per_worker and num_rows <= _FEW_ROWS * num_workers:
        kept = _KeptWorker(uuid4().hex, worker, arguments)
        tasks = ray.data.TaskPoolStrategy(size=num_workers)
        return dataset.map_batches(kept, batch_size=1, compute=tasks, max_retries=0, **execution.resources)
    return dataset.map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=2),
        max_restarts=0,  # stream_records restarts the job with the missing rows, which also covers lost objects and nodes
        **execution.resources,
    )


@dataclass(frozen=True)
class _KeptWorker:
    """Calls a worker that its process keeps from row to row. job: another one for each job."""

    job: str
    worker: type
    arguments: tuple[Any, ...]

    def __call__(self, batch: dict[str, Any]) -> Any:
        if self.job not in _kept:
            _kept.clear()  # first, because two models may not fit
            _kept[self.job] = self.worker(*self.arguments)
        return _kept[self.job](batch)


_kept: dict[str, Any] = {}


def feeding_tasks(execution: Execution, num_tasks: int | None = None, spare_cpus: int | None = None) -> dict[str, Any]:
    """Arguments of map_batches for tasks that prepare rows for an actor pool: one CPU each, and num_tasks at once if given.

    spare_cpus: CPUs beside those of the pool that the tasks may use; None is all that the cluster has.
    If the pool uses all, the tasks share its CPUs, and there are at most as many tasks as workers. A task that requested a CPU of
    its own would wait forever, and the pool would wait for the task. A cluster that adds nodes on demand adds them for tasks that
    request a CPU, and runs those that request none on its head, which has none.
    """
    import ray.data

    if spare_cpus is None:
        spare = ray.cluster_resources().get("CPU", 0) - execution.cpus_per_worker * execution.count
    else:
        spare, num_tasks = spare_cpus, min(num_tasks or spare_cpus, spare_cpus) or num_tasks
    if spare >= 1 or has_autoscaler():
        return {"batch_size": 1, "num_cpus": 1, "compute": ray.data.TaskPoolStrategy(size=num_tasks)}
    return {"batch_size": 1, "num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=num_tasks or execution.count)}


def with_memory_limit(dataset: ray.data.Dataset, object_store_bytes: int) -> ray.data.Dataset:
    """Limit the data that waits between operators. By default, Ray Data fills half of the object store of the cluster."""
    import ray.data

    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=object_store_bytes)
    return dataset


@cache
def _kill_workers_of_failed_jobs() -> None:
    """Ray Data 2.60 only drops its references to the actors of a failed job. Those to which its error or a call in flight still
    refers would keep their CPUs, and a job beside it would wait for them for as long as the error is kept."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    shutdown = StreamingExecutor.shutdown

    def shut_down(self: Any, force: bool, exception: Exception | None = None) -> None:
        shutdown(self, force=force or exception is not None, exception=exception)

    StreamingExecutor.shutdown = shut_down


def stream_records(
    rows: Sequence[dict[str, Any]],
    job: Callable[[list[dict[str, Any]]], ray.data.Dataset],
    id: str = "part",
    in_process: Callable[[], Callable[[dict[str, Any]], Any]] | None = None,
) -> Generator[Any]:
    """Yield the column "record" of the job's output, each record as soon as it is done.

    rows: the plan. Each row has a number under `id`, which its record repeats.   job: builds the dataset for some of the rows.
    in_process: makes the worker for a run so small that it has not connected to Ray. Such a run yields all records at its end.
    Rows whose worker, node or object was lost go to a new job, at most three times. Close the generator to end the job.
    """
    if in_process is not None and not connection.is_connected():
        with tasks.on_one_thread():
            compute = in_process()
            batches = [compute({name: np.array([value]) for name, value in row.items()}) for row in rows]
        for batch in batches:  # now, because what the caller does with a record must not depend on the threads either
            yield from batch["record"]
        return
    from ray import exceptions

    # The cluster is to blame for these. Errors that a stage's own code raises end the job at once.
    lost = (
        exceptions.ActorDiedError,
        exceptions.ActorUnavailableError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
    )
    _kill_workers_of_failed_jobs()
    missing = {row[id]: row for row in rows}
    for failures in range(_MAX_FAILURES + 1):
        try:
            # iter_rows() would hold a finished row back until the next one is done, because it prefetches a batch.
            for batch in job(list(missing.values())).iter_batches(batch_size=None, prefetch_batches=0):
                for record in batch["record"]:
                    del missing[record[id]]
                    yield record
            assert not missing, f"no record of {id} {sorted(missing)}"
            return
        except lost as error:
            local.settle()
            if failures == _MAX_FAILURES:
                raise
            _log.warning("workers were lost (%s); computing the %d missing %ss again", type(error).__name__, len(missing), id)
