"""How a stage is distributed over the workers of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from enat.config import check_in

ALL = "all"  # instead of a number of workers


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers of a stage. They do not change what the stage makes, so they are not part of its key."""

    num_workers: int | str = 1
    """Workers that run side by side, at least 1, or "all": as many as the cluster has room for when the stage starts."""
    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker, above 0. A fraction shares a CPU."""
    gpus_per_worker: float = 0.0
    """GPUs reserved for each worker. 0 computes on CPUs, a fraction shares a GPU."""

    def __post_init__(self) -> None:
        if self.num_workers != ALL:
            if isinstance(self.num_workers, str):
                raise ValueError(f"num_workers is {self.num_workers!r}; give a number, or {ALL}")
            check_in(self, "[1, inf)", "num_workers")
        check_in(self, "(0, inf)", "cpus_per_worker")
        check_in(self, "[0, inf)", "gpus_per_worker")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if (value := getattr(self, name)) > 1 and value % 1:
                raise ValueError(f"{name} is {value}; above 1 it must be a whole number, because Ray divides single devices only")

    @property
    def count(self) -> int:
        """The number of workers. "all" has become a number before a stage runs: see capacity.with_count."""
        assert isinstance(self.num_workers, int)
        return self.num_workers

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def num_threads(self) -> int:
        """For torch, which would otherwise use every core of the machine in every worker."""
        return max(1, int(self.cpus_per_worker))

    @property
    def resources(self) -> dict[str, float]:
        """Options of ray.remote and Ray Data."""
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}

    def together(self) -> Self:
        """One worker that has all their CPUs."""
        return replace(self, num_workers=1, cpus_per_worker=max(1, int(self.count * self.cpus_per_worker)))

    def device_seconds(self, worker_seconds: float) -> float:
        """Seconds of accelerators for so many seconds of workers. A worker may hold several accelerators, or share one."""
        return worker_seconds * self.gpus_per_worker


@dataclass(frozen=True, kw_only=True)
class Execution(Workers):
    """Workers that compute images in batches."""

    worker_batch_size: int = 64
    """Images that one worker computes together. Unit: images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in(self, "[1, inf)", "worker_batch_size")


@dataclass(frozen=True, kw_only=True)
class TokenizerExecution(Execution):
    """Workers that encode or decode images."""

    compile: bool = False
    """Compile the encoder or decoder with torch.compile: a slower start, faster passes. Needs GPUs. It changes codes and pixels by
    rounding at most, which is measured on the first images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and not self.gpus_per_worker:
            raise ValueError("compile needs GPUs here; set gpus_per_worker, or leave it out")
