"""Check whether this machine can run a config. Each finding is one line with advice. Nothing is changed."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

GOOD, WARNING, BAD = "good", "warning", "bad"
_FREE_GB = 5.0  # on the disk of the workspace, for spilled objects of Ray and for caches
_LEAST_DRIVER = {12: 525, 13: 580}  # by the major version of CUDA that torch was built with, as NVIDIA states it for Linux
_DRIVER_SECONDS = 20.0
_SHARED_GB = 1.0  # in /dev/shm, for Ray's object store


@dataclass(frozen=True)
class Finding:
    """what: the thing that was checked.   state: GOOD, WARNING (affects some runs) or BAD.   advice: what to do, unless GOOD; None
    takes that of the check."""

    what: str
    state: str
    detail: str
    advice: str | None = None


def examine(config: Any, *, is_of_run: bool = True) -> Iterator[Finding]:
    """Findings for a run of `config`, a RunConfig, in the order in which a run would meet them.

    is_of_run: False if no run is meant, only this machine, which needs no dataset.
    A check that raises is a finding, too. The remaining checks still run.
    """
    checks: Mapping[str, Callable[[], Iterator[Finding]]] = {
        "Python": lambda: iter([Finding("Python", GOOD, f"{platform.python_version()} at {sys.executable}")]),
        "packages": _packages,
        "devices": _devices,
        "disk": lambda: _disk(Path(config.workspace)),
        "Ray": lambda: _ray(config),
        "store": lambda: _store(config),
        "tracking": lambda: _tracking(config),
        "dataset": lambda: _dataset(config) if is_of_run or config.dataset is not None else iter(()),
        "weights": lambda: _weights(config),
    }
    for what, check in checks.items():
        try:
            for finding in check():
                usual = "" if finding.state == GOOD else _ADVICE[what]
                yield finding if finding.advice is not None else replace(finding, advice=usual)
        except Exception as error:  # noqa: BLE001 (any failure is a finding)
            reason = " ".join(str(error).split()) or type(error).__name__
            yield Finding(what, BAD, reason[:300], _ADVICE[what])


_ADVICE = {
    "packages": "run make setup again",
    "devices": "check that the driver is loaded (nvidia-smi) and matches the installed torch",
    "disk": "choose another workspace",
    "Ray": "start the cluster, or remove cluster.address and RAY_ADDRESS to start a local one",
    "store": "check that the folder or bucket exists and is writable. Credentials come from the AWS variables",
    "tracking": "start the server, change MLFLOW_TRACKING_URI, or continue without it: runs do not need it",
    "dataset": "check that it exists and is readable, or set another path",
    "weights": "download the file, or set another path",
}


def _packages() -> Iterator[Finding]:
    """Checks that the versions satisfy pyproject.toml, and that packages with compiled parts can be imported."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("enat-lab") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, but {requirement.specifier} is required")
    for name in ("torch", "torchvision", "pyarrow"):  # deepspeed would log its accelerator on import
        importlib.import_module(name)
    detail = "; ".join(wrong) or ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "mlflow", "pyarrow"))
    yield Finding("packages", BAD if wrong else GOOD, detail)


def _devices() -> Iterator[Finding]:
    import torch

    count = _num_gpus()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    driver, least = _driver(), _LEAST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
    if driver and int(driver.partition(".")[0]) < least:
        advice = f"install driver {least} or newer; this torch has CUDA {torch.version.cuda}"
        yield Finding("devices", BAD, f"the GPU driver {driver} is too old", advice)
    elif count:
        yield Finding("devices", GOOD, f"{count} x {names}, CUDA {torch.version.cuda}, driver {driver}")
    elif shutil.which("nvidia-smi"):
        yield Finding("devices", WARNING, f"a GPU driver ({driver or 'version unknown'}) is installed, but torch finds no GPU")
    else:
        yield Finding("devices", GOOD, f"no GPU, {os.cpu_count()} CPUs; stages with gpus_per_worker need a cluster")


def _driver() -> str:
    """The version of the GPU driver; "" without one that answers."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
        if found := re.match(r"\d+(\.\d+)*", answer.strip()):
            return found[0]
    return ""


def _disk(workspace: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (workspace.absolute(), *workspace.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    yield Finding("disk", GOOD if free >= _FREE_GB else WARNING, f"{free:,.0f} GB free for {workspace}")
    shared = Path("/dev/shm")  # noqa: S108 (the place of Ray's object store)
    if shared.exists() and (size := shutil.disk_usage(shared).total / 1e9) < _SHARED_GB:
        advice = "in a container, start it with --shm-size=4g; otherwise Ray uses the disk, which is slow"
        yield Finding("shared memory", WARNING, f"{shared} has {size:.2f} GB", advice)


def _ray(config: Any) -> Iterator[Finding]:
    from pipelines.cluster import connection
    from pipelines.cluster.capacity import Capacity

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        yield Finding("Ray", GOOD, f"{version('ray')}, a local cluster for each run")
        num_cpus = float(config.cluster.num_cpus or os.cpu_count() or 1)
        yield from _room(config, Capacity(({"CPU": num_cpus, "GPU": float(_num_gpus())},)))
        return
    connection.check_listening(address)
    import ray

    was_connected = ray.is_initialized()
    connection.connect(config.cluster)
    capacity = connection.capacity()
    if not was_connected:
        ray.shutdown()
    yield Finding("Ray", GOOD, f"{address} has {capacity.describe()}")
    yield from _room(config, capacity)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _room(config: Any, capacity: Any) -> Iterator[Finding]:
    """Stages that need more than the cluster has. Stages whose artifact is in the store need nothing."""
    from pipelines.cluster.capacity import has_autoscaler, judge
    from pipelines.jobs.submission import resource_requests

    for problem in dict.fromkeys(judge(request, capacity).problem for request in resource_requests(config)):
        if problem is not None:
            yield Finding("room", WARNING if has_autoscaler() else BAD, problem, "or choose a larger cluster")


def _store(config: Any) -> Iterator[Finding]:
    from pipelines.artifacts.open import open_store
    from pipelines.storage.redaction import without_credentials

    store = open_store(config.store_uri, config.s3)
    store.check_writable()
    yield Finding("store", GOOD, f"{without_credentials(store.uri)} is writable")


def _tracking(config: Any) -> Iterator[Finding]:
    from pipelines.storage.redaction import without_credentials
    from pipelines.tracking import run as tracking
    from pipelines.tracking import search

    if not config.tracking.enabled:
        yield Finding("tracking", WARNING, "off; results cannot be compared", "remove tracking.enabled")
        return
    uri = tracking.resolve_uri(config.tracking, Path(config.workspace))
    shown = without_credentials(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Finding("tracking", GOOD, f"{shown}, which the first run creates")
        return
    yield Finding("tracking", GOOD, f"{shown} answers, {len(search.experiments(uri))} experiments")


def _dataset(config: Any) -> Iterator[Finding]:
    """Checks that the dataset exists and that one split is chosen. Stage dataset checks its content."""
    import dataclasses

    from pipelines.data.sources.config import describe_splits
    from pipelines.run import graph

    if config.dataset is None:
        graph.needed_stages(config)  # raises if one is needed
        return
    dataset = dataclasses.replace(config.dataset, s3=config.s3_of(config.dataset.path, config.dataset.captions))
    splits = describe_splits(dataset)
    if dataset.captions is not None and "://" not in dataset.captions and not Path(dataset.captions).is_file():
        raise ValueError(f"dataset.captions names {dataset.captions}, which is not a file; set it to a captions_*.json of COCO")
    place = dataset.path or "included in scikit-learn"
    yield Finding("dataset", GOOD, f"{dataset.title}, {place}{f': {splits}' if splits else ''}")


def _weights(config: Any) -> Iterator[Finding]:
    """Files that the config names, apart from datasets. Weights in a hub or a bucket are only listed."""
    from enat.metrics.extractors import OF_INCEPTION
    from pipelines.run import graph
    from pipelines.storage.open import is_address

    for key, place in graph.external_files(config).items():
        if "dataset." in key:
            continue
        if is_address(place) or place.startswith("sha256:"):
            yield Finding("weights", GOOD, f"{key} is {place}, which is downloaded when its stage runs")
        elif Path(place).exists():
            yield Finding("weights", GOOD, f"{key} is {place}")
        else:
            yield Finding("weights", BAD, f"{key} is {place}, which does not exist")
    if config.reference.extractor in OF_INCEPTION and config.reference.weights is None:
        advice = "without internet access, download the file and set reference.weights to its path"
        yield Finding("weights", WARNING, "Inception's published weights are downloaded when stage reference runs", advice)
