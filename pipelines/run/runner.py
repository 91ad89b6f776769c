"""One pipeline run, from its config to its answer: store, log file, tracking run, stages, report."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection
from pipelines.cluster.connection import ClusterConfig
from pipelines.data.image_sets import ImageSetConfig, find_resolution
from pipelines.formatting import printable
from pipelines.run import graph, kept_log, summary, tracked
from pipelines.run import prediction as run_prediction
from pipelines.run.config import RunConfig
from pipelines.run.kept_log import KeptLog
from pipelines.run.loading import check_scanned, load_run
from pipelines.storage.redaction import without_credentials
from pipelines.tracking import run as tracking
from pipelines.tracking.run import RunHandle
from pipelines.workflow import driver, provenance
from pipelines.workflow.node_run import Session
from pipelines.workflow.stage import MAIN, Node

_MANY_CPUS = 4  # of a local cluster, from which on stages run side by side


def run(
    config: RunConfig,
    source: str,
    console: Console,
    build: Callable[[RunConfig], list[Node]] = graph.build,
    num_jobs: int | None = None,
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run what a config asks for. source: of the config, for tracking.   build: the nodes; the default is the whole pipeline.

    num_jobs: stages to compute side by side; None chooses by the cluster.   overrides: of the source, for the names in tracking.

    Returns the answer of `enat run --json`."""
    started = time.monotonic()
    store = open_store(config.store_uri, config.s3)
    store.check_writable()
    log = Path(config.workspace) / "logs" / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}.log"
    log_to(log)
    with kept_log.keeping(store, log, console) as kept:
        answer = _run(
            config, source, console, build, store=store, num_jobs=num_jobs, overrides=overrides, kept=kept, started=started
        )
    return {**answer, "log": kept.place}


def _run(
    config: RunConfig,
    source: str,
    console: Console,
    build: Callable[[RunConfig], list[Node]],
    *,
    store: ArtifactStore,
    num_jobs: int | None,
    overrides: Sequence[str],
    kept: KeptLog,
    started: float,
) -> dict[str, Any]:
    workspace = Path(config.workspace)
    with console.status("listing the dataset"):
        nodes = build(config)
    uri = tracking_uri(config)
    tracking.prepare(uri, config.tracking)
    planned = driver.plan(nodes, store)
    jobs = num_jobs or default_jobs(config.cluster)
    missing = [item.node for item in planned if not item.is_reused]
    is_needed = jobs != 1 or not run_prediction.does_without_ray(config, planned, store)
    connect = Connector(config, console, missing, is_needed=is_needed)

    with tracked.start(config, uri, source, overrides, nodes) as models:
        parent = kept.run = models.by_variant[MAIN]
        pin_code(parent)
        prediction = run_prediction.before_run(config, planned, store, connect, jobs)
        session = replace(open_session(config, store, parent, console, connect), models=models)
        if prediction is not None:
            stages = prediction.stages.values()
            predicted = {stage.node: stage.seconds.to_dict() for stage in stages if stage.problem is None}
            session = replace(session, predicted=predicted)
        done = driver.execute(nodes, session, check=partial(check_made, config), num_jobs=jobs)
        for variant in models.without_nodes() if build is graph.build else ():
            models.link_all(variant, graph.nodes_of_variant(config, variant, nodes))
        seconds = time.monotonic() - started
        by_id = {item.node.id: item.manifest for item in done}
        report = None
        if "report" in by_id:
            report = workspace / f"{config.name}.html"
            shutil.copyfile(store.fetch(by_id["report"], "report.html"), report)
            for each in models.by_variant.values():
                each.log_file(report)
        costs = {"cost/run_seconds": seconds}
        if prediction is not None:
            costs |= {f"cost/predicted_run_seconds_{side}": value for side, value in prediction.seconds.to_dict().items()}
        parent.log_metrics(costs)
        parent.finish()
    answer = summary.summarize(config.name, done, session, seconds, report=report, prediction=prediction)
    return {**answer, "connecting_seconds": connect.seconds}


def evaluation_of(
    images: ImageSetConfig, config: Path | None, overrides: Sequence[str]
) -> tuple[RunConfig, Callable[[RunConfig], list[Node]]]:
    """The run that scores images of another generator, and its nodes, for `run`.

    config: a run whose reference and metrics are used, if any."""
    values = [*overrides, "targets=[reference]"]  # nothing is trained, so no model is checked
    loaded = load_run(config, values if config else ["name=evaluate", *values])
    images = replace(images, s3=loaded.s3_of(images.path))
    resolution = find_resolution(images) if config is None else None  # the tokenizer of a config sets it
    return loaded, lambda run: graph.build_evaluation(run, images, resolution)


class Connector:
    """Connects to Ray when it is called first. seconds: that it took, which are time of no stage.

    If the first stage to compute needs Ray, it connects at once: meanwhile MLflow is imported. A cluster of one machine imports
    what the tasks of the first stage with workers import.
    """

    def __init__(self, config: RunConfig, console: Console, missing: Sequence[Node] = (), *, is_needed: bool = True) -> None:
        """missing: the nodes to compute, as far as they are known.   is_needed: False for a run that does without Ray."""
        self.seconds = 0.0
        self._config, self._console, self._is_needed = config, console, is_needed
        if not is_needed:
            connection.import_ahead({name: None for node in missing for name in node.stage.imports})
            return
        with_workers = next((node for node in missing if node.stage.workers(node.config) is not None), None)
        self._imports = _imports_of(with_workers) if with_workers is not None else ()
        if with_workers is not None and with_workers is missing[0]:
            self()

    def __call__(self) -> None:
        if connection.is_connected() or not self._is_needed:
            return
        started = time.monotonic()
        connect(self._config, self._console, self._imports)
        self.seconds += time.monotonic() - started


def _imports_of(node: Node) -> tuple[str, ...]:
    """Modules that processes can import ahead. Workers with GPUs always have processes of their own."""
    workers = node.stage.workers(node.config)
    return () if workers is None or workers.gpus_per_worker else node.stage.imports


def connect(config: RunConfig, console: Console, imports: Sequence[str]) -> None:
    """imports: modules that tasks of the first stage need."""
    with console.status("connecting to Ray"):
        connection.connect(config.cluster)
    connection.warm_up(imports)


def default_jobs(cluster: ClusterConfig) -> int | None:
    """One stage at a time on a local cluster of few CPUs, which one stage can use. Elsewhere as many as have room."""
    is_local = connection.address_of(cluster) == connection.LOCAL
    return 1 if is_local and (cluster.num_cpus or os.cpu_count() or 1) < _MANY_CPUS else None


def check_made(config: RunConfig, node: Node, made: Manifest) -> None:
    """Raises ValueError if a dataset does not have what the config asks of it."""
    if node.stage.name == "dataset":
        check_scanned(config, {node.config: made})


def open_session(
    config: RunConfig, store: ArtifactStore, run: RunHandle, console: Console, connect: Callable[[], None] | None = None
) -> Session:
    """What the stages of a run share: all that the config states apart from the stages themselves."""
    return Session(
        store=store,
        run=run,
        tracking=config.tracking,
        console=console,
        connect=connect or Connector(config, console),
        prices=config.prices,
        stages=graph.stages(),
    )


def pin_code(run: RunHandle) -> None:
    """Tags the run with the commit and the changes of code from a package or an image. The files of a job are deleted with it."""
    state = provenance.read_state()
    if state is None:
        return
    run.set_tags(state.tags)
    if (changes := provenance.read_changes()) is not None:
        run.log_bytes(changes, provenance.CHANGES)


def tracking_uri(config: RunConfig) -> str:
    """Where runs are tracked. Raises ValueError if a job of a cluster would track them in a folder that is removed with it."""
    uri = tracking.resolve_uri(config.tracking, Path(config.workspace))
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    place = given.removeprefix("sqlite:///") if given else config.workspace
    if config.tracking.enabled and kept_log.IN_JOB in os.environ and uri.startswith("sqlite:///") and not Path(place).is_absolute():
        raise ValueError(
            f"runs and registered models of this job would be tracked under {place}, in a folder that is removed with the job; "
            "give tracking.uri=http://HOST:5000, set MLFLOW_TRACKING_URI on the cluster, give workspace= the absolute path of a "
            "folder that stays, or tracking.enabled=false"
        )
    return uri


def log_to(path: Path) -> None:
    """Log to a file: warnings of all code and information of this package, such as tracebacks of failures that a run survived.
    Warnings of this code also go to the terminal."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the workspace {path.parent.parent} cannot be written ({error.strerror}); choose another") from error
    to_file = logging.FileHandler(path, delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers = [to_file]
    to_terminal = logging.StreamHandler()
    to_terminal.setFormatter(_OneLine("enat: %(message)s"))
    to_terminal.addFilter(lambda record: record.levelno == logging.WARNING)
    for package in ("pipelines", "enat"):
        logging.getLogger(package).handlers = [to_terminal]
        logging.getLogger(package).setLevel(logging.INFO)


class _OneLine(logging.Formatter):
    """Names of files and answers of servers may hold characters that a terminal obeys, and URIs a password."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_credentials(super().format(record)))
