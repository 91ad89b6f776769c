"""`enat search`: the sampler of a trained model for a budget."""

from __future__ import annotations

from pathlib import Path

import click

from pipelines.cli.options import CONFIG, JOBS, JSON, OVERRIDES, console, echo_json


@click.command()
@CONFIG
@OVERRIDES
@JOBS
@JSON
def search(config: Path, overrides: tuple[str, ...], num_jobs: int | None, as_json: bool) -> None:
    """Search a better sampler for the trained model of CONFIG, within a budget.

    Section `search` of CONFIG sets the space, the budget, the score, the number of trials and the seeds; `enat config search` lists
    its keys. Trials are artifacts: they are reused, and the same command continues an interrupted search. The best samplers and the
    one of CONFIG are scored again with held-out seeds. The results are a page, and a file for generate.sampler.preset.
    """
    from pipelines.run import searching
    from pipelines.run.loading import load_run
    from pipelines.search import summary

    terminal = console(stderr=as_json)
    outcome, seconds = searching.search(load_run(config, overrides), str(config), terminal, num_jobs, overrides=overrides)
    if as_json:
        echo_json(summary.to_json(outcome, seconds=seconds))
    else:
        summary.show(outcome, seconds, terminal)
