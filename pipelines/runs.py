"""One pipeline run from its config to its closing answer: store, log file, tracking run, stages, report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import cluster, pipeline, summary, tracking, workflow
from pipelines import config as configuration
from pipelines.artifacts import ArtifactStore, Manifest, open_store, without_credentials
from pipelines.pipeline import RunConfig
from pipelines.workflow import Node


def run(
    config: RunConfig, source: str, console: Console, build: Callable[[RunConfig], list[Node]] = pipeline.build
) -> dict[str, Any]:
    """Make what a config asks for. source: where it came from, for tracking.   build: the stages, all of the pipeline's if it is
    not given.   Returns the answer of `enat run --json`."""
    started = time.monotonic()
    store = open_store(config.store_uri, config.s3)
    store.check_writable()
    workspace = Path(config.workspace)
    log_to(workspace / "logs" / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}.log")
    with console.status("looking at the dataset"):
        nodes = build(config)
    uri = tracking.resolve_uri(config.tracking, workspace)
    tags = {"enat.config": source, "enat.code": workflow.code_version(), "enat.store": without_credentials(store.uri)}
    parent = tracking.start_run(uri, config.tracking, config.name, tags)
    parent.log_params(configuration.redacted(config))

    def connect() -> None:
        with console.status("connecting to Ray"):
            cluster.connect(config.cluster)

    session = workflow.Session(
        store=store, run=parent, tracking=config.tracking, console=console, connect=connect, prices=config.prices
    )
    try:
        done = workflow.execute(nodes, session)
    except BaseException as error:
        parent.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    seconds = time.monotonic() - started
    by_id = {item.node.id: item.manifest for item in done}
    report = _copy_report(by_id["report"], store, workspace / f"{config.name}.html") if "report" in by_id else None
    scores = by_id["evaluate"].metrics if "evaluate" in by_id else {}
    parent.log_metrics({**scores, "cost/run_seconds": seconds})
    if report is not None:
        parent.log_file(report)
    parent.finish()
    return summary.summarize(config.name, done, session, seconds, report)


def _copy_report(manifest: Manifest, store: ArtifactStore, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(store.fetch(manifest, "report.html"), target)
    return target


def log_to(path: Path) -> None:
    """Everything from warnings up to a file; of our own code, warnings also to the terminal."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the workspace {path.parent.parent} cannot be written ({error.strerror}); choose another") from error
    to_file = logging.FileHandler(path, delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers = [to_file]
    to_terminal = logging.StreamHandler()
    to_terminal.setFormatter(logging.Formatter("enat: %(message)s"))
    to_terminal.addFilter(lambda record: record.levelno == logging.WARNING)
    logging.getLogger("pipelines").addHandler(to_terminal)
