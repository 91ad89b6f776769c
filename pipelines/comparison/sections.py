"""What is compared: rows, one for each set of samples and protocol, and sections of rows that were measured alike.

A section is of what its numbers were measured against, whatever the models were trained on: imported weights and images of other
generators stand beside models of this store wherever the same protocol scored them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from pipelines.comparison.published import DATASETS, PublishedResult, matching_dataset, published_for, shows

MAIN = "main"
REAL_CODES = "token map rows"  # the label scheme of samples that begin with codes of real images
_DISTANCES = ("fid", "frechet_distance")
_REFERENCE = re.compile(r"(?P<dataset>.+?), \d+ px(, .+)?")  # what stage reference calls itself: "imagenet, 256 px, adm-center"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of samples, scored by one protocol. What is not known is None, or no metric.

    run_ids: runs that logged these numbers, the newest first; it is the one that counts.   measured: start of the first of them.
    dataset: that the model was trained on; of outside samples, that of the reference.
    mask_ratio: of samples that began with codes of real images, the share that was masked.
    device, images_per_pass, precision: what the samples were made with.   currency: of the metric cost/total_money.
    samples, trained: artifacts, as "stage/key".   evaluation: digest of the artifact that holds the scores.
    generated: parameters of the stage that made the samples; None where its run was not found.
    """

    run_ids: tuple[str, ...]
    config_run: str | None
    model: str
    variant: str
    dataset: str | None
    resolution: int | None
    parameters: int | None
    train_steps: int | None
    num_steps: int | None
    guidance_scale: float | None
    num_samples: int | None
    samples: str | None
    trained: str | None
    evaluation: str | None
    protocol_digest: str | None
    protocol: Mapping[str, Any]
    measured: datetime
    metrics: Mapping[str, float]
    mask_ratio: float | None = None
    device: str | None = None
    images_per_pass: int | None = None
    precision: str | None = None
    currency: str | None = None
    generated: Mapping[str, str] | None = None

    @property
    def label(self) -> str:
        return self.model if self.variant == MAIN else f"{self.model} ({self.variant})"

    @property
    def begins_with_codes(self) -> bool:
        """Of real images, so that the model fills in a part alone."""
        return self.mask_ratio is not None or self.protocol.get("labels") == REAL_CODES


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that were measured alike, by size, and what others published for the same dataset. name: a letter.

    dataset: of the reference; where the protocol is not known, that of the rows.
    """

    name: str
    dataset: str | None
    resolution: int | None
    protocol_digest: str | None
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    published: tuple[PublishedResult, ...] = ()
    published_dataset: str | None = None

    @cached_property
    def distance(self) -> str | None:
        """The metric that the figures draw: fid, or the Frechet distance on another extractor's features."""
        counts = Counter(name for row in self.rows for name in _DISTANCES if name in row.metrics)
        return max(_DISTANCES, key=lambda name: counts[name]) if counts else None

    @property
    def begins_with_codes(self) -> bool:
        return self.rows[0].begins_with_codes


@dataclass
class Notes:
    sentences: list[str] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        if sentence not in self.sentences:
            self.sentences.append(sentence)


def make_sections(rows: Sequence[Row], published: str, notes: Notes) -> tuple[Section, ...]:
    """published: "none", "auto" (by dataset and resolution) or one of published.DATASETS. Sections with the same quoted numbers
    follow each other."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    found = [_with_published(_section(group), published) for group in groups.values()]
    if published in DATASETS and not any(section.published for section in found):
        notes.add(f"Nothing here is an FID at the resolution of {published} and of its kind, so no published numbers are shown.")
    return tuple(replace(section, name=_letters(number)) for number, section in enumerate(sorted(found, key=_place)))


def _key(row: Row) -> tuple[Any, ...]:
    """What rows of a section have alike. Of an unknown protocol the dataset is all that can be told apart."""
    dataset = "" if row.protocol else row.dataset or ""
    return (dataset, row.resolution or 0, row.protocol_digest or "", row.begins_with_codes)


def _section(rows: Sequence[Row]) -> Section:
    first = rows[0]
    return Section(
        name="",
        dataset=reference_dataset(first.protocol) or first.dataset,
        resolution=first.resolution,
        protocol_digest=first.protocol_digest,
        protocol=first.protocol,
        rows=tuple(sorted(rows, key=_by_size)),
    )


def reference_dataset(protocol: Mapping[str, Any]) -> str | None:
    """Whose images the numbers were measured against: a dataset's name, or that of a file of statistics."""
    if "reference" not in protocol:
        return None
    text = str(protocol["reference"])
    found = _REFERENCE.fullmatch(text)
    return found["dataset"] if found else text


def _place(section: Section) -> tuple[Any, ...]:
    dataset = section.dataset or ""
    begins = section.begins_with_codes
    return (section.published_dataset or dataset, dataset, section.resolution or 0, begins, section.protocol_digest or "")


def _by_size(row: Row) -> tuple[Any, ...]:
    return (
        row.parameters if row.parameters is not None else math.inf,
        row.model,
        row.train_steps or 0,
        row.mask_ratio or 0.0,
        row.num_steps or 0,
        row.guidance_scale or 0.0,
        row.variant != MAIN,
        row.variant,
        row.samples or "",
    )


def _letters(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA"""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def _with_published(section: Section, published: str) -> Section:
    """Quoted numbers are FIDs of Inception features, of whole images or of one step from real codes, and belong beside the same."""
    if published == "none" or section.distance != "fid":
        return section
    is_one_step = section.begins_with_codes and any(row.num_steps == 1 for row in section.rows)
    if section.begins_with_codes and not is_one_step:
        return section
    if published == "auto":
        dataset = matching_dataset(section.dataset, section.resolution, is_one_step=is_one_step)
    else:
        dataset = published if shows(published, section.resolution, is_one_step=is_one_step) else None
    if dataset is None:
        return section
    return replace(section, published=published_for(dataset), published_dataset=dataset)


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> the rows of one trained model. Models that are called alike but are not the same are told apart by their runs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.trained or row.label, []).append(row)
    named: dict[str, list[Row]] = {}
    for group in groups.values():
        first = group[0]
        name = first.label if len({row.label for row in group}) == 1 else first.model
        if name in named:
            name = f"{name}, {first.config_run or first.trained}"
        while name in named:
            name += "'"
        named[name] = group
    return named
