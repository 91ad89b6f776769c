"""`enat plan`, `enat run`, and `enat evaluate`, which runs the last part of a config on images of another generator."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import CONFIG, JOBS, JSON, OVERRIDES, console, echo_json

if TYPE_CHECKING:
    from pipelines.cluster.capacity import Capacity

_LABELS = (
    'How the labels of images without labels were chosen: "1000 classes" (equally many images of each), "1000 classes, drawn" '
    '(at random), "none" (no classes), "captions of NAME, drawn" (or "in order"; NAME is the dataset). If it is not known, the '
    "scores are in a separate table."
)


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
    from pipelines.jobs import submission
    from pipelines.run import config as run_config
    from pipelines.run import graph, runner, summary
    from pipelines.workflow import config as configuration
    from pipelines.workflow import driver

    run = run_config.load_run(config, overrides)
    store = open_store(run.store_uri, run.s3)
    with console(stderr=True).status("reading the dataset, the store and the cluster"):
        capacity = _capacity(address) if address is not None else None
        planned = driver.plan(graph.build(run), store)
        for each in planned:
            if each.manifest is not None:
                runner.check_made(run, each.node, each.manifest)
    verdicts = [cluster_capacity.judge(each, capacity) for each in submission.requests_of(planned)] if capacity else []
    if as_json:
        rows: list[dict[str, Any]] = [
            {"stage": p.node.id, "key": p.key, "reused": p.is_reused, "parts_done": p.parts_done} for p in planned
        ]
        answer: dict[str, Any] = {"store": store.uri, "config": configuration.redacted(run), "stages": rows}
        if capacity is not None:
            judged = {verdict.request.node: cluster_capacity.to_json(verdict) for verdict in verdicts}
            answer["stages"] = [{**row, "needs": judged.get(row["stage"])} for row in rows]
            answer["cluster"] = {"address": address, "nodes": [dict(node) for node in capacity.nodes]}
            answer["fits"] = all(verdict.fits for verdict in verdicts)
        echo_json(answer)
        return
    summary.show_plan(planned, store.uri, console())
    if capacity is not None:
        click.echo()
        cluster_capacity.show(verdicts, capacity, console())


def _capacity(address: str) -> Capacity:
    """Asks the Jobs API if the address is an HTTP URL; otherwise connects to the cluster."""
    from pipelines.cluster import connection
    from pipelines.jobs.client import Cluster

    if "://" in address and not address.startswith("ray://"):
        return Cluster(address).capacity()
    connection.connect(connection.ClusterConfig(address=address))
    return connection.capacity()


@click.command()
@CONFIG
@OVERRIDES
@JOBS
@JSON
def run(config: Path, overrides: tuple[str, ...], num_jobs: int | None, as_json: bool) -> None:
    """Run the stages of CONFIG. Existing artifacts are reused, and interrupted stages resume.

    Stages that do not need each other run side by side as far as the cluster has room. One that fails beside others ends only those
    that need it.

    `enat config` lists the keys of a CONFIG and describes them.
    """
    from pipelines.run import config as run_config
    from pipelines.run import runner, summary

    terminal = console(stderr=as_json)
    answer = runner.run(run_config.load_run(config, overrides), str(config), terminal, num_jobs=num_jobs)
    if as_json:
        echo_json(answer)
    else:
        summary.show(answer, terminal)


@click.command()
@OVERRIDES
@click.option("--samples", metavar="PATH", help="Images: a folder, .tar, .npz or .parquet, local or s3://.")
@click.option("--name", help="Name of the generator in comparisons, for example DiT-XL/2.")
@click.option("--kind", default="auto", show_default=True, help="folder, tar, npz or parquet. auto: detected from the path.")
@click.option("--labels", metavar="TEXT", help=_LABELS)
@click.option("--config", type=click.Path(path_type=Path), help="A run whose reference and metrics are used.")
@click.option("--conformance", is_flag=True, help="Compare scores with torch-fidelity's, or those of ADM's published samples.")
@JSON
def evaluate(
    overrides: tuple[str, ...],
    samples: str | None,
    name: str | None,
    kind: str,
    labels: str | None,
    config: Path | None,
    conformance: bool,
    as_json: bool,
) -> None:
    """Score images of another generator with the same code as our own.

    With --config, the scores are comparable with those of that run if the labels were chosen in the same way. KEY=VALUE sets
    values of the config, for example reference.npz=VIRTUAL_imagenet256_labeled.npz reference.extractor=inception.
    """
    from pipelines.data.image_sets import ImageSetConfig, find_resolution
    from pipelines.run import config as run_config
    from pipelines.run import graph, runner, summary

    if conformance:
        _check_conformance(samples, overrides, as_json)
        return
    if samples is None or name is None:
        raise click.UsageError("give --samples and --name, or --conformance")
    values = [*overrides, "targets=[reference]"]  # nothing is trained, so no model is checked
    loaded = run_config.load_run(config, values if config else ["name=evaluate", *values])
    images = ImageSetConfig(path=samples, name=name, kind=kind, labels=labels, s3=loaded.s3_of(samples))
    resolution = find_resolution(images) if config is None else None  # the tokenizer of a config sets it
    terminal, source = console(stderr=as_json), str(config or "the command line")
    answer = runner.run(loaded, source, terminal, lambda run: graph.build_evaluation(run, images, resolution))
    if as_json:
        echo_json(answer)
    else:
        summary.show(answer, terminal)


def _check_conformance(samples: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Exits with 1 if a score differs."""
    from enat.checkpoint import read_state_dict
    from pipelines.run import conformance
    from pipelines.storage.external import local_file

    terminal = console(stderr=as_json)
    if samples is not None:
        found = conformance.check_published(samples, [*overrides], terminal)
    else:
        values = dict(override.partition("=")[::2] for override in overrides)
        if unknown := [key for key in values if key != "reference.weights"]:
            raise click.UsageError(f"--conformance without --samples takes reference.weights=FILE only, not {unknown[0]}")
        place = values.get("reference.weights")
        weights = read_state_dict(local_file(place, "reference.weights", None)) if place else None
        if weights is None:
            terminal.print("random weights: scores mean nothing, but must agree; reference.weights=FILE takes others")
        found = conformance.check_small_set(weights, terminal)
    if as_json:
        echo_json([{**asdict(each), "agrees": each.is_good} for each in found])
    else:
        conformance.show(found, terminal)
    if not all(each.is_good for each in found):
        sys.exit(1)
