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
@click.option("--image", metavar="NAME", help="A container image that holds the code; nothing of this checkout is sent.")
@click.option("--follow", "is_followed", is_flag=True, help="Show the log to the end, and exit as the job does.")
@click.option("--again", is_flag=True, help="Also where the same run has succeeded before.")
@click.option("--wait-for-nodes", is_flag=True, help="Also where the cluster has too little now: more comes when it is asked for.")
@click.option("--allow-local-store", is_flag=True, help="Keep a store that is a folder here: the cluster is this machine alone.")
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

    The code of this checkout goes with it: what git tracks, with its changes. The same submission again is the same job while that
    one is under way, and goes on where it stopped after it failed or was stopped.
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
        _say(done, prepared, cluster.address)
    job = follow(cluster, done.job.id, to_stderr=as_json) if is_followed else done.job
    if as_json:
        answer = {"address": cluster.address, "outcome": done.outcome, "image": image, **job.to_json()}
        click.echo(json.dumps(answer, indent=1))
    if is_followed:
        if not as_json:
            click.echo(jobs.ended(job))
        sys.exit(jobs.exit_code(job))


def _say(done: Submitted, prepared: Submission, address: str) -> None:
    if done.outcome == "submitted":
        size = (
            f"{len(prepared.package.content) / 1e6:.1f} MB of code {prepared.package.state.label}"
            if prepared.package
            else prepared.image
        )
        attempt = f", attempt {done.job.attempt}" if done.job.attempt > 1 else ""
        click.echo(f"{done.job.id} submitted{attempt}: {size}")
    elif done.outcome == "active":
        click.echo(f"{done.job.id} is under way already; nothing was started")
    else:
        click.echo(f"{done.job.id} has succeeded before; nothing was started, --again runs it once more")
    click.echo(f"log   enat jobs logs {done.job.id} --follow --address {address}")
    click.echo(f"stop  enat jobs stop {done.job.id} --address {address}")
