"""`enat submit`, and `enat jobs`: list, follow and stop the runs that were submitted to a cluster."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import CONFIG, JOBS, JSON, OVERRIDES, SentenceGroup, console, echo_json, table_console

if TYPE_CHECKING:
    from pipelines.jobs.client import Cluster, Job
    from pipelines.jobs.submission import Submission, SubmissionResult

_ADDRESS = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="Ray's Jobs API, for example http://HOST:8265.",
)
_FOLLOW = click.option(
    "--follow", "is_followed", is_flag=True, help="Show the log until the job ends, and exit with its exit code."
)
_ID = click.argument("id", required=False)
_WHY_LENGTH = 160
_STOP_SECONDS = 90.0  # to wait for a job that saves before it ends


@click.command()
@CONFIG
@OVERRIDES
@_ADDRESS
@click.option("--image", metavar="NAME", help="A container image with the code. Nothing from this checkout is sent.")
@_FOLLOW
@JOBS
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
    num_jobs: int | None,
    again: bool,
    wait_for_nodes: bool,
    allow_local_store: bool,
    as_json: bool,
) -> None:
    """Run CONFIG as a job of a Ray cluster.

    The code of this checkout is sent along: the files that git tracks, with their changes. Submitting the same run again returns
    the job while it is active, and continues the run if it failed or was stopped.
    """
    from pipelines.jobs import places, submission
    from pipelines.jobs.client import Cluster

    prepared = submission.prepare(
        config,
        overrides,
        image=image,
        allow_local_store=allow_local_store,
        has_autoscaler=wait_for_nodes,
        num_jobs=num_jobs,
    )
    if prepared.warning is not None:
        click.echo(f"enat: {prepared.warning}", err=True)
    with console(stderr=True).status("submitting"):
        cluster = Cluster(address)
        for warning in places.check(prepared.config, is_this_machine=allow_local_store):
            click.echo(f"enat: {warning}", err=True)
        done = submission.submit(cluster, prepared, again=again)
    if not as_json:
        _show_submitted(done, prepared, cluster.address)
    job = _follow(cluster, done.job.id, to_stderr=as_json) if is_followed else done.job
    if as_json:
        echo_json({"address": cluster.address, "outcome": done.outcome, "image": image, **job.to_json()})
    if is_followed:
        if not as_json:
            click.echo(job.describe_end())
        sys.exit(job.command_exit_code)


def _show_submitted(done: SubmissionResult, prepared: Submission, address: str) -> None:
    id, package = done.job.id, prepared.package
    if done.outcome == "submitted":
        code = f"{len(package.content) / 1e6:.1f} MB of code {package.state.label}" if package else prepared.image
        attempt = f", attempt {done.job.attempt}" if done.job.attempt > 1 else ""
        click.echo(f"{id} submitted{attempt}: {code}")
    elif done.outcome == "active":
        click.echo(f"{id} is already active; nothing was started")
    else:
        click.echo(f"{id} has already succeeded; nothing was started. Use --again to run it again")
    click.echo(f"log   enat jobs logs {id} --follow --address {address}")
    click.echo(f"stop  enat jobs stop {id} --address {address}")


@click.group(cls=SentenceGroup)
def jobs() -> None:
    """List runs on a cluster, show their logs, and stop them. A prefix of an id is enough."""


@jobs.command(name="ls")
@_ADDRESS
@JSON
def list_jobs(address: str, as_json: bool) -> None:
    """List submitted runs, newest first: who submitted them, what they are computing, and why they failed."""
    from pipelines.jobs.client import Cluster

    cluster = Cluster(address)
    found = cluster.jobs()
    if as_json:
        rows = [{**job.to_json(), "stages": [asdict(each) for each in cluster.stages_in_progress(job)]} for job in found]
        echo_json({"address": cluster.address, "jobs": rows})
    elif found:
        _show(found, cluster)
    else:
        click.echo(f"no jobs of enat at {cluster.address}")


@jobs.command(name="logs")
@_ID
@_ADDRESS
@_FOLLOW
@JSON
def logs(id: str | None, address: str, is_followed: bool, as_json: bool) -> None:
    """Show the log of a job. Without an id, of the newest job."""
    from pipelines.jobs.client import Cluster

    cluster = Cluster(address)
    job = cluster.find(id)
    if not is_followed:
        text = cluster.log(job.id)
        if as_json:
            echo_json({"address": cluster.address, **job.to_json(), "log": text})
        else:
            click.echo(text, nl=not text.endswith("\n"))
        return
    job = _follow(cluster, job.id, to_stderr=as_json)
    if as_json:
        echo_json({"address": cluster.address, **job.to_json()})
    else:
        click.echo(job.describe_end())
    sys.exit(job.command_exit_code)


@jobs.command(name="stop")
@_ID
@_ADDRESS
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


def _follow(cluster: Cluster, id: str, *, to_stderr: bool) -> Job:
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


_COLUMNS = ("id", "status", "user", "config", "age", "ran", "stage", "why")


def _show(found: list[Job], cluster: Cluster) -> None:
    """A table; on a terminal that is too narrow for it, an id and a sentence for each job. Ids stay in one piece, to be copied."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    rows, terminal = [_cells(job, cluster, time.time()) for job in found], table_console()
    if _width(rows) <= terminal.width:
        table = Table(box=None, pad_edge=False)
        for column in _COLUMNS:
            table.add_column(column, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        terminal.print(table, highlight=False, markup=False)
        return
    for id, status, user, config, age, ran, stages, why in rows:
        terminal.print(id, highlight=False, markup=False, soft_wrap=True)
        times = [f"started {age} ago", f"ran {ran}"] if age else []
        told = ", ".join(each for each in (status, user, config, *times) if each) + "".join(
            f": {each}" for each in (stages, why) if each
        )
        terminal.print(Padding(Text(told), (0, 0, 0, 2)))


def _cells(job: Job, cluster: Cluster, now: float) -> tuple[str, ...]:
    """Of one job, by column."""
    from pipelines.formatting import printable, show_age

    age = show_age(now - job.started) if job.started else ""
    ran = show_age((job.ended or now) - job.started) if job.started else ""
    stages = ", ".join(each.describe() for each in cluster.stages_in_progress(job))
    why = printable(job.reason or "").removeprefix("enat: ")
    why = why if len(why) <= _WHY_LENGTH else why[: _WHY_LENGTH - 1] + "…"
    user, config = (printable(text) for text in (job.user or "", Path(job.config).name))
    return job.id, job.status.lower(), user, config, age, ran, stages, why


def _width(rows: list[tuple[str, ...]]) -> int:
    """Of the table: the widest cell of each column, and two spaces between columns."""
    from rich.cells import cell_len

    columns = zip(_COLUMNS, *rows, strict=True)
    return sum(max(map(cell_len, column)) + 2 for column in columns) - 2
