"""What a worker computes on: the device's name, and the most memory that its process has held."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path


def device_name(device: str) -> str:
    """Of a GPU its product name; of a CPU the model as Linux tells it, else the architecture."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def wait_for(device: str | torch.device) -> None:
    """Until it has done what it was given: a GPU computes beside the program."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: str | torch.device) -> float:
    """In 10**9 bytes: of a GPU what the allocator held at most, of a CPU the process's largest resident set."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if (status := Path("/proc/self/status")).exists():  # getrusage counts the peak of the parent process, too
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
