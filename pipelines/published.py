"""Numbers that others published (published.yaml), and which of them may stand beside a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

DATASETS = ("imagenet256", "imagenet512", "coco256")
USUAL_SAMPLES = {"imagenet256": 50_000, "imagenet512": 50_000, "coco256": 30_000}  # of the published scores
_FILE = "published.yaml"
# Names of whole datasets only: a subset (imagenet100, tiny-imagenet, imagenette) has other scores.
_TITLES = {
    "imagenet": re.compile(r"(ilsvrc(2012)?[-_ ]?)?(imagenet([-_ ]?1k)?|ilsvrc(2012)?)([-_ ]?(256|512))?([-_ ]?train)?"),
    "coco": re.compile(r"(ms[-_ ]?)?coco([-_ ]?20(14|17))?([-_ ]?256)?([-_ ]?(train|val))?"),
}


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One system. tflops: 10^12 multiply-accumulates for an image, guidance and decoder included. None: not known."""

    name: str
    dataset: str
    source: str
    note: str = ""
    params_millions: float | None = None
    steps: int | None = None
    tflops: float | None = None
    fid: float | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"{self.name} has dataset {self.dataset!r}; choose one of {', '.join(DATASETS)}")
        for name in ("params_millions", "steps", "tflops", "fid"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value) and value > 0):
                raise ValueError(f"{self.name} has {name} {value!r}; give a number above 0, or leave it empty")


@cache
def load_published() -> tuple[PublishedResult, ...]:
    """All of published.yaml, in its order."""
    return read_published((resources.files("pipelines") / _FILE).read_text(encoding="utf-8"))


def read_published(text: str) -> tuple[PublishedResult, ...]:
    """The same from text. Raises ValueError, naming the row, for what is no such table."""
    import yaml

    rows = yaml.safe_load(text)
    if not isinstance(rows, list):
        raise ValueError(f"{_FILE} holds no list of rows")
    return tuple(_result(row, number) for number, row in enumerate(rows, start=1))


def _result(row: Any, number: int) -> PublishedResult:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} of {_FILE} is no mapping")
    known = {field.name for field in fields(PublishedResult)}
    if odd := sorted(map(str, row.keys() - known)):
        raise ValueError(f"row {number} of {_FILE} has unknown keys {', '.join(odd)}; the keys are {', '.join(sorted(known))}")
    try:
        return PublishedResult(**row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {number} of {_FILE}: {error}") from error


def published_for(dataset: str) -> tuple[PublishedResult, ...]:
    return tuple(result for result in load_published() if result.dataset == dataset)


def matching_dataset(title: str | None, resolution: int | None) -> str | None:
    """The dataset whose published numbers belong beside runs of this one, by its title and pixels; None where none do.

    A title is trusted: whoever calls a folder of other images "imagenet" gets ImageNet's numbers.
    """
    for name, pattern in _TITLES.items():
        if title is not None and pattern.fullmatch(title.strip().lower()) and f"{name}{resolution}" in DATASETS:
            return f"{name}{resolution}"
    return None
