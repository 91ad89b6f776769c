"""`enat reevaluate`."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from pipelines.cli.options import JSON, console

_WIDTH_OF_A_PIPE = 1000


class _Age(click.ParamType):
    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pipelines.formatting import parse_age

        try:
            return parse_age(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--match", multiple=True, metavar="PATTERN", help="Of model names, such as 'enat-l-*'. [default: enat-* and nat-*]")
@click.option("--alias", default="newest", show_default=True, help="The version of each model that is meant.")
@click.option("--older-than", type=_Age(), help="Also what was evaluated longer ago, such as 30d or 12h: anew, and compared.")
@click.option("--fresh", is_flag=True, help="Sample and score anew also what is there and not old, and compare.")
@click.option(
    "--tolerance", "tolerances", multiple=True, metavar="[METRIC=]REL", help="Relative change that is no drift. [default: 0.01]"
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Evaluate so many models, not counting failures: never evaluated first, then oldest.",
)
@click.option("--dry-run", is_flag=True, help="Say what is due, and why, and evaluate nothing.")
@JSON
def reevaluate(
    arguments: tuple[str, ...],
    match: tuple[str, ...],
    alias: str,
    older_than: float | None,
    fresh: bool,
    tolerances: tuple[str, ...],
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Evaluate registered models whose evaluation is missing, older than --older-than, or not what would be measured now.

    How to evaluate is said by CONFIG; without it by each model's last evaluation, and for a model without one by the sampler of
    its card and the dataset it was trained on. KEY=VALUE replaces values of any of these, and says store, workspace,
    cluster.address and tracking.uri. Nothing is trained, and what is there is reused.

    What is older than --older-than, with --fresh everything that is due and without --older-than every model, is sampled and scored
    anew beside what is there, and compared with it. Exit codes: 0 done, 3 a score moved by more than its tolerance, 1 a model could
    not be evaluated (the others were, and may have moved: --json counts both), 2 bad input.
    """
    configs = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(configs) > 1:
        raise click.UsageError(f"one CONFIG says how to evaluate, not {' and '.join(configs)}")
    from pipelines.reevaluation import reevaluate as reevaluation_reevaluate
    from pipelines.reevaluation import report
    from pipelines.reevaluation.drift import Tolerances
    from pipelines.reevaluation.plan import Request
    from pipelines.run import runner

    options = reevaluation_reevaluate.Options(
        match=match or reevaluation_reevaluate.MODELS,
        alias=alias,
        older_than=older_than,
        tolerances=Tolerances.parse(tolerances),
        limit=limit,
        is_fresh=fresh,
        is_dry_run=dry_run,
    )
    request = Request.of(Path(configs[0]) if configs else None, overrides)
    if not dry_run:
        runner.log_to(Path(request.config.workspace) / "logs" / f"reevaluate-{datetime.now():%Y%m%d-%H%M%S}.log")
    outcomes = reevaluation_reevaluate.reevaluate(
        request, configs[0] if configs else "the command line", options, console(stderr=as_json)
    )
    if as_json:
        click.echo(json.dumps(report.to_json(outcomes, request.config.prices), indent=1))
    else:
        terminal = console()
        if not terminal.is_terminal:
            terminal.width = _WIDTH_OF_A_PIPE
        report.show(outcomes, terminal)
    if code := reevaluation_reevaluate.exit_code(outcomes):
        sys.exit(code)
