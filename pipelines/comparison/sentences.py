"""Sentences of a comparison: what a section is of, how it was measured, and how that differs from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparison.columns import MISSING, alike
from pipelines.comparison.published import REFERENCE_FILES, SETS
from pipelines.comparison.query import Comparison
from pipelines.comparison.sections import Section

_PROTOCOL_KEYS = (  # in this order in sentences
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
_DIGEST_SHOWN = 12
CONVENTION = (
    "GMACs and TFLOPs of an image are multiply-accumulates, each counted once, as ENAT's paper does: all steps, both passes of "
    "guidance, and the tokenizer's decoder. In CSV and JSON, TFLOPs are called tmacs_total, and gflops_total counts each twice."
)


def heading(section: Section) -> str:
    parts = [section.dataset or "a dataset that is not known"]
    parts += [f"{section.resolution} px"] if section.resolution else []
    parts += ["completed from real codes"] if section.begins_with_codes else []
    return ", ".join(parts)


def alike_sentence(section: Section) -> str:
    """What the rows of a section have alike, so that it needs no columns."""
    told = alike(section)
    sentence = f"Measured here {told.pop('date', '')}".rstrip()
    joint = ", all with " if len(section.rows) > 1 else " with "
    return f"{sentence}{joint}{', '.join(told.values())}" if told else sentence


def protocol_sentence(protocol: Mapping[str, Any]) -> str:
    """How the numbers of a section were measured."""
    if not protocol:
        return "how these were measured is not known"
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
    """What protocols differ in: the letters of the sections that share each protocol, and (key, value in each of them).

    The second is empty where all sections measure alike.
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
    """Of the columns of differences."""
    if any(", " in column for column in letters):
        return "Numbers are comparable only where their letters stand above the same column; their protocols differ in:"
    return "Numbers of different letters are not comparable; their protocols differ in:"


def _plain(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text[:_DIGEST_SHOWN] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def published_sentence(sections: Sequence[Section]) -> str:
    """What to keep in mind of quoted numbers beside measured ones. sections: those beside which the same numbers are quoted."""
    dataset = sections[0].published_dataset
    assert dataset is not None
    usual = SETS[dataset]
    sentence = "Quoted rows are what their sources report, each by its own protocol; nothing of them was measured here. "
    if usual.num_samples is None:
        return f"{sentence}It is not known how many samples they are of."
    sentence += f"They are usually of {usual.num_samples:,} samples {usual.labels}, against {usual.reference}."
    unlike = {section.name: unlike_published(section) for section in sections}
    told = [f"{name}: {', '.join(parts)}" if len(sections) > 1 else ", ".join(parts) for name, parts in unlike.items() if parts]
    return f"{sentence} Otherwise here: {'; '.join(told)}." if told else sentence


def unlike_published(section: Section) -> list[str]:
    """In what a section was measured unlike published numbers usually are."""
    assert section.published_dataset is not None
    usual, protocol = SETS[section.published_dataset], section.protocol
    if not protocol:
        return ["how it was measured is not known"]
    parts = []
    num_samples, num_reference = protocol.get("num_samples"), protocol.get("num_reference")
    if isinstance(num_samples, int) and usual.num_samples is not None and num_samples != usual.num_samples:
        effect = "so FID comes out higher" if num_samples < usual.num_samples else "so FID comes out lower"
        parts.append(f"{num_samples:,} samples, {effect}")
    if usual.schemes and not str(protocol.get("labels")).startswith(usual.schemes):
        parts.append(f"labels {protocol.get('labels', 'not known')}")
    is_known_file = str(section.dataset).lower() in REFERENCE_FILES
    if num_reference != usual.num_reference and not is_known_file:
        count = "a number of images that is not known" if num_reference is None else f"{_plain(num_reference)} images"
        parts.append(f"against {count} of {section.dataset}")
    return parts
