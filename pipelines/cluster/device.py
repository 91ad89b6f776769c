"""The device of a worker: its name, and the peak memory of the process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.hardware import cpu_name

if TYPE_CHECKING:
    import torch


def device_name(device: str) -> str:
    """The product name of a GPU or CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def wait_for(device: str | torch.device) -> None:
    """Wait until the device has finished its work. A GPU runs asynchronously."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: str | torch.device) -> float:
    """Peak memory in 10**9 bytes: of the allocator on a GPU, of the resident set of the process on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if (status := Path("/proc/self/status")).exists():  # getrusage counts the peak of the parent process, too
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
