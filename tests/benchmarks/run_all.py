"""All benchmarks of `make bench` as one table of ratios, each over its rival or limit. The figures of all are kept as JSON.

.venv/bin/python tests/benchmarks/run_all.py                                35 to 45 minutes on two cores
.venv/bin/python tests/benchmarks/run_all.py metrics --folder /tmp/bench    some of them
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from common import where
from rich.console import Console
from rich.table import Table

_FOLDER = Path(__file__).parent
BENCHMARKS = {
    "tokenization": (),
    "training": (),
    "sampling": (),
    "evaluation": (),
    "metrics": (),
    "side_by_side": ("--no-models",),
}
_RATIO = re.compile(r"(?P<what>.+?)_(?:over|share_of)_(?P<rival>.+)|(?P<name>.+)_ratio")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*BENCHMARKS]))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True, help="Of the JSON files.")
def main(names: tuple[str, ...], folder: Path) -> None:
    measured: dict[str, Any] = {}
    failed: list[str] = []
    machine = where()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S}-{machine['commit'].rpartition('+')[2][:13]}.json"
    for name in names or BENCHMARKS:
        click.echo(f"{name} ...", err=True)
        command = [sys.executable, str(_FOLDER / f"{name}.py"), *BENCHMARKS[name], "--json"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            failed.append(name)
            click.echo(f"benchmark {name} failed: {finished.stderr}", err=True)
        else:
            measured[name] = json.loads(finished.stdout)
            path.write_text(json.dumps({**machine, "figures": measured}, indent=1))  # now, because the others may take half an hour
    if measured:
        _show(measured, machine)
        click.echo(f"all figures: {path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; once fixed, measure them alone by their names")


def _show(measured: dict[str, Any], machine: dict[str, str]) -> None:
    table = Table(title=f"{machine['hardware']}, {machine['commit']}", title_justify="left", box=None)
    for title in ("benchmark", "what", "over", "ratio"):
        table.add_column(title, justify="right" if title == "ratio" else "left")
    for row in rows(measured):
        table.add_row(*row)
    Console(width=120).print(table)


def rows(measured: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """The ratios among the figures: benchmark, what, the rival or limit, the ratio. Their names state both sides."""
    found = []
    for benchmark, figures in measured.items():
        for name, value in figures.items():
            match = _RATIO.fullmatch(name)
            if match is None or isinstance(value, str | bool):
                continue
            what, rival = (match["what"], match["rival"]) if match["what"] else (match["name"], "the other")
            found.append((benchmark, what.replace("_", " "), rival.replace("_", " "), f"{value:.3g}"))
    return found


if __name__ == "__main__":
    main()
