"""Published results (published.yaml), and which of them can be compared with a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass


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


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Share = Annotated[float, Field(gt=0, le=1, strict=True)]
_Count = Annotated[int, Field(gt=0, strict=True)]


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PublishedResult:
    """One published system. None: unknown.

    reference: what FID is measured against: images of the dataset (train, val), ADM's statistics of ImageNet (virtual), or unknown.
    source: paper or README, with the table where known.   params_millions: of the generator.
    tflops: 10^12 multiply-accumulates per image, including both passes of guidance and, if has_decoder, the tokenizer's decoder.
    cost_basis: whether tflops are counted by this code (measured), stated by the source, or derived from a configuration or from
    the cost of a pass. Required with tflops.
    is_guided: with guidance by a classifier or free of one.   num_samples: that the scores are of.
    tokenizer, rfid: the autoencoder, and the FID of its reconstructions.
    mask_ratio: for one-step decoding, the share of real codes that is masked.
    """

    name: str
    dataset: str
    reference: Literal["train", "val", "virtual", "unknown"]
    source: str
    note: str = ""
    params_millions: _Positive | None = None
    steps: _Count | None = None
    tflops: _Positive | None = None
    cost_basis: Literal["measured", "stated", "derived"] | None = None
    fid: _Positive | None = None
    inception_score: _Positive | None = None
    precision: _Share | None = None
    recall: _Share | None = None
    is_guided: StrictBool | None = None
    num_samples: _Count | None = None
    tokenizer: str | None = None
    rfid: _Positive | None = None
    mask_ratio: _Positive | None = None
    has_decoder: StrictBool = True
    is_unconditional: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> PublishedResult:
        if self.dataset not in SETS:
            raise ValueError(f"{self.name} has dataset {self.dataset!r}; choose one of {', '.join(DATASETS)}")
        if (self.mask_ratio is not None) != SETS[self.dataset].is_one_step:
            raise ValueError(f"{self.name}: mask_ratio is required for one-step decoding and not allowed otherwise")
        if (self.cost_basis is None) != (self.tflops is None):
            raise ValueError(f"{self.name}: cost_basis is required with tflops and not allowed otherwise")
        return self

    @property
    def label(self) -> str:
        """Name, marked if unconditional: such scores do not compare with class-conditional ones."""
        return f"{self.name} (unconditional)" if self.is_unconditional else self.name


@cache
def load_published() -> tuple[PublishedResult, ...]:
    """All rows of published.yaml, in order."""
    return read_published((resources.files("pipelines.comparison") / "published.yaml").read_text(encoding="utf-8"))


def read_published(text: str) -> tuple[PublishedResult, ...]:
    """Parse the text of such a file. Raises ValueError, with the number of the row from 0, if it is not valid."""
    import yaml

    return tuple(TypeAdapter(list[PublishedResult]).validate_python(yaml.safe_load(text)))


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
