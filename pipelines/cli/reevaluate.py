"""`enat reevaluate`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import click

from pipelines.cli.options import AGE, JSON, console, echo_json, split_overrides, table_console


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option(
    "--match",
    multiple=True,
    metavar="PATTERN",
    help="Names of models, for example 'enat-l-*'. Repeatable. [default: enat-* and nat-*]",
)
@click.option("--alias", default="newest", show_default=True, help="Which version of each model to evaluate.")
@click.option(
    "--older-than", type=AGE, help="Also evaluate models again whose evaluation is older, for example 30d or 12h, and compare."
)
@click.option("--fresh", is_flag=True, help="Sample and score again even if a recent evaluation exists, and compare.")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[METRIC=]REL",
    help="Largest relative change that does not count as drift. Repeatable. [default: 0.01]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Evaluate at most this many models, not counting failures. Models never evaluated come first, then the oldest.",
)
@click.option("--dry-run", is_flag=True, help="Show which models are due and why, and evaluate nothing.")
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
    """Evaluate registered models whose evaluation is missing, older than --older-than, or measured by an outdated protocol.

    CONFIG defines the evaluation. Without CONFIG, each model is evaluated as in its last evaluation; a model without one is
    evaluated with the sampler of its card on its training dataset. KEY=VALUE replaces values of any of these, and sets store,
    workspace, cluster.address and tracking.uri. Nothing is trained, and existing artifacts are reused.

    Evaluations older than --older-than are sampled and scored again, and compared with the existing scores. With --fresh, this
    applies to all models that are due, or to every model without --older-than. Exit codes: 0 done, 3 a score changed by more than
    its tolerance, 1 a model could not be evaluated (the others were, and may have changed: --json counts both), 2 bad input.
    """
    from pipelines.artifacts.open import open_store
    from pipelines.reevaluation import reevaluate as reevaluation_reevaluate
    from pipelines.reevaluation import report
    from pipelines.reevaluation.drift import Tolerances
    from pipelines.reevaluation.plan import Request
    from pipelines.run import kept_log, runner

    config, overrides = split_overrides(arguments, "CONFIG")
    options = reevaluation_reevaluate.Options(
        match=match or reevaluation_reevaluate.MODELS,
        alias=alias,
        older_than=older_than,
        tolerances=Tolerances.parse(tolerances),
        limit=limit,
        is_fresh=fresh,
        is_dry_run=dry_run,
    )
    request = Request.of(Path(config) if config else None, overrides)
    terminal, source = console(stderr=as_json), config or "the command line"
    if dry_run:
        outcomes = reevaluation_reevaluate.reevaluate(request, source, options, terminal)
    else:
        log = Path(request.config.workspace) / "logs" / f"reevaluate-{datetime.now():%Y%m%d-%H%M%S}.log"
        runner.log_to(log)
        with kept_log.keeping(open_store(request.config.store_uri, request.config.s3), log, terminal):
            outcomes = reevaluation_reevaluate.reevaluate(request, source, options, terminal)
    if as_json:
        echo_json(report.to_json(outcomes, request.config.prices))
    else:
        report.show(outcomes, table_console())
    if code := reevaluation_reevaluate.exit_code(outcomes):
        sys.exit(code)
