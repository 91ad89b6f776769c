"""A comparison as text: its columns, the table in a terminal, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pipelines.artifacts import without_credentials
from pipelines.comparison import Comparison, Row, Section
from pipelines.published import USUAL_SAMPLES, PublishedResult

MISSING = "–"
MEASURED = "measured here"
_GMACS_PER_TERA = 1000.0
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
_TEXT_WIDTH = 36  # of a cell in a terminal; longer text is folded
_ANY_WIDTH = 100_000
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """key: of a record.   shown: value -> text.   better: the direction in which a score improves, or "".

    rank: where a terminal is narrow, columns of higher rank are left out first.   std: key of the spread shown beside the value.
    """

    key: str
    title: str
    shown: Callable[[Any], str]
    better: str = ""
    rank: int = 0
    std: str = ""


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    """Three significant digits and no exponent for what occurs here: 0.347, 12.8, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _score(value: float) -> str:
    """Two decimals, as papers give scores; more for small ones."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def short_count(value: float) -> str:
    """1_300_000 -> "1.3M", 574_300_000 -> "574M", 1_040_700_000 -> "1.04B" """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


COLUMNS = (
    Column("model", "model", str),
    Column("variant", "variant", str, rank=1),
    Column("config_run", "run", str, rank=7),
    Column("parameters", "params", short_count, rank=1),
    Column("train_steps", "train steps", _count, rank=4),
    Column("num_steps", "steps", _count),
    Column("guidance_scale", "guidance", _short),
    Column("gmacs_total", "GMACs", _short),
    Column("tflops", "TFLOPs", _short),
    Column("gmacs_executed", "GMACs executed", _short, rank=9),
    Column("images_per_second", "images/s", _short, "higher", rank=3),
    Column("device_seconds_per_image", "device s/image", _short, rank=8),
    Column("worker_seconds_per_image", "worker s/image", _short, rank=8),
    Column("peak_memory_gb", "peak GB", _short, rank=8),
    Column("fid", "FID", _score, "lower"),
    Column("frechet_distance", "Fréchet dist.", _score, "lower"),
    Column("sfid", "sFID", _score, "lower", rank=5),
    Column("inception_score", "IS", _score, "higher", rank=3, std="inception_score_std"),
    Column("kid", "KID", _short, "lower", rank=5, std="kid_std"),
    Column("kernel_distance", "kernel dist.", _short, "lower", rank=5, std="kernel_distance_std"),
    Column("precision", "precision", _share, "higher", rank=4),
    Column("recall", "recall", _share, "higher", rank=4),
    Column("density", "density", _share, "higher", rank=6),
    Column("coverage", "coverage", _share, "higher", rank=6),
    Column("class_agreement", "agreement", _percent, "higher", rank=2),
    Column("num_samples", "samples", _count, rank=6),
    Column("cost/total_device_hours", "device hours", _short, rank=7),
    Column("cost/total_worker_hours", "worker hours", _short, rank=8),
    Column("cost/total_money", "money", _short, rank=7),
    Column("date", "date", str, rank=5),
    Column("source", "source", str, rank=2),
)

# Of what others published.
QUOTED_COLUMNS = (
    Column("model", "quoted", str),
    Column("parameters", "params", short_count),
    Column("num_steps", "steps", _count),
    Column("tflops", "TFLOPs", _short),
    Column("fid", "FID", _score),
    Column("source", "source", str),
    Column("note", "note", str, rank=1),
)


# Records -------------------------------------------------------------------------------------------------------------------


def record(row: Row) -> dict[str, Any]:
    """A measured row as flat values, by the keys of COLUMNS and the names of metrics. What is not known is absent."""
    gmacs = row.metrics.get("gmacs_total")
    values = {
        **row.metrics,
        "model": row.model,
        "variant": row.variant,
        "config_run": row.config_run,
        "dataset": row.dataset,
        "resolution": row.resolution,
        "parameters": row.parameters,
        "train_steps": row.train_steps,
        "num_steps": row.num_steps,
        "guidance_scale": row.guidance_scale,
        "num_samples": row.num_samples,
        "tflops": None if gmacs is None else gmacs / _GMACS_PER_TERA,
        "date": f"{row.measured:%Y-%m-%d}",
        "source": MEASURED,
        "samples": row.samples,
        "run_id": row.run_ids[0],
    }
    return {name: value for name, value in values.items() if value is not None}


def quoted_record(result: PublishedResult) -> dict[str, Any]:
    """A published row in the same terms."""
    values = {
        "model": result.name,
        "dataset": result.dataset,
        "parameters": None if result.params_millions is None else result.params_millions * 1e6,
        "num_steps": result.steps,
        "tflops": result.tflops,
        "gmacs_total": None if result.tflops is None else result.tflops * _GMACS_PER_TERA,
        "fid": result.fid,
        "source": result.source,
        "note": result.note or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def by_score(results: Sequence[PublishedResult]) -> list[PublishedResult]:
    """The best first, those without a score last."""
    return sorted(results, key=lambda result: (result.fid is None, result.fid or 0.0, result.name))


def columns_of(section: Section) -> list[Column]:
    """Those that say something: of the measured rows at least one has a value, and MAIN alone is no variant."""
    records = [record(row) for row in section.rows]
    present = {name for values in records for name in values}
    if all(row.variant == "main" for row in section.rows):
        present.discard("variant")
    if len({row.config_run for row in section.rows}) == 1:
        present.discard("config_run")
    if len({row.num_samples for row in section.rows}) == 1:
        present.discard("num_samples")  # the heading says it
    if not section.published:
        present.discard("source")
    largest = max((values["gmacs_total"] for values in records if "gmacs_total" in values), default=0.0)
    present.discard("gmacs_total" if largest >= 100 or section.published else "tflops")
    return [column for column in COLUMNS if column.key in present]


def cell(values: Record, column: Column) -> str:
    if column.key not in values:
        return MISSING
    text = column.shown(values[column.key])
    return f"{text} ± {column.shown(values[column.std])}" if column.std in values else text


def best_values(section: Section, columns: Sequence[Column]) -> dict[str, float]:
    """Column -> the best measured value, where there are different ones to choose from."""
    best = {}
    for column in columns:
        values = [found[column.key] for found in map(record, section.rows) if column.key in found]
        if column.better and len(set(values)) > 1:
            best[column.key] = (min if column.better == "lower" else max)(values)
    return best


# Sentences -----------------------------------------------------------------------------------------------------------------


def heading(section: Section) -> str:
    title = section.dataset or "a dataset that is not known"
    return f"{title}, {section.resolution} px" if section.resolution else title


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
        count = f"{_plain(protocol['num_reference'])} images of " if "num_reference" in protocol else ""
        parts.append(f"against {count}{protocol['reference']}")
    if "rounding" in protocol:
        parts.append(f"pixels as {protocol['rounding']}")
    return ", ".join(parts) or "see the protocol"


def differences(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What protocols differ in: (key, value in each section). Empty where all sections measure alike."""
    protocols = [section.protocol for section in comparison.sections]
    keys = [*_PROTOCOL_KEYS, *sorted({key for protocol in protocols for key in protocol} - set(_PROTOCOL_KEYS))]
    rows = []
    for key in keys:
        values = [_plain(protocol[key]) if key in protocol else MISSING for protocol in protocols]
        if len(set(values)) > 1:
            rows.append((key.replace("_", " "), values))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text[:_DIGEST_SHOWN] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def published_sentence(section: Section) -> str:
    """What to keep in mind of quoted numbers beside measured ones."""
    assert section.published_dataset is not None
    usual = USUAL_SAMPLES[section.published_dataset]
    sentence = "Quoted rows are what their sources report, each by its own protocol; nothing of them was measured here."
    fewer = sorted({row.num_samples for row in section.rows if row.num_samples and row.num_samples < usual})
    if fewer:
        counts = " and ".join(f"{count:,}" for count in fewer)
        sentence += f" Published FIDs are usually of {usual:,} samples; with {counts}, as here, FID comes out higher."
    return sentence


CONVENTION = (
    "GMACs and TFLOPs of an image are multiply-accumulates as ENAT's paper counts them: all steps, both passes of guidance, and "
    "the tokenizer's decoder."
)


# Outputs -------------------------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """A table per section. Columns that the terminal has no room for are named below it."""
    for section in comparison.sections:
        name = f"{section.name}  " if len(comparison.sections) > 1 else ""
        console.print(f"[bold]{name}{escape(heading(section))}[/]", highlight=False)
        console.print(f"[dim]{escape(protocol_sentence(section.protocol))}[/]", highlight=False)
        columns = columns_of(section)
        best = best_values(section, columns)
        _show_rows([record(row) for row in section.rows], columns, best, "", console)
        if section.published:
            console.print()
            _show_rows(list(map(quoted_record, by_score(section.published))), QUOTED_COLUMNS, {}, "dim italic", console)
            console.print(f"[dim]{escape(published_sentence(section))}[/]", highlight=False)
        console.print()
    _show_differences(comparison, console)
    console.print(f"[dim]{CONVENTION}[/]", highlight=False)
    for note in comparison.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)


def _show_rows(
    records: Sequence[Record], columns: Sequence[Column], best: Mapping[str, float], style: str, console: Console
) -> None:
    left_out: list[str] = []
    while _width(table := _table(records, columns, best, style), console) > console.width and any(c.rank for c in columns):
        dropped = max(columns, key=lambda column: column.rank)
        columns = [column for column in columns if column is not dropped]
        left_out.insert(0, dropped.title)
    console.print(table)
    if left_out:
        console.print(f"[dim]no room for {', '.join(left_out)}: see --csv or --html[/]", highlight=False)


def _table(records: Sequence[Record], columns: Sequence[Column], best: Mapping[str, float], style: str) -> Table:
    table = Table(box=None, pad_edge=False, row_styles=[style])
    for column in columns:
        is_text = column.shown is str
        table.add_column(
            column.title,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
            max_width=_TEXT_WIDTH if is_text else None,
        )
    for values in records:
        cells = (escape(cell(values, column)) for column in columns)
        is_best = (column.key in best and values.get(column.key) == best[column.key] for column in columns)
        table.add_row(*(f"[bold green]{text}[/]" if good else text for text, good in zip(cells, is_best, strict=True)))
    return table


def _width(table: Table, console: Console) -> int:
    """What the table would take if it had all the room it wants."""
    return Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum


def _show_differences(comparison: Comparison, console: Console) -> None:
    different = differences(comparison)
    if not different:
        return
    console.print("[bold]Numbers of different letters are not comparable.[/] Their protocols differ in:")
    table = Table(box=None, pad_edge=False)
    for column in ("", *(section.name for section in comparison.sections)):
        table.add_column(column, overflow="fold")
    for key, values in different:
        table.add_row(escape(key), *map(escape, values))
    console.print(table)
    console.print()


def to_csv(comparison: Comparison) -> str:
    """A line per row, quoted ones included (column source tells them apart), with every metric and the protocol."""
    records = []
    for section in comparison.sections:
        shared = {"section": section.name, "protocol_digest": section.protocol_digest}
        protocol = {f"protocol_{name}": value for name, value in section.protocol.items()}
        records += [{**shared, **record(row), **protocol} for row in section.rows]
        records += [{"section": section.name, **quoted_record(result)} for result in section.published]
    first = ["section", *(column.key for column in COLUMNS)]
    seen = {name for values in records for name in values}
    names = [name for name in first if name in seen] + sorted(seen - set(first))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in values.items()} for values in records)
    return buffer.getvalue()


def _csv_value(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula; an apostrophe keeps it text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def to_json(comparison: Comparison) -> dict[str, Any]:
    sections = [
        {
            "name": section.name,
            "dataset": section.dataset,
            "resolution": section.resolution,
            "protocol_digest": section.protocol_digest,
            "protocol": dict(section.protocol),
            "rows": [{**record(row), "run_ids": list(row.run_ids), "metrics": dict(row.metrics)} for row in section.rows],
            "published": [asdict(result) for result in section.published],
        }
        for section in comparison.sections
    ]
    return {"uri": without_credentials(comparison.uri), "sections": sections, "notes": list(comparison.notes)}
