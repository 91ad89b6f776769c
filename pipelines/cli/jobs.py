"""`enat jobs`: list, follow and stop runs that were submitted to a cluster."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import JSON, console, echo_json, table_console

if TYPE_CHECKING:
    from pipelines.jobs.client import Cluster, Job

ADDRESS = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="Ray's Jobs API, for example http://HOST:8265.",
)
_ID = click.argument("id", required=False)
_STOP_SECONDS = 90.0  # to wait for a job that saves before it ends


@click.group()
def jobs() -> None:
    """List runs on a cluster, show their logs, and stop them. A prefix of an id is enough."""


@jobs.command(name="ls")
@ADDRESS
@JSON
def list_jobs(address: str, as_json: bool) -> None:
    """List submitted runs, newest first."""
    from pipelines.jobs.client import Cluster

    cluster = Cluster(address)
    found = cluster.jobs()
    if as_json:
        echo_json({"address": cluster.address, "jobs": [job.to_json() for job in found]})
    elif found:
        _show(found)
    else:
        click.echo(f"no jobs of enat at {cluster.address}")


@jobs.command(name="logs")
@_ID
@ADDRESS
@click.option("--follow", "is_followed", is_flag=True, help="Show the log until the job ends, and exit with its exit code.")
@JSON
def logs(id: str | None, address: str, is_followed: bool, as_json: bool) -> None:
    """Show the log of a job. Without an id, of the newest job."""
    from pipelines.jobs.client import Cluster, ended, exit_code

    cluster = Cluster(address)
    job = cluster.find(id)
    if not is_followed:
        text = cluster.log(job.id)
        if as_json:
            echo_json({"address": cluster.address, **job.to_json(), "log": text})
        else:
            click.echo(text, nl=not text.endswith("\n"))
        return
    job = follow(cluster, job.id, to_stderr=as_json)
    if as_json:
        echo_json({"address": cluster.address, **job.to_json()})
    else:
        click.echo(ended(job))
    sys.exit(exit_code(job))


@jobs.command(name="stop")
@_ID
@ADDRESS
@JSON
def stop(id: str | None, address: str, as_json: bool) -> None:
    """Stop a job and wait until it has ended. What it committed is kept, and the same submission continues from there.

    Without an id, the active job is stopped. Stopping a job that has ended does nothing.
    """
    from pipelines.jobs.client import Cluster

    cluster = Cluster(address)
    job = cluster.find(id) if id is not None else _only_active(cluster)
    was_active = job.is_active
    with console(stderr=True).status(f"stopping {job.id}"):
        job = cluster.stop(job, _STOP_SECONDS) if was_active else job
    if as_json:
        echo_json({"address": cluster.address, "stopped": was_active, **job.to_json()})
    elif job.is_active:
        click.echo(f"{job.id} was asked to stop and is still saving; run the same command to keep waiting")
    else:
        click.echo(f"{job.id} {'is stopped' if was_active else f'had ended before ({job.status.lower()})'}")
    if job.is_active:
        sys.exit(1)


def follow(cluster: Cluster, id: str, *, to_stderr: bool) -> Job:
    """Show the log until the job ends. Ctrl-C leaves the job running."""
    try:
        return cluster.follow(id, lambda text: click.echo(text, nl=False, err=to_stderr))
    except KeyboardInterrupt as interrupt:
        click.echo(f"\n{id} continues. To stop it: enat jobs stop {id} --address {cluster.address}", err=True)
        raise click.exceptions.Exit(130) from interrupt


def _only_active(cluster: Cluster) -> Job:
    active = [job for job in cluster.jobs() if job.is_active]
    if len(active) == 1:
        return active[0]
    if not active:
        raise ValueError(f"no job of enat is active at {cluster.address}")
    raise ValueError(f"{len(active)} jobs are active; name one of {', '.join(job.id for job in active[:4])}")


def _show(found: list[Job]) -> None:
    from rich.table import Table

    from pipelines.formatting import show_age

    now = time.time()
    table = Table(box=None, pad_edge=False)
    for column in ("id", "status", "age", "ran", "why"):
        table.add_column(column)
    for job in found:
        age = show_age(now - job.started) if job.started else ""
        ran = show_age((job.ended or now) - job.started) if job.started else ""
        table.add_row(job.id, job.status.lower(), age, ran, job.reason or "")
    table_console().print(table, highlight=False, markup=False)
