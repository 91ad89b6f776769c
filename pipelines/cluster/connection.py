"""Connecting to Ray: a private local cluster by default, an existing one by address.

Ray reads its environment when it is imported, so `prepare_environment` comes before the first import of ray; the command line
and the tests call it first of all.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cluster.capacity import GROWS, Capacity, Need, cluster_grows, judge

if TYPE_CHECKING:
    from pipelines.cluster.resources import Workers

_QUIET = {
    "RAY_AUTH_MODE": "token",  # stated: an unset mode warns, and the local cluster stays closed to other users
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # raylet lines about lost workers, which log_to_driver=False lets through
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often the controller looks: start, finish and reports wait for it
    "RAY_TRAIN_METRICS_ENABLED": "0",  # without a dashboard they only fail
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the config stay right in workers
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # bounds the teardown of ranks whose peer died
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}
# Of a local cluster, which has no dashboard that would show them: without, Ray's idle processes beside a training worker take 8 %
# of a core instead of 10.
_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """address: of a running cluster ("auto", "host:6379", "ray://..."); None takes RAY_ADDRESS, else starts a local one.

    num_cpus: of a local cluster; None takes the machine's.
    """

    address: str | None = None
    num_cpus: int | None = None

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"cluster.num_cpus is {self.num_cpus}; it must be at least 1, or left out for all of this machine's")


def prepare_environment() -> None:
    """Quiet defaults for Ray; what the user has set stays."""
    _set_defaults(_QUIET)


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def connect(config: ClusterConfig) -> None:
    """Connect this process, if it is not connected yet. Raises ValueError where there is no cluster at the address."""
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    local = {}
    if address == "local":
        _stay_on_loopback()
        _set_defaults(_UNWATCHED)
        local = {"num_cpus": config.num_cpus, "include_dashboard": False}
    else:
        check_listening(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({str(error).splitlines()[0]}); start it, or leave cluster.address out"
        ) from error
    finally:
        # In the main thread Ray puts a handler of its own there, which exits at once.
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    _silence_ray_data()


def check_listening(address: str) -> None:
    """Raises ValueError where nobody listens: Ray itself would try for minutes. Of "auto" and the like Ray knows better."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({error.strerror or error}); start it, or leave cluster.address out"
        ) from error


def _stay_on_loopback() -> None:
    """Bind every service of a local cluster to 127.0.0.1, as Ray itself does on macOS and Windows; on Linux it would open
    its ports to the network. Set here and not for good, because joining a real cluster needs the real address."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which read the variable when it imported ray


def capacity() -> Capacity:
    """What the cluster that this process is connected to has now."""
    import ray

    return Capacity(tuple(node["Resources"] for node in ray.nodes() if node["Alive"]))


def require(workers: Workers, stage: str, min_workers: int | None = None) -> None:
    """Raises ValueError where the cluster cannot give what a stage asks for: Ray itself would wait for ever. Where more nodes come
    when they are asked for (ENAT_CLUSTER_GROWS=1), that is what is wanted.

    min_workers: how many will do, where that is fewer than workers.num_workers.
    """
    verdict = judge(Need(node=stage, workers=workers, least=min_workers or workers.num_workers), capacity())
    if verdict.problem is not None and not cluster_grows():
        raise ValueError(f"{verdict.problem}. That is what it has now: where nodes come when they are asked for, set {GROWS}=1")


def _silence_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    context.log_internal_stack_trace_to_stdout = False
    context.raise_original_map_exception = True
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
