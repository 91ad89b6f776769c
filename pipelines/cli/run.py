"""`enat plan`, `enat run`, and `enat evaluate`, which runs the last part of a config on images of another generator."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import CONFIG, JOBS, JSON, OVERRIDES, console, echo_json, table_console

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
@click.option("--address", help="Ask this cluster for its room, and predict for it: http://HOST:8265, HOST:6379 or auto.")
@click.option("--cluster", metavar="TEXT", help="Predict for a cluster that is only described: 8x8xH200 has 8 nodes of 8 GPUs.")
@JOBS
@click.option("--images", type=click.IntRange(min=1), help="Predict for a dataset of so many images, without reading any data.")
@click.option("--classes", type=click.IntRange(min=0), help="Classes of these images. [default: dataset.num_classes, or 1000]")
@click.option("--captions", type=click.IntRange(min=0), help="Captions of these images. [default: 5 for each, if it has captions]")
@JSON
def plan(
    config: Path,
    overrides: tuple[str, ...],
    address: str | None,
    cluster: str | None,
    num_jobs: int | None,
    images: int | None,
    classes: int | None,
    captions: int | None,
    as_json: bool,
) -> None:
    """Show the stages of CONFIG, their keys, whether a run would reuse or compute each, and what it would take.

    Seconds, GPU-hours and bytes are predicted from what earlier artifacts of the store, or tracked runs, took on the same hardware;
    without any, from published peaks of GPUs. "measured (3)" is a rate of three artifacts, "computed" one of peaks.
    """
    from pipelines.artifacts.open import open_store
    from pipelines.cluster import capacity as cluster_capacity
    from pipelines.jobs import submission
    from pipelines.prediction import show as show_prediction
    from pipelines.run import graph, prediction, runner, summary
    from pipelines.run.loading import load_run
    from pipelines.workflow import config as configuration
    from pipelines.workflow import driver

    if address is not None and cluster is not None:
        raise click.UsageError("give --address or --cluster, not both")
    if images is None and (classes, captions) != (None, None):
        raise click.UsageError("--classes and --captions describe the images of --images; give it, too")
    run = load_run(config, overrides, is_dataset_here=images is None)
    store = open_store(run.store_uri, run.s3)
    with console(stderr=True).status("reading the dataset, the store and the cluster"):
        capacity = None if address is None else _capacity(address)
        machines = prediction.machines_of(run, cluster, capacity)
        planned = driver.plan(graph.build(run), store) if images is None else prediction.unread_plan(run)
        for node, made in ((each.node, each.manifest) for each in planned if each.manifest is not None):
            runner.check_made(run, node, made)
        foreseen_by = prediction.foreseen_by(images, classes, captions)
        predicted = None
        if machines is not None:
            jobs = num_jobs or (runner.default_jobs(run.cluster) if cluster is None and address is None else None)
            predicted = prediction.of_plan(run, planned, store, machines, num_jobs=jobs, foreseen_by=foreseen_by)
    verdicts = [cluster_capacity.judge(each, capacity) for each in submission.requests_of(planned)] if capacity else []
    if as_json:
        stages: list[dict[str, Any]] = [
            {"stage": each.node.id, "key": each.key, "reused": each.is_reused, "parts_done": each.parts_done} for each in planned
        ]
        answer: dict[str, Any] = {"store": store.uri, "config": configuration.redacted(run), "stages": stages}
        if predicted is not None:
            stages = [{**row, "predicted": show_prediction.stage_to_json(predicted.stages.get(row["stage"]))} for row in stages]
            answer |= {"stages": stages, "predicted": show_prediction.to_json(predicted)}
        if capacity is not None:
            judged = {verdict.request.node: cluster_capacity.to_json(verdict) for verdict in verdicts}
            answer["stages"] = [{**row, "needs": judged.get(row["stage"])} for row in stages]
            answer["cluster"] = {"address": address, "nodes": [dict(node) for node in capacity.nodes]}
            answer["fits"] = all(verdict.fits for verdict in verdicts)
        echo_json(answer)
        return
    summary.show_plan(planned, store.uri, table_console(), predicted)
    if machines is None:
        console().print("--address auto or --cluster 1x8xH200 also predicts what it takes", highlight=False)
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
    from pipelines.run import runner, summary
    from pipelines.run.loading import load_run

    terminal = console(stderr=as_json)
    answer = runner.run(load_run(config, overrides), str(config), terminal, num_jobs=num_jobs, overrides=overrides)
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
    from pipelines.data.image_sets import ImageSetConfig
    from pipelines.run import runner, summary

    if conformance:
        _check_conformance(samples, overrides, as_json)
        return
    if samples is None or name is None:
        raise click.UsageError("give --samples and --name, or --conformance")
    terminal = console(stderr=as_json)
    images = ImageSetConfig(path=samples, name=name, kind=kind, labels=labels)
    loaded, build = runner.evaluation_of(images, config, overrides)
    answer = runner.run(loaded, str(config or "the command line"), terminal, build)
    if as_json:
        echo_json(answer)
    else:
        summary.show(answer, terminal)


def _check_conformance(samples: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Exits with 1 if a score differs."""
    from enat.files.weights import read_state_dict
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
