"""Machines: the names of CPUs and GPUs, the peaks of known GPUs, and clusters in a few letters, such as 8x8xH200."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from pipelines.cluster.capacity import Capacity

CPU, GPU = "cpu", "cuda"  # kinds of devices, as torch names them
SIZE = "ENAT_CLUSTER_SIZE"  # variable with the largest size of a cluster that adds nodes on demand, as parse_cluster reads it
_ANY = "GPU"  # a GPU of a description whose speed does not matter
_CPUS_PER_GPU = 12  # of a described cluster, unless it states its CPUs
_GPU_FILES = "/proc/driver/nvidia/gpus"
_ACCELERATOR = "accelerator_type:"  # Ray's name of a resource


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures of a GPU.

    tflops: dense peak by precision.   link_gb_per_second: in one direction, of one GPU to those
    of its node.   network_gb_per_second: its share of the network between nodes, as usual.
    """

    name: str
    tflops: Mapping[str, float]
    link_gb_per_second: float
    network_gb_per_second: float


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines that a run would use. cpu, gpu: product names; None if not known or if there is none.   described: in words."""

    capacity: Capacity
    cpu: str | None
    gpu: str | None
    described: str

    def name_of(self, device: str) -> str | None:
        return self.cpu if device == CPU else self.gpu


@cache
def known_gpus() -> dict[str, Gpu]:
    """By name, the longest names first: "H100" is part of the name of an H100 NVL."""
    text = (resources.files("pipelines.cluster") / "gpus.yaml").read_text()
    found = {name: Gpu(name=name, **values) for name, values in yaml.safe_load(text).items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def short_name(product: str) -> str:
    """The name in gpus.yaml of "NVIDIA H100 80GB HBM3" or "NVIDIA-H100"; others stay as they are."""
    for name in known_gpus():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![0-9])", product, re.IGNORECASE):
            return name
    return product


def cpu_name() -> str:
    """The model that Linux reports, or else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def gpu_names(folder: str = _GPU_FILES) -> list[str]:
    """Of this machine, as NVIDIA's driver reports them. Unlike torch, this takes no time."""
    found = []
    for file in sorted(Path(folder).glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        found.append(match[1].strip() if match else "unknown GPU")
    return found


def of_this_machine(num_cpus: int | None = None) -> Machines:
    gpus, cpus = gpu_names(), num_cpus or os.cpu_count() or 1
    node = {"CPU": float(cpus), **({"GPU": float(len(gpus))} if gpus else {})}
    words = f"this machine, {cpus} CPUs" + (f" and {len(gpus)} x {short_name(gpus[0])}" if gpus else "")
    return Machines(capacity=Capacity((node,)), cpu=cpu_name(), gpu=short_name(gpus[0]) if gpus else None, described=words)


def of_cluster(capacity: Capacity, cpu: str | None = None) -> Machines:
    """A running cluster. Ray states the kinds of GPUs as resources. cpu: product name, if it is known."""
    kinds = {name.removeprefix(_ACCELERATOR) for node in capacity.nodes for name in node if name.startswith(_ACCELERATOR)}
    gpus = sorted(short_name(kind) for kind in kinds) if capacity.total("GPU") else []
    return Machines(capacity=capacity, cpu=cpu, gpu=gpus[0] if gpus else None, described=capacity.describe())


def parse_cluster(text: str) -> Machines:
    """ "8x8xH200": nodes x GPUs of each x their name; "8x8xH200x96" with 96 CPUs each. "4x16xCPU": nodes of 16 CPUs.

    Raises ValueError if it is not of this form, or if the GPU is not known.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,4})x([A-Za-z][A-Za-z0-9-]*?)(?:x(\d{1,5}))?", text.strip(), re.IGNORECASE)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"{text!r} does not describe a cluster; write NODESxGPUSxNAME, such as 8x8xH200, or NODESxCPUSxCPU")
    num_nodes, each, name = int(match[1]), int(match[2]), match[3].upper()
    nodes = "node" if num_nodes == 1 else "nodes"
    if name == "CPU":
        words = f"{num_nodes} {nodes} with {each} CPUs"
        return Machines(capacity=Capacity(({"CPU": float(each)},) * num_nodes), cpu=None, gpu=None, described=words)
    known = {gpu.upper(): gpu for gpu in known_gpus()} | {_ANY: _ANY}
    if name not in known:
        raise ValueError(f"the GPU {match[3]!r} is not known; known are {', '.join(sorted(known_gpus()))}, {_ANY} and CPU")
    cpus = int(match[4] or each * _CPUS_PER_GPU)
    node = {"CPU": float(cpus), "GPU": float(each)}
    words = f"{num_nodes} {nodes} with {each} x {known[name]} and {cpus} CPUs"
    return Machines(capacity=Capacity((node,) * num_nodes), cpu=None, gpu=known[name] if name != _ANY else None, described=words)


def grown() -> Machines | None:
    """The largest size of this cluster, which adds nodes on demand; None if its environment does not state it.

    Raises ValueError if it cannot be read.
    """
    try:
        return parse_cluster(os.environ[SIZE]) if os.environ.get(SIZE) else None
    except ValueError as error:
        raise ValueError(f"the variable {SIZE}: {error}") from error
