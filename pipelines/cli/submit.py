"""`enat submit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.cli.jobs import ADDRESS, follow
from pipelines.cli.options import CONFIG, JSON, OVERRIDES, console

if TYPE_CHECKING:
    from pipelines.jobs.submission import Submission, Submitted


@click.command()
@CONFIG
@OVERRIDES
@ADDRESS
@click.option("--image", metavar="NAME", help="A container image with the code. Nothing from this checkout is sent.")
@click.option("--follow", "is_followed", is_flag=True, help="Show the log until the job ends, and exit with its exit code.")
@click.option("--again", is_flag=True, help="Run again even if this run has already succeeded.")
@click.option(
    "--wait-for-nodes",
    is_flag=True,
    help="Submit even if the cluster has too few nodes now. For clusters that add nodes on demand.",
)
@click.option(
    "--allow-local-store", is_flag=True, help="Allow a store in a local folder. Only for a cluster that consists of this machine."
)
@JSON
def submit(
    config: Path,
    overrides: tuple[str, ...],
    address: str,
    image: str | None,
    is_followed: bool,
    again: bool,
    wait_for_nodes: bool,
    allow_local_store: bool,
    as_json: bool,
) -> None:
    """Run CONFIG as a job of a Ray cluster.

    The code of this checkout is sent along: the files that git tracks, with their changes. Submitting the same run again returns
    the job while it is active, and continues the run if it failed or was stopped.
    """
    from pipelines.jobs import client as jobs
    from pipelines.jobs import submission

    prepared = submission.prepare(config, overrides, image=image, allow_local_store=allow_local_store, grows=wait_for_nodes)
    if prepared.warning is not None:
        click.echo(f"enat: {prepared.warning}", err=True)
    with console(stderr=True).status("submitting"):
        cluster = jobs.Cluster(address)
        done = submission.submit(cluster, prepared, again=again)
    if not as_json:
        _show(done, prepared, cluster.address)
    job = follow(cluster, done.job.id, to_stderr=as_json) if is_followed else done.job
    if as_json:
        answer = {"address": cluster.address, "outcome": done.outcome, "image": image, **job.to_json()}
        click.echo(json.dumps(answer, indent=1))
    if is_followed:
        if not as_json:
            click.echo(jobs.ended(job))
        sys.exit(jobs.exit_code(job))


def _show(done: Submitted, prepared: Submission, address: str) -> None:
    if done.outcome == "submitted":
        size = (
            f"{len(prepared.package.content) / 1e6:.1f} MB of code {prepared.package.state.label}"
            if prepared.package
            else prepared.image
        )
        attempt = f", attempt {done.job.attempt}" if done.job.attempt > 1 else ""
        click.echo(f"{done.job.id} submitted{attempt}: {size}")
    elif done.outcome == "active":
        click.echo(f"{done.job.id} is already active; nothing was started")
    else:
        click.echo(f"{done.job.id} has already succeeded; nothing was started. Use --again to run it again")
    click.echo(f"log   enat jobs logs {done.job.id} --follow --address {address}")
    click.echo(f"stop  enat jobs stop {done.job.id} --address {address}")
