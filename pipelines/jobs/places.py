"""Whether the cluster can see what a config names: datasets and weights, checked from here as far as that is possible."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.storage.base import AccessError, StorageError
from pipelines.storage.open import is_address, open_folder
from pipelines.storage.s3_client import S3Config

_WILDCARD = re.compile(r"[*?\[{]")


def check(run: RunConfig, *, is_this_machine: bool) -> list[str]:
    """Warnings about places that may not be what is meant. is_this_machine: whether the cluster consists of this machine.

    Raises ValueError if nothing is at a place in a bucket. A bucket that this machine may not read causes a warning: the cluster
    has credentials, and packages for other addresses, of its own.
    """
    places = {
        (key, place): (f"{name}: {key}" if name else key, each)
        for name, each in reversed(run.every_run().items())  # of equal ones that of the run itself, not of a variant
        for key, place in graph.external_files(each).items()
    }
    warnings = []
    for (key, place), (where, each) in places.items():
        if place.startswith("s3://"):
            warnings.append(_check_bucket(where, place, each.s3_of(place)))
        elif is_address(place) and (key.endswith("dataset.path") or not place.startswith(("hf://", "https://"))):
            warnings.append(_check_address(where, place))
        elif "://" not in place and not place.startswith("sha256:") and not is_this_machine and Path(place).exists():
            warnings.append(f"{where} is {place}, which exists on this machine; the run fails unless all nodes share that path")
    return [warning for warning in warnings if warning is not None]


def _check_bucket(where: str, place: str, s3: S3Config) -> str | None:
    try:
        if _has_object(place, s3):
            return None
    except AccessError as error:
        return f"{where} could not be checked from this machine ({error})"
    except StorageError as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where} is {place}, where the bucket has no objects. Fix the path, or upload the files first.")


def _check_address(where: str, place: str) -> str | None:
    """The same for an address that fsspec reads, whose package may be installed on the cluster only."""
    beginning = _WILDCARD.split(place)[0]
    parent, _, name = (beginning if beginning != place else place.rstrip("/")).rpartition("/")
    try:
        if beginning != place:
            is_there = any(entry.startswith(name) for entry in open_folder(parent).entries())
        else:
            is_there = bool(open_folder(place).entries()) or any(True for _ in open_folder(parent).list(name))
    except StorageError as error:
        return f"{where} could not be checked from this machine ({error})"
    if not is_there:
        raise ValueError(f"{where} is {place}, where no files are. Fix the path, or upload the files first.")
    return None


def _has_object(place: str, s3: S3Config) -> bool:
    """Whether an object has this name, is below it, or begins like a pattern."""
    beginning = _WILDCARD.split(place)[0]
    bucket, _, prefix = beginning.removeprefix("s3://").partition("/")
    folder = open_folder(f"s3://{bucket}", s3)
    if beginning != place or not prefix.strip("/"):
        return any(True for _ in folder.list(prefix))
    name = prefix.rstrip("/")
    first = next(iter(folder.list(name)), None)  # the object itself comes first
    return (first is not None and first.name == name) or any(True for _ in folder.list(f"{name}/"))
