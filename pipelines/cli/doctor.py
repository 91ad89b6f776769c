"""`enat doctor`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from pipelines.cli.options import JSON, console, echo_json, split_overrides

_SIGNS = {"good": "[green]✓[/]", "warning": "[yellow]![/]", "bad": "[red]✗[/]"}


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@JSON
def doctor(arguments: tuple[str, ...], as_json: bool) -> None:
    """Check Python, packages, devices, disk, Ray, store, tracking, dataset and weights for a run of CONFIG.

    The exit code is 1 if something would prevent the run.
    """
    from pipelines import doctor as examining
    from pipelines.formatting import one_line
    from pipelines.run.config import RunConfig
    from pipelines.workflow import config as configuration

    config, overrides = split_overrides(arguments, "CONFIG")
    values = overrides if config else ["name=doctor", *overrides]
    run = configuration.load_config(RunConfig, Path(config) if config else None, values)
    terminal, findings = console(stderr=as_json), []
    for finding in examining.examine(run, is_of_run=config is not None):
        findings.append(finding)
        if not as_json:
            terminal.print(f"{_SIGNS[finding.state]} {finding.what:<14}{one_line(finding.detail)}", highlight=False, soft_wrap=True)
            if finding.advice:
                terminal.print(f"  {'':<14}[dim]{one_line(finding.advice)}[/]", highlight=False, soft_wrap=True)
    if as_json:
        echo_json([dataclasses.asdict(finding) for finding in findings])
    sys.exit(1 if any(finding.state == examining.BAD for finding in findings) else 0)
