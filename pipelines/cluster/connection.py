"""Connect to Ray: a private local cluster by default, an existing cluster by address.

Ray reads its environment when it is imported. `prepare_environment` must therefore run before the first import of ray. The
command line and the tests call it first.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from enat.config import check_in
from pipelines.cluster import hardware, lean, local, supervisor, waiting
from pipelines.cluster.capacity import AUTOSCALER, Capacity, ResourceRequest, has_autoscaler, judge

if TYPE_CHECKING:
    from pipelines.cluster.resources import Workers

LOCAL = "local"
_MOST_WARM = 8  # processes that import ahead: one for each CPU of a small machine
_QUIET = {
    "RAY_AUTH_MODE": "token",  # explicit, because an unset mode warns; keeps other users out of the local cluster
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # lines of the raylet about lost workers, which log_to_driver=False does not suppress
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # interval of the controller, which delays start, finish and reports
    "RAY_TRAIN_METRICS_ENABLED": "0",  # they fail without a dashboard
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keeps relative paths of the config valid in workers
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}
# For a local cluster, which has no dashboard to show metrics. Without them, Ray's idle processes beside a training worker use 8 %
# of a core instead of 10 %.
_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # the controller is in the driver, whose run has a log of its own
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts this machine, and the watcher is a process
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster that stages run on."""

    address: str | None = None
    """Address of a running cluster: "auto", "host:6379" or "ray://...". Null takes RAY_ADDRESS, or starts a local cluster."""
    num_cpus: int | None = None
    """CPUs of a local cluster, at least 1. Null takes all CPUs of the machine."""

    def __post_init__(self) -> None:
        check_in(self, "[1, inf)", "num_cpus")


def prepare_environment() -> None:
    """Set quiet defaults for Ray. Variables that the user has set do not change."""
    _set_defaults(_QUIET)
    # torch hides this warning while it is imported, but not if another thread restores the filters meanwhile, as MLflow does.
    warnings.filterwarnings("ignore", message="Warning only once for all operators")


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def address_of(config: ClusterConfig) -> str:
    """Of the cluster that `connect` connects to; LOCAL for one that it starts."""
    return config.address or os.environ.get("RAY_ADDRESS") or LOCAL


def is_connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def is_local() -> bool:
    """Whether the cluster that this process is connected to was started by it and ends with it."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and node.head


def connect(config: ClusterConfig) -> None:
    """Connect this process, unless it is already connected. Raises ValueError if no cluster runs at the address."""
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    address = address_of(config)
    import_ahead(("ray.data", "torch"))  # while Ray's processes start
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            _stay_on_loopback()
            _set_defaults(_UNWATCHED)
            local.start({**options, "num_cpus": config.num_cpus, "include_dashboard": False})
            lean.without_data_actors()
        else:
            check_listening(address)
            lean.with_data_actors()
            ray.init(**options)
            supervisor.tell(lost=f"the connection to the Ray cluster at {address} was lost")
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster runs at {address} ({str(error).splitlines()[0]}); start it, or remove cluster.address"
        ) from error
    finally:
        # In the main thread, Ray installs its own handler, which exits at once.
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    _silence_ray()


def warm_up(modules: Sequence[str]) -> None:
    """Have processes of a cluster of one machine import modules, which takes seconds, while the driver does other things.

    On more machines, Ray may start the tasks that need the modules on others.
    """
    import ray

    if not modules or len(ray.nodes()) > 1:
        return
    task = ray.remote(num_cpus=1)(_import)
    for _ in range(min(int(ray.cluster_resources().get("CPU", 1)), _MOST_WARM)):
        task.remote(modules)


def import_ahead(modules: Iterable[str]) -> None:
    """Import modules in a thread, while this one does other things."""
    threading.Thread(target=_import, args=(list(modules),), daemon=True).start()


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def check_listening(address: str) -> None:
    """Raises ValueError if nothing listens, because Ray would retry for minutes. Ray resolves names such as "auto" itself."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster runs at {address} ({error.strerror or error}); start it, or remove cluster.address"
        ) from error


def _stay_on_loopback() -> None:
    """Bind every service of a local cluster to 127.0.0.1, as Ray does on macOS and Windows. On Linux, Ray would open its ports to
    the network. Only set for local clusters, because joining a real cluster needs the real address."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this process, which read the variable when it imported ray


def capacity() -> Capacity:
    """Current capacity of the cluster that this process is connected to."""
    import ray

    return Capacity(tuple(node["Resources"] for node in ray.nodes() if node["Alive"]))


@cache
def machines() -> hardware.Machines:
    """Of the cluster that this process is connected to. Asks a node with most CPUs for their name, unless the cluster is local."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if is_local():
        return hardware.of_cluster(capacity(), hardware.cpu_name())
    alive = [node for node in ray.nodes() if node["Alive"]]
    largest = max(alive, key=lambda node: node["Resources"].get("CPU", 0.0))["NodeID"]
    near = NodeAffinitySchedulingStrategy(largest, soft=True)
    task = ray.remote(num_cpus=0, scheduling_strategy=near)(hardware.cpu_name)
    return hardware.of_cluster(capacity(), waiting.get(task.remote()))


def require(workers: Workers, stage: str) -> None:
    """Raises ValueError if the cluster does not have the resources that a stage requests, because Ray would wait forever. Clusters
    that add nodes on demand (ENAT_CLUSTER_GROWS=1) are not checked."""
    verdict = judge(ResourceRequest(node=stage, workers=workers), capacity())
    if verdict.problem is not None and not has_autoscaler():
        raise ValueError(f"{verdict.problem}. This is its current size. If it adds nodes on demand, set {AUTOSCALER}=1")


def _silence_ray() -> None:
    """Tracebacks of tasks, which Ray prints besides raising them, go to the log file of the run, if there is one."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    context.log_internal_stack_trace_to_stdout = False
    context.raise_original_map_exception = True
    for name in ("ray.data", "ray"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.handlers, logger.propagate = [logging.NullHandler()], True
