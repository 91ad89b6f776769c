"""Shared by benchmarks: a process for every run, the name of the machine, one table of figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


def in_process(file: str, function: str, place: Path, *arguments: Any) -> Any:
    """Call a function of a benchmark in a new process: no run profits from the warm memory of another. Results are JSON."""
    call = json.dumps([function, str(place), *arguments])
    finished = subprocess.run([sys.executable, file, "--call", call], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def run_script(functions: Mapping[str, Any], main: click.Command) -> None:
    """Entry point of a benchmark: its command, or one of its functions for in_process."""
    if sys.argv[1:2] == ["--call"]:
        name, folder, *rest = json.loads(sys.argv[2])
        print(json.dumps(functions[name](Path(folder), *rest)))  # noqa: T201
    else:
        main()


def show(title: str, figures: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("figure")
    table.add_column("value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console(width=120).print(table)


def where() -> dict[str, str]:
    """The machine and the commit, shown above all figures."""
    from pipelines.workflow.provenance import code_version

    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {"hardware": f"{os.cpu_count()} x {names[0] if names else platform.machine()}", "commit": code_version()}
