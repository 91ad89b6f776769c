"""`enat plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import CONFIG, JSON, OVERRIDES, console

if TYPE_CHECKING:
    from pipelines.cluster.capacity import Capacity


@click.command()
@CONFIG
@OVERRIDES
@click.option("--address", help="Also check whether this cluster has room: http://HOST:8265, HOST:6379 or auto.")
@JSON
def plan(config: Path, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Show the stages of CONFIG, their keys, and whether a run would reuse or compute each.

    With --address, also show whether the cluster currently has the CPUs and GPUs for the stages to compute.
    """
    from pipelines.artifacts.open import open_store
    from pipelines.cluster import capacity as cluster_capacity
    from pipelines.run import config as run_config
    from pipelines.run import graph, summary
    from pipelines.workflow import config as configuration
    from pipelines.workflow import driver

    run = run_config.load_run(config, overrides)
    store = open_store(run.store_uri, run.s3)
    capacity = _capacity(address) if address is not None else None
    with console(stderr=True).status("reading the dataset and the store"):
        planned = driver.plan(graph.build(run), store)
    computed = [item.node for item in planned if not item.is_reused]
    needs = [cluster_capacity.need_of(node.id, node.stage.workers(node.config)) for node in computed]
    verdicts = [cluster_capacity.judge(need, capacity) for need in needs if need is not None] if capacity else []
    if as_json:
        judged = {verdict.need.node: cluster_capacity.to_json(verdict) for verdict in verdicts}
        rows = [
            {"stage": p.node.id, "key": p.key, "reused": p.is_reused, "parts_done": p.parts_done}
            | ({"needs": judged.get(p.node.id)} if capacity else {})
            for p in planned
        ]
        has = {"cluster": {"address": address, "nodes": [dict(node) for node in capacity.nodes]}} if capacity else {}
        fits = {"fits": all(verdict.fits for verdict in verdicts)} if capacity else {}
        answer = {"store": store.uri, "config": configuration.redacted(run), "stages": rows, **has, **fits}
        click.echo(json.dumps(answer, indent=1))
        return
    summary.show_plan(planned, store.uri, console())
    if capacity is not None:
        click.echo()
        cluster_capacity.show(verdicts, capacity, console())


def _capacity(address: str) -> Capacity:
    """Asks the Jobs API if the address is an HTTP URL; otherwise connects to the cluster."""
    from pipelines.cluster import connection
    from pipelines.jobs import client as jobs

    with console(stderr=True).status("reading the cluster"):
        if "://" in address and not address.startswith("ray://"):
            return jobs.Cluster(address).capacity()
        connection.connect(connection.ClusterConfig(address=address))
        return connection.capacity()
