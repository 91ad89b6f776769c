"""A local cluster without the processes that serve a cluster of many users.

Each takes one to two seconds of a CPU to start, and stages wait for some of them: a dashboard, an autoscaler, the forwarding of
logs, statistics of Ray Data, and the sharing of a cluster among its jobs.

Ray 2.60 has no options for them, so its own code is replaced in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch
from uuid import uuid4

_replaced = ExitStack()


@contextmanager
def few_processes() -> Iterator[None]:
    """For ray.init: no dashboard, no monitor for an autoscaler, and nothing that reads the logs of workers."""
    from ray._private import node, parameter

    quiet = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    with patch.object(parameter, "RayParams", quiet), patch.object(node.Node, "start_api_server", lambda *_, **__: None):
        yield


def without_data_actors() -> None:
    """For Ray Data in this process, until with_data_actors: no statistics of datasets, and all of the cluster for each job.

    A stage only starts if there is room for it beside the others (capacity.Room), so jobs need no other agreement.
    """
    import ray
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import AutoscalingCoordinator, rate_based_cluster_autoscaler

    class Coordinator(AutoscalingCoordinator):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            pass

        def request_resources(self, *_: Any, **__: Any) -> None:
            pass

        def cancel_request(self) -> None:
            pass

        def get_reserved_resources(self) -> dict[str, dict[str, float]]:
            return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}

    with_data_actors()
    _replaced.enter_context(patch.object(rate_based_cluster_autoscaler, "DefaultAutoscalingCoordinator", Coordinator))
    _replaced.enter_context(patch.object(stats._StatsManager, "gen_dataset_id_from_stats_actor", lambda: uuid4().hex))
    for name in ("update_execution_metrics", "update_iteration_metrics", "register_dataset_to_stats_actor"):
        _replaced.enter_context(patch.object(stats._StatsManager, name, lambda *_, **__: None))


def with_data_actors() -> None:
    """Ray Data as it is, for a cluster that others use, too."""
    _replaced.close()
