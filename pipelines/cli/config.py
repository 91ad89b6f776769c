"""`enat config`."""

from __future__ import annotations

import dataclasses

import click

from pipelines.cli.options import JSON, console, echo_json


@click.command()
@click.argument("key", required=False, default="")
@JSON
def config(key: str, as_json: bool) -> None:
    """Describe the keys of a config: the sections, the keys of section KEY, or all about one KEY such as train.num_steps."""
    from rich.markup import escape
    from rich.table import Table

    from pipelines.run import keys

    found = keys.find(key)
    if as_json:
        echo_json([dataclasses.asdict(each) for each in found])
        return
    terminal = console()
    if key and len(found) == 1:
        (only,) = found
        lines = {"type": only.type, "default": only.default or "", "unit": only.unit, "in key": only.in_key}
        terminal.print(f"[bold]{escape(only.path)}[/]  {escape(only.text)}", highlight=False)
        for name, value in lines.items():
            if value:
                terminal.print(f"  [dim]{name:<8}[/]{escape(value)}", highlight=False)
        return
    if key:
        terminal.print(f"[bold]{escape(key)}[/]  {escape(found[0].text)}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("key", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column != "meaning")
    for each in found[1:] if key else found:
        default = "..." if each.default is None else each.default
        table.add_row(escape(each.path), escape(default), escape(each.text))
    terminal.print(table, highlight=False)
