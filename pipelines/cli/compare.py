"""`enat compare`: tracked evaluations side by side."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from pipelines.cli.options import JSON, TRACKING_URI, WORKSPACE, console, echo_json, table_console
from pipelines.comparison.published import DATASETS

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--experiment", "experiments", multiple=True, default=["enat"], show_default=True, help="Repeatable.")
@click.option("--filter", "filter_string", help="A filter of MLflow on runs of stage evaluate, for example 'metrics.fid < 10'.")
@TRACKING_URI
@WORKSPACE
@click.option(
    "--published",
    type=click.Choice(["auto", "none", *DATASETS]),
    default="auto",
    show_default=True,
    help="Show published numbers of this dataset. auto: of the datasets of the runs.",
)
@click.option("--csv", "csv_path", type=_FILE, metavar="FILE", help="Write the table to this file.")
@click.option("--png", "png_path", type=_FILE, metavar="FILE", help="Write the figures to this file.")
@click.option("--html", "html_path", type=_FILE, metavar="FILE", help="Write a page with everything, including samples.")
@click.option("--no-log", is_flag=True, help="Do not log the comparison to MLflow.")
@JSON
def compare(
    runs: tuple[str, ...],
    experiments: tuple[str, ...],
    filter_string: str | None,
    tracking_uri: str | None,
    workspace: Path,
    published: str,
    csv_path: Path | None,
    png_path: Path | None,
    html_path: Path | None,
    no_log: bool,
    as_json: bool,
) -> None:
    """Compare tracked evaluations: sizes, variants, samplers, and published numbers.

    RUN is the name of a config, or the id of an MLflow run of a pipeline or of stage evaluate. Without RUN, all evaluations of
    the experiment are compared. Numbers that were measured by different protocols are in separate tables.
    """
    from pipelines.comparison import compare as comparison_compare
    from pipelines.comparison import table
    from pipelines.comparison.page import Grids
    from pipelines.comparison.query import Query
    from pipelines.comparison.query import compare as read
    from pipelines.tracking import run as tracking

    uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), workspace)
    title = f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with console(stderr=True).status("reading MLflow"):
        comparison = read(uri, Query(experiments=experiments, filter=filter_string, runs=runs), published)
        is_page_made = html_path is not None or not no_log
        files = comparison_compare.make_files(
            comparison, title, comparison_compare.read_grids(comparison) if is_page_made else Grids()
        )
    if png_path is not None and files.figures is None:
        raise ValueError(f"no figure can be drawn into {png_path}: no run has both a distance and gmacs_total, or a sweep")
    outputs = ((csv_path, files.table), (png_path, files.figures), (html_path, files.page))
    for path, content in outputs:
        if path is not None and content is not None:
            comparison_compare.write(path, content)
    logged = None if no_log else comparison_compare.log(comparison, files, title)
    if as_json:
        written = {kind: str(path) for kind, path in (("csv", csv_path), ("png", png_path), ("html", html_path)) if path}
        answer = {"name": title, "logged_run": logged, "files": written, **table.to_json(comparison)}
        echo_json(answer)
        return
    table.show(comparison, table_console())
    for path, _ in outputs:
        if path is not None:
            click.echo(f"written {path}")
    if logged is not None:
        click.echo(f"logged  {title} (run {logged})")
