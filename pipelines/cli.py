"""The `enat` command.

Exit codes: 0 done, 1 failed, 2 bad input. Errors are one line; tracebacks go to the run's log file.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines import cluster

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.workflow import Done


def main() -> None:
    """Run a command, turning expected errors into one line and an exit code."""
    cluster.prepare_environment()
    try:
        commands.main(prog_name="enat", standalone_mode=False)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.ClickException as error:
        usage = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else "enat --help"
        _fail(f"{error.format_message().rstrip('.')}; see {usage}", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command continues from what is committed", 130)
    except ValueError as error:
        logging.getLogger(__name__).debug("bad input", exc_info=True)
        _fail(str(error), 2)
    except Exception as error:
        logging.getLogger(__name__).error("failed", exc_info=True)
        _fail(f"{error}{_log_hint()}", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"enat: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="enat-lab")
def commands() -> None:
    """Train and compare token-based image generators: token maps, models, samples and scores."""


_CONFIG = click.argument("config", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


@commands.command()
@_CONFIG
@_OVERRIDES
@_JSON
def plan(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the stages of CONFIG, their keys, and what a run would reuse or compute."""
    from pipelines import pipeline, summary, workflow
    from pipelines.artifacts import open_store

    run = pipeline.load_run(config, overrides)
    store = open_store(run.store_uri)
    planned = workflow.plan(pipeline.build(run), store)
    if as_json:
        rows = [{"stage": p.node.id, "key": p.key, "reused": p.is_reused, "parts_done": p.parts_done} for p in planned]
        click.echo(json.dumps({"store": store.uri, "stages": rows}, indent=1))
    else:
        summary.show_plan(planned, store.uri, _console())


@commands.command(name="run")
@_CONFIG
@_OVERRIDES
@_JSON
def run_pipeline(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run the stages of CONFIG; what the store already has is reused, what was interrupted continues."""
    started = time.monotonic()
    from pipelines import config as configuration
    from pipelines import pipeline, summary, tracking, workflow
    from pipelines.artifacts import open_store, without_credentials

    run = pipeline.load_run(config, overrides)
    store = open_store(run.store_uri)
    store.check_writable()
    workspace = Path(run.workspace)
    _log_to(workspace / "logs" / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}.log")
    console = _console(stderr=as_json)
    nodes = pipeline.build(run)
    uri = tracking.resolve_uri(run.tracking, workspace)
    tags = {"enat.config": str(config), "enat.code": workflow.code_version(), "enat.store": without_credentials(store.uri)}
    parent = tracking.start_run(uri, run.tracking, run.name, tags)
    parent.log_params(configuration.redacted(run))

    def connect() -> None:
        with console.status("connecting to Ray"):
            cluster.connect(run.cluster)

    session = workflow.Session(store=store, run=parent, tracking=run.tracking, console=console, connect=connect)
    try:
        done = workflow.execute(nodes, session)
    except BaseException as error:
        parent.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    seconds = time.monotonic() - started
    report = _copy_report(done, store, workspace / f"{run.name}.html")
    by_id = {item.node.id: item for item in done}
    parent.log_metrics({**by_id["evaluate"].manifest.metrics, "cost/run_seconds": seconds})
    parent.log_file(report)
    parent.finish()
    answer = summary.summarize(run.name, done, session, seconds, report)
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show(answer, console)


def _copy_report(done: list[Done], store: Any, target: Path) -> Path:
    manifest = done[-1].manifest
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(store.fetch(manifest, "report.html"), target)
    return target


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _log_to(path: Path) -> None:
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


def _log_hint() -> str:
    files = [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return f" (traceback in {files[0]})" if files else ""
