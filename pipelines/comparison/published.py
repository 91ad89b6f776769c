"""Published results (published.yaml), and which of them can be compared with a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """The usual protocol of published numbers for one dataset. labels, reference: text for sentences.

    schemes: prefixes of the equivalent label schemes in protocols.   num_reference: number of reference images.
    """

    resolution: int
    num_samples: int | None = None
    labels: str = ""
    schemes: tuple[str, ...] = ()
    reference: str = ""
    num_reference: int | None = None
    is_one_step: bool = False


_IMAGENET = PublishedSet(
    resolution=256,
    num_samples=50_000,
    labels="with each class as often as any other",
    schemes=("each class in turn", "1000 classes, "),
    reference="the 1,281,167 training images",
    num_reference=1_281_167,
)
SETS: Mapping[str, PublishedSet] = {
    "imagenet256": _IMAGENET,
    "imagenet512": replace(_IMAGENET, resolution=512),
    "coco256": PublishedSet(
        resolution=256,
        num_samples=30_000,
        labels="of captions",
        schemes=("captions",),
        reference="the 40,504 validation images",
        num_reference=40_504,
    ),
    "imagenet256-one-step": PublishedSet(resolution=256, is_one_step=True),
}
DATASETS = tuple(SETS)
_FILE = "published.yaml"
# Names of complete datasets only: scores on subsets (imagenet100, tiny-imagenet, imagenette) differ.
_TITLES = {
    "imagenet": re.compile(r"(ilsvrc(2012)?[-_ ]?)?(imagenet([-_ ]?1k)?|ilsvrc(2012)?)([-_ ]?(256|512))?([-_ ]?train)?"),
    "coco": re.compile(r"(ms[-_ ]?)?coco([-_ ]?20(14|17))?([-_ ]?256)?([-_ ]?(train|val))?"),
}
# Names of statistics files that papers use: OpenAI's (ADM) and others from the same images.
REFERENCE_FILES = {
    "virtual_imagenet256_labeled.npz": "imagenet256",
    "virtual_imagenet512.npz": "imagenet512",
    "fid_stats_imagenet256_guided_diffusion.npz": "imagenet256",
    "fid_stats_imagenet512_guided_diffusion.npz": "imagenet512",
    "adm_in256_stats.npz": "imagenet256",
    "fid_stats_mscoco256_val.npz": "coco256",
}


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One published system. None: unknown.

    tflops: 10^12 multiply-accumulates per image, including both passes of guidance and, if has_decoder, the tokenizer's decoder.
    mask_ratio: for one-step decoding, the share of real codes that is masked.
    """

    name: str
    dataset: str
    source: str
    note: str = ""
    params_millions: float | None = None
    steps: int | None = None
    tflops: float | None = None
    fid: float | None = None
    mask_ratio: float | None = None
    has_decoder: bool = True
    is_unconditional: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"{self.name} has dataset {self.dataset!r}; choose one of {', '.join(DATASETS)}")
        for name in ("params_millions", "steps", "tflops", "fid", "mask_ratio"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value) and value > 0):
                raise ValueError(f"{self.name} has {name} {value!r}; give a number above 0, or leave it empty")
        if (self.mask_ratio is not None) != SETS[self.dataset].is_one_step:
            raise ValueError(
                f"{self.name} of {self.dataset}: mask_ratio is required for one-step decoding and not allowed otherwise"
            )
        for name in ("has_decoder", "is_unconditional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{self.name} has {name} {getattr(self, name)!r}; give true or false")

    @property
    def label(self) -> str:
        """Name, marked if unconditional: such scores do not compare with class-conditional ones."""
        return f"{self.name} (unconditional)" if self.is_unconditional else self.name


@cache
def load_published() -> tuple[PublishedResult, ...]:
    """All rows of published.yaml, in order."""
    return read_published((resources.files("pipelines.comparison") / _FILE).read_text(encoding="utf-8"))


def read_published(text: str) -> tuple[PublishedResult, ...]:
    """Parse the text of such a file. Raises ValueError, naming the row, if it is not valid."""
    import yaml

    rows = yaml.safe_load(text)
    if not isinstance(rows, list):
        raise ValueError(f"{_FILE} must contain a list of rows")
    return tuple(_result(row, number) for number, row in enumerate(rows, start=1))


def _result(row: Any, number: int) -> PublishedResult:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} of {_FILE} is not a mapping")
    known = {field.name for field in fields(PublishedResult)}
    if odd := sorted(map(str, row.keys() - known)):
        raise ValueError(f"row {number} of {_FILE} has unknown keys {', '.join(odd)}; the keys are {', '.join(sorted(known))}")
    try:
        return PublishedResult(**row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {number} of {_FILE}: {error}") from error


def published_for(dataset: str) -> tuple[PublishedResult, ...]:
    return tuple(result for result in load_published() if result.dataset == dataset)


def matching_dataset(title: str | None, resolution: int | None, *, is_one_step: bool = False) -> str | None:
    """The dataset whose published numbers compare with runs measured against `title` at this resolution, or None.

    title: name of a dataset or of a known statistics file. It is trusted: a folder of other images named "imagenet" gets
    ImageNet's numbers.   is_one_step: for samples that are completed from real codes in one step.
    """
    if title is None:
        return None
    plain = title.strip().lower()
    names = [f"{name}{resolution}" for name, pattern in _TITLES.items() if pattern.fullmatch(plain)]
    names += [REFERENCE_FILES[plain]] if plain in REFERENCE_FILES else []
    wanted = [f"{name}-one-step" if is_one_step else name for name in names]
    return next((name for name in wanted if name in SETS and shows(name, resolution, is_one_step=is_one_step)), None)


def shows(dataset: str, resolution: int | None, *, is_one_step: bool) -> bool:
    """Whether published numbers of a dataset have this resolution (None: unknown) and kind."""
    known = SETS[dataset]
    return resolution in (None, known.resolution) and known.is_one_step == is_one_step
