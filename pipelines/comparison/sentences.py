"""Sentences of a comparison: what a section shows, how it was measured, and how protocols differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparison.columns import MISSING, Table
from pipelines.comparison.published import REFERENCE_FILES, SETS
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Row, Section
from pipelines.comparison.significance import has_errors, undecided
from pipelines.registry.influences import with_interval

_PROTOCOL_KEYS = (  # in the order of sentences
    "extractor",
    "num_samples",
    "labels",
    "reference",
    "num_reference",
    "rounding",
    "metric_version",
    "extractor_digest",
    "reference_digest",
)
DISTANCE_TITLES = {"fid": "FID", "frechet_distance": "Fréchet distance"}
_DIGEST_SHOWN = 12
CONVENTION = (
    "GMACs and TFLOPs are multiply-accumulates per image, counted once as in the ENAT paper: all steps, both passes of guidance, "
    "and the tokenizer's decoder. In CSV and JSON, tmacs_total are the TFLOPs, and gflops_total counts each as two operations."
)

_QUOTED_COLUMNS = (
    "The column reference names what each is measured against: train or val, images of the dataset; virtual, ADM's statistics of "
    "ImageNet; or unknown. TFLOPs are measured (counted by this code), stated by the source, or derived."
)


def heading(section: Section) -> str:
    parts = [section.dataset or "unknown dataset"]
    parts += [f"{section.resolution} px"] if section.resolution else []
    parts += ["completed from real codes"] if section.begins_with_codes else []
    return ", ".join(parts)


def alike_sentence(table: Table) -> str:
    """Values that all rows share and that need no column."""
    told = dict(table.alike)
    sentence = f"Measured here {told.pop('date', '')}".rstrip()
    joint = ", all with " if len(table.rows) > 1 else " with "
    return f"{sentence}{joint}{', '.join(told.values())}" if told else sentence


def errors_sentence(section: Section) -> str:
    """What ± means, and which rows are not distinguishable from the best; empty if no row has errors."""
    if not has_errors(section):
        return ""
    sentence = (
        "± is half of the 95% interval over the drawing of samples. Bold scores are those that no other row beats significantly."
    )
    rows = undecided(section)
    if len(rows) > 1 and section.distance is not None:
        leader, *others = rows
        names = ", ".join(_unique_name(row, section) for row in others)
        verb = "are" if len(others) > 1 else "is"
        sentence += f" By {DISTANCE_TITLES[section.distance]}, not distinguishable at 95% from the best,"
        sentence += f" {_unique_name(leader, section)}, {verb}: {names}."
    return sentence


def _unique_name(row: Row, section: Section) -> str:
    """With the settings of the sampler if rows of the section share the name."""
    is_shared = sum(other.name == row.name for other in section.rows) > 1
    return f"{row.name} ({', '.join(_settings(row))})" if is_shared else row.name


def details(row: Row) -> list[str]:
    """The settings of the sampler and the score: "8 steps", "guidance 3.5", "FID 2.79 ± 0.12"."""
    scores = [f"{title} {with_interval(row.metrics, name)}" for name, title in DISTANCE_TITLES.items() if name in row.metrics]
    return _settings(row) + scores


def _settings(row: Row) -> list[str]:
    parts = [f"{row.num_steps} step{'s' if row.num_steps > 1 else ''}"] if row.num_steps else []
    parts += [f"guidance {row.guidance_scale:g}"] if row.guidance_scale is not None else []
    parts += [f"EMA length {row.ema_length:g}"] if row.ema_length is not None else []
    return parts + ([f"mask ratio {row.mask_ratio:g}"] if row.mask_ratio is not None else [])


def protocol_sentence(protocol: Mapping[str, Any]) -> str:
    """How the numbers of a section were measured."""
    if not protocol:
        return "unknown protocol"
    parts = []
    if "extractor" in protocol:
        parts.append(f"{protocol['extractor']} features")
    if "num_samples" in protocol:
        parts.append(f"{_plain(protocol['num_samples'])} samples")
    if "labels" in protocol:
        parts.append(f"labels {protocol['labels']}")
    if "reference" in protocol:
        count = f"{_plain(protocol['num_reference'])} images of " if protocol.get("num_reference") is not None else ""
        parts.append(f"against {count}{protocol['reference']}")
    if "rounding" in protocol:
        parts.append(f"pixels as {protocol['rounding']}")
    return ", ".join(parts) or "see the protocol"


def differences(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """How protocols differ: the letters of the sections with each protocol, and rows (key, value in each protocol).

    Equal protocols give no rows.
    """
    groups: dict[str, list[Section]] = {}
    for section in comparison.sections:
        groups.setdefault(section.protocol_digest or "", []).append(section)
    letters = [", ".join(section.name for section in group) for group in groups.values()]
    protocols = [group[0].protocol for group in groups.values()]
    keys = [*_PROTOCOL_KEYS, *sorted({key for protocol in protocols for key in protocol} - set(_PROTOCOL_KEYS))]
    rows = []
    for key in keys:
        values = [_plain(protocol[key]) if key in protocol else MISSING for protocol in protocols]
        if len(set(values)) > 1:
            rows.append((key.replace("_", " "), values))
    return letters, rows


def differences_sentence(letters: Sequence[str]) -> str:
    """Heading of the table of differences."""
    if any(", " in column for column in letters):
        return "Numbers are comparable only if their letters share a column. The protocols differ in:"
    return "Numbers with different letters are not comparable. The protocols differ in:"


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text[:_DIGEST_SHOWN] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def published_sentence(sections: Sequence[Section]) -> str:
    """Caveats of comparing with published numbers. sections: those that share the same published numbers."""
    dataset = sections[0].published_dataset
    assert dataset is not None
    usual = SETS[dataset]
    sentence = "Quoted rows are scores from their sources, each with its own protocol. None of them was measured here. "
    if usual.num_samples is None:
        return f"{sentence}Their numbers of samples and their references are unknown."
    sentence += f"They usually use {usual.num_samples:,} samples {usual.labels}, against {usual.reference}. {_QUOTED_COLUMNS}"
    unlike = {section.name: unlike_published(section) for section in sections}
    told = [f"{name}: {', '.join(parts)}" if len(sections) > 1 else ", ".join(parts) for name, parts in unlike.items() if parts]
    return f"{sentence} Differences here: {'; '.join(told)}." if told else sentence


def unlike_published(section: Section) -> list[str]:
    """How the protocol of a section differs from that of published numbers."""
    assert section.published_dataset is not None
    usual, protocol = SETS[section.published_dataset], section.protocol
    if not protocol:
        return ["unknown protocol"]
    parts = []
    num_samples, num_reference = protocol.get("num_samples"), protocol.get("num_reference")
    if isinstance(num_samples, int) and usual.num_samples is not None and num_samples != usual.num_samples:
        effect = "which raises FID" if num_samples < usual.num_samples else "which lowers FID"
        parts.append(f"{num_samples:,} samples, {effect}")
    if usual.schemes and not str(protocol.get("labels")).startswith(usual.schemes):
        parts.append(f"labels {protocol.get('labels', 'unknown')}")
    is_known_file = str(section.dataset).lower() in REFERENCE_FILES
    if num_reference != usual.num_reference and not is_known_file:
        count = "an unknown number of images" if num_reference is None else f"{_plain(num_reference)} images"
        parts.append(f"against {count} of {section.dataset}")
    return parts
