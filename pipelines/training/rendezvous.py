"""How the ranks of a training meet. Ray Train's own way lets everyone who reaches the node read and write
its keys; this one listens on the address that Ray uses, which is 127.0.0.1 in a local cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup

_listening: list[socket.socket] = []  # of rank 0, between listening and joining
_JOIN_SECONDS = 1800
# Of mallopt(3): M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (never) and M_TOP_PAD. Sizes in bytes.
_KEEP_MEMORY = {-8: 1, -3: 32 << 20, -1: -1, -2: 256 << 20}
_LEAVE_SECONDS = 2.0  # limits the teardown of ranks whose peer died


@dataclass
class Rendezvous(BackendConfig):  # type: ignore[misc]
    """How a trainer sets up its workers. Neither it nor the trainer's controller imports torch, which takes seconds.

    backend: of torch.distributed.
    """

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class _Backend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: Rendezvous) -> None:
        address = worker_group.execute_single(0, _listen)
        size = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, _join, rank, size, address, backend_config) for rank in range(size)])

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: Rendezvous) -> None:
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=_LEAVE_SECONDS)


def _listen() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    # An address that other nodes translate (NAT) belongs to no interface.
    host = address if _interface(address) else ""
    _listening[:] = [socket.create_server((host, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)]
    return address, _listening[0].getsockname()[1]


def _join(rank: int, world_size: int, address: tuple[str, int], config: Rendezvous) -> None:
    import torch.distributed as dist

    if config.backend == "gloo":
        _keep_memory()
    context = ray.train.get_context()
    os.environ |= {  # as torchrun sets them, for libraries that read them
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    own_address = ray.util.get_node_ip_address()
    if interface := _interface(own_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if ipaddress.ip_address(own_address).is_loopback:  # between nodes NCCL chooses the fastest interfaces
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    own: dict[str, Any] = {"is_master": True, "master_listen_fd": _listening.pop().detach()} if rank == 0 else {}
    timeout = timedelta(seconds=_JOIN_SECONDS)
    store = dist.TCPStore(*address, world_size, timeout=timeout, wait_for_workers=False, **own)  # type: ignore[attr-defined]
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _keep_memory() -> None:
    """Ray Train runs the loop in a thread, which starts later. Its own arena of glibc would keep returning memory and requesting it
    again: at ENAT-S width 45,000 page faults per step, a tenth to a fifth of its time. The arena of the process, which keeps its
    memory, has none."""
    with contextlib.suppress(AttributeError):  # without glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _KEEP_MEMORY.items():
            mallopt(parameter, value)


def _leave() -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _interface(address: str) -> str | None:
    """The name of this node's interface that has the address."""
    found = (name for name, own in psutil.net_if_addrs().items() if address in {each.address for each in own})
    return next(found, None)
