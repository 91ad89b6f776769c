"""A comparison as text: the tables in a terminal, CSV and JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as Drawn

from pipelines.comparison.columns import COLUMNS, Cell, Table, measured_table, quoted_record, quoted_table, record
from pipelines.comparison.published import PublishedResult
from pipelines.comparison.query import Comparison
from pipelines.comparison.sentences import (
    CONVENTION,
    alike_sentence,
    differences,
    differences_sentence,
    errors_sentence,
    heading,
    protocol_sentence,
    published_sentence,
)
from pipelines.storage.redaction import without_credentials

_TEXT_WIDTH = 36  # of a cell in a terminal; longer text is wrapped
_ANY_WIDTH = 100_000


def show(comparison: Comparison, console: Console) -> None:
    """Print a table per section. Columns that do not fit into the terminal are listed below it."""
    quoted = comparison.quoted
    for section in comparison.sections:
        name = f"{section.name}  " if len(comparison.sections) > 1 else ""
        console.print(f"[bold]{name}{escape(heading(section))}[/]", highlight=False)
        console.print(f"[dim]{escape(protocol_sentence(section.protocol))}[/]", highlight=False)
        table = measured_table(section)
        console.print(f"[dim]{escape(alike_sentence(table))}[/]", highlight=False)
        _show_table(table, "", console)
        if text := errors_sentence(section):
            console.print(f"[dim]{escape(text)}[/]", highlight=False)
        console.print()
        if section.name in quoted:
            _show_table(quoted_table(section.published), "dim italic", console)
            console.print(f"[dim]{escape(published_sentence(quoted[section.name]))}[/]\n", highlight=False)
    _show_differences(comparison, console)
    console.print(f"[dim]{CONVENTION}[/]", highlight=False)
    for note in comparison.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)


def _show_table(table: Table, style: str, console: Console) -> None:
    left_out: list[str] = []
    while _width(drawn := _drawn(table, style), console) > console.width and any(column.rank for column in table.columns):
        highest = max(column.rank for column in table.columns)
        left_out = [column.title for column in table.columns if column.rank == highest] + left_out
        table = table.only(lambda column, highest=highest: column.rank < highest)  # type: ignore[misc]
    console.print(drawn)
    if left_out:
        console.print(f"[dim]no room for {escape(', '.join(left_out))}; use --csv or --html[/]", highlight=False)


def _drawn(table: Table, style: str) -> Drawn:
    drawn = Drawn(box=None, pad_edge=False, row_styles=[style])
    for column in table.columns:
        drawn.add_column(
            escape(column.title),  # a currency is arbitrary text
            justify="left" if column.is_text else "right",
            overflow="fold",
            no_wrap=not column.is_text,
            max_width=_TEXT_WIDTH if column.is_text else None,
        )
    for row in table.rows:
        drawn.add_row(*map(_marked, row))
    return drawn


def _marked(cell: Cell) -> str:
    return f"[bold green]{escape(cell.text)}[/]" if cell.is_best else escape(cell.text)


def _width(table: Drawn, console: Console) -> int:
    """Width of the table without a limit."""
    return Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum


def _show_differences(comparison: Comparison, console: Console) -> None:
    letters, different = differences(comparison)
    if not different:
        return
    console.print(f"[bold]{differences_sentence(letters)}[/]", highlight=False)
    table = Drawn(box=None, pad_edge=False)
    for column in ("", *letters):
        table.add_column(column, overflow="fold")
    for key, values in different:
        table.add_row(escape(key), *map(escape, values))
    console.print(table)
    console.print()


# Files ---------------------------------------------------------------------------------------------------------------------


def to_csv(comparison: Comparison) -> str:
    """One line per row with every metric and the protocol. The column source marks published rows.

    Published rows appear once, after the last section that they compare with. Their column section lists all of these sections.
    """
    records: list[dict[str, Any]] = []
    quoted = comparison.quoted
    for section in comparison.sections:
        shared = {"section": section.name, "protocol_digest": section.protocol_digest}
        protocol = {f"protocol_{name}": value for name, value in section.protocol.items()}
        records += [{**shared, **record(row), **protocol} for row in section.rows]
        if section.name in quoted:
            letters = " ".join(beside.name for beside in quoted[section.name])
            records += [{"section": letters, **quoted_record(result)} for result in section.published]
    first = ["section", "source", "model", "variant", *(column.key for column in COLUMNS)]
    seen = {name for values in records for name in values}
    names = [name for name in first if name in seen] + sorted(seen - set(first))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in values.items()} for values in records)
    return buffer.getvalue()


def _csv_value(value: Any) -> Any:
    """Spreadsheets evaluate text that starts like a formula. A leading apostrophe prevents this."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def to_json(comparison: Comparison) -> dict[str, Any]:
    sections = [
        {
            "name": section.name,
            "dataset": section.dataset,
            "resolution": section.resolution,
            "protocol_digest": section.protocol_digest,
            "protocol": dict(section.protocol),
            "rows": [
                {**record(row), "run_ids": list(row.run_ids), "metrics": dict(row.metrics), "currency": row.currency}
                for row in section.rows
            ],
            "published": [_published(result) for result in section.published],
        }
        for section in comparison.sections
    ]
    return {
        "uri": without_credentials(comparison.uri),
        "sections": sections,
        "curves": [asdict(curve) for curve in comparison.curves],
        "notes": list(comparison.notes),
    }


def _published(result: PublishedResult) -> dict[str, Any]:
    """A row of the file. Its MACs have the name that measured rows use."""
    return {"tmacs_total" if name == "tflops" else name: value for name, value in asdict(result).items()}
