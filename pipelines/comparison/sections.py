"""Rows, one per set of samples and protocol, and sections of rows that were measured in the same way.

The reference defines a section, not the training data: imported weights and images of other generators share a section with models
of this store if the same protocol scored them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from pipelines.comparison.published import DATASETS, PublishedResult, matching_dataset, published_for, shows
from pipelines.registry.evaluation_record import DISTANCES
from pipelines.registry.influences import Influences
from pipelines.workflow.stage import MAIN

REAL_CODES = "token map rows"  # label scheme of samples that start from codes of real images
_REFERENCE = re.compile(r"(?P<dataset>.+?), \d+ px(, .+)?")  # name of a reference: "imagenet, 256 px, adm-center"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of samples, scored by one protocol. Unknown values are None, unknown metrics are absent.

    run_ids: runs that logged these numbers, newest first; the newest counts.   measured: start of the first of them.
    model, variant: as tagged.   name: how tables, charts and samples name the row.   model_name: of its trained model, unique in
    the comparison.
    dataset: training data of the model; for outside samples, of the reference.   reference: what its data is called now.
    ema_length: of the average of the weights, None for the usual one.
    mask_ratio: masked share of the codes, for samples that start from codes of real images.
    device, images_per_pass, precision: used to generate the samples.   currency: of the metric cost/total_money.
    samples, trained: artifacts as "stage/key".   evaluation: digest of the artifact with the scores.
    generated: parameters of the stage that generated the samples, None if its run was not found.
    influences: of the samples on the scores, for errors of differences; None if they are not known.
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
    reference: str | None = None
    mask_ratio: float | None = None
    ema_length: float | None = None
    device: str | None = None
    images_per_pass: int | None = None
    precision: str | None = None
    currency: str | None = None
    generated: Mapping[str, str] | None = None
    name: str = ""
    model_name: str = ""
    influences: Influences | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return self.model if self.variant == MAIN else f"{self.model} ({self.variant})"

    @property
    def begins_with_codes(self) -> bool:
        """Whether samples start from codes of real images, so the model generates only a part."""
        return self.mask_ratio is not None or self.protocol.get("labels") == REAL_CODES


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that were measured in the same way, by size, with published results for the same dataset. name: a letter.

    dataset: of the reference, or of the rows if the protocol is unknown.
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
        """The metric in the figures: fid, or the Frechet distance on features of another extractor."""
        counts = Counter(name for row in self.rows for name in DISTANCES if name in row.metrics)
        return max(DISTANCES, key=lambda name: counts[name]) if counts else None

    @property
    def begins_with_codes(self) -> bool:
        return self.rows[0].begins_with_codes


def make_sections(rows: Sequence[Row], published: str, notes: list[str]) -> tuple[Section, ...]:
    """Name and group rows. published: "none", "auto" (by dataset and resolution) or one of published.DATASETS. Sections with the
    same published numbers are adjacent."""
    groups = group_rows(_named(rows), _key)
    found = [_with_published(_section(group), published) for group in groups.values()]
    if published in DATASETS and not any(section.published for section in found):
        notes.append(f"No row has an FID at the resolution and of the kind of {published}, so no published numbers are shown.")
    return tuple(replace(section, name=_letters(number)) for number, section in enumerate(sorted(found, key=_place)))


def _key(row: Row) -> tuple[Any, ...]:
    """What defines a section. With unknown protocols, at least datasets are kept apart."""
    dataset = "" if row.protocol else row.dataset or ""
    return (dataset, row.resolution or 0, row.protocol_digest or "", row.begins_with_codes)


def _section(rows: Sequence[Row]) -> Section:
    first, newest = rows[0], max(rows, key=lambda row: row.measured)
    return Section(
        name="",
        dataset=newest.reference or reference_dataset(first.protocol) or first.dataset,
        resolution=first.resolution,
        protocol_digest=first.protocol_digest,
        protocol=first.protocol,
        rows=tuple(sorted(rows, key=_by_size)),
    )


def reference_dataset(protocol: Mapping[str, Any]) -> str | None:
    """Name of the reference's dataset or statistics file."""
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
    """Add published results, which are FIDs of whole images or of one step from real codes, to sections of the same kind."""
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


def _named(rows: Sequence[Row]) -> list[Row]:
    """Rows with their names. Different models with equal names get the name of their run as well."""
    named: dict[tuple[str, ...], Row] = {}
    taken: set[str] = set()
    for group in group_rows(rows, lambda row: row.trained or row.label).values():
        first, labels = group[0], {row.label for row in group}
        model = first.label if len(labels) == 1 else first.model
        names, suffix = {model, *labels}, ""
        if names & taken:
            suffix = f", {first.config_run or first.trained}"
        while {f"{name}{suffix}" for name in names} & taken:
            suffix += "'"
        taken |= {f"{name}{suffix}" for name in names}
        named |= {row.run_ids: replace(row, name=f"{row.label}{suffix}", model_name=f"{model}{suffix}") for row in group}
    return [named[row.run_ids] for row in rows]


def group_rows(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
