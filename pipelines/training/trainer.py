"""Ray Train's trainer, with as few processes and imports as the training needs: each costs seconds before the first step.

It also tells which worker was lost.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import ray
from ray.runtime_context import RuntimeContext
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.formatting import printable

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus

    from pipelines.training.task import TrainTask
    from pipelines.workflow.progress import Reporter

_LOOK_SECONDS = 2.0  # for the answers of workers beside one that failed
_REASON_LENGTH = 200
_patching = threading.Lock()  # trainings may run side by side


class RayTrainer(DataParallelTrainer):  # type: ignore[misc]
    """is_local: whether the cluster ends with this process, and its placement groups with it."""

    def __init__(self, *arguments: Any, is_local: bool, **options: Any) -> None:
        self._is_local = is_local
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that start a process for what is not used here."""
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if self._is_local else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, *, scaling_policy: Any, **options: Any) -> Any:
        """In a local cluster, the controller runs in the driver: as an actor it would be one more process to start."""
        if not self._is_local:
            return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **options)
        if type(scaling_policy) is FixedScalingPolicy:
            scaling_policy = _UnsharedScaling(self.scaling_config)
        controller = _OwnController(scaling_policy=scaling_policy, **options)
        asyncio.run(controller.run())
        return controller.get_result()


class _OwnWorkers(WorkerGroup):  # type: ignore[misc]
    """Workers whose controller is not an actor. They would only use it for Ray's checkpoints."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env  # Ray's own variables are already in the environment of a local cluster

    def _init_train_context_on_workers(self, *arguments: Any) -> None:
        with _patching, patch.object(RuntimeContext, "current_actor", None):
            super()._init_train_context_on_workers(*arguments)


class _OwnController(TrainController):  # type: ignore[misc]
    worker_group_cls = _OwnWorkers


class _UnsharedScaling(FixedScalingPolicy):  # type: ignore[misc]
    """Ray's policy for a fixed number of workers, without reserving them: no other job uses a local cluster.

    For a reservation Ray would start an actor, and wait for it before the first worker starts.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass


class LossReports(WorkerGroupCallback):  # type: ignore[misc]
    """Tells which workers were lost. Runs in Ray Train's controller, which starts the training again."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._workers: list[Any] = []

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._workers = [*worker_group.get_workers()]

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        if errors := worker_group_status.errors:
            self._reporter.lose(describe_loss(errors, self._unreachable(errors), [*map(_place_of, self._workers)]))

    def _unreachable(self, errors: Mapping[int, Exception]) -> list[int]:
        """Ranks of the workers that are gone. The others fail only because these no longer take part, and may do so first."""
        gone = [rank for rank, error in errors.items() if isinstance(error, _LOST)]
        asked = {worker.execute_async(int): rank for rank, worker in enumerate(self._workers) if rank not in errors}
        answered = ray.wait([*asked], num_returns=len(asked), timeout=_LOOK_SECONDS)[0] if asked else []
        for reference, rank in asked.items():
            try:
                if reference in answered and ray.get(reference) == 0:
                    continue
            except ray.exceptions.RayError:  # it is gone, which is the answer
                pass
            gone.append(rank)
        return sorted(gone)


_LOST = (ray.exceptions.RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)


def describe_loss(errors: Mapping[int, Exception], gone: Sequence[int], places: Sequence[str]) -> str:
    """One sentence. errors: of ranks.   gone: ranks of the workers that no longer exist.   places: of all ranks."""

    def name(rank: int) -> str:
        return f"worker {rank} of {len(places)}" + (f" on {places[rank]}" if rank < len(places) else "")

    if gone:
        return f"{', '.join(map(name, gone))} {'was' if len(gone) == 1 else 'were'} lost (the process or its node has ended)"
    rank, error = min(errors.items(), key=lambda each: each[0])
    lines = str(error).strip().splitlines() or [""]
    return f"{name(rank)} failed ({type(error).__name__}: {printable(lines[-1])[:_REASON_LENGTH]})"


def _place_of(worker: Any) -> str:
    return f"{worker.metadata.node_ip} (process {worker.metadata.pid})"


def train(config: dict[str, TrainTask]) -> Any:
    """Entry point of each worker. Ray Train also reads it in the controller, which needs no torch."""
    from pipelines.training.loop import train_loop

    return train_loop(config)
