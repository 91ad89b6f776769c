"""`enat run`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipelines.cli.options import CONFIG, JSON, OVERRIDES, console


@click.command()
@CONFIG
@OVERRIDES
@JSON
def run(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run the stages of CONFIG. Existing artifacts are reused, and interrupted stages resume.

    `enat config` lists the keys of a CONFIG and describes them.
    """
    from pipelines.run import config as run_config
    from pipelines.run import runner, summary

    terminal = console(stderr=as_json)
    answer = runner.run(run_config.load_run(config, overrides), str(config), terminal)
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show(answer, terminal)
