"""Ray Train's trainer, with as few processes and imports as the training needs: each costs seconds before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

if TYPE_CHECKING:
    from pipelines.training.task import TrainTask


class RayTrainer(DataParallelTrainer):  # type: ignore[misc]
    """is_local: whether the cluster ends with this process, and its placement groups with it."""

    def __init__(self, *arguments: Any, is_local: bool, **options: Any) -> None:
        self._is_local = is_local
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that start a process for what is not used here."""
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if self._is_local else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]


def train(config: dict[str, TrainTask]) -> Any:
    """Entry point of each worker. Ray Train also reads it in the controller, which needs no torch."""
    from pipelines.training.loop import train_loop

    return train_loop(config)
