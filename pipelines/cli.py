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
from typing import TYPE_CHECKING

import click

from pipelines import cluster

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.artifacts import ArtifactStore, Manifest


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
    store = open_store(run.store_uri, run.s3)
    with _console(stderr=True).status("looking at the dataset and the store"):
        planned = workflow.plan(pipeline.build(run), store)
    if as_json:
        rows = [{"stage": p.node.id, "key": p.key, "reused": p.is_reused, "parts_done": p.parts_done} for p in planned]
        click.echo(json.dumps({"store": store.uri, "stages": rows}, indent=1))
    else:
        summary.show_plan(planned, store.uri, _console())


@commands.group(name="import")
def import_weights() -> None:
    """Turn published weights (.safetensors, .pth, .ckpt; a path, s3:// or hf://owner/name/file) into artifacts of a store."""


_STORE = click.option("--store", default="runs/store", show_default=True, help="A folder or s3://bucket/prefix.")
_ENDPOINT = click.option("--s3-endpoint", help="URL of an S3 service; without it the AWS variables decide.")
_VQGAN = click.option("--preset", default="vqgan-256", show_default=True, help="The tokenizer's architecture.")


@import_weights.command(name="vqgan")
@click.argument("weights")
@_VQGAN
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@_STORE
@_ENDPOINT
@_JSON
def import_vqgan(weights: str, preset: str, overrides: tuple[str, ...], store: str, s3_endpoint: str | None, as_json: bool) -> None:
    """Import a tokenizer. Prints the lines by which a config uses it. FIELD=VALUE replaces what the preset says."""
    values = [f"tokenizer.preset={preset}", f"tokenizer.weights={weights}", *(f"tokenizer.{override}" for override in overrides)]
    _import("tokenizer", values, store, s3_endpoint, as_json)


@import_weights.command(name="enat")
@click.argument("weights")
@click.option("--preset", required=True, help="enat-s, enat-b, enat-l or enat-xl.")
@click.option("--vqgan", required=True, help="The weights of its tokenizer: a file, or the sha256:... of an imported one.")
@click.option("--vqgan-preset", default="vqgan-256", show_default=True)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@_STORE
@_ENDPOINT
@_JSON
def import_enat(
    weights: str,
    preset: str,
    vqgan: str,
    vqgan_preset: str,
    overrides: tuple[str, ...],
    store: str,
    s3_endpoint: str | None,
    as_json: bool,
) -> None:
    """Import a generator. Prints the lines by which a config uses it. tokenizer.FIELD=VALUE or FIELD=VALUE (of the generator)
    replaces what a preset says."""
    values = [f"tokenizer.preset={vqgan_preset}", f"tokenizer.weights={vqgan}"]
    values += [f"train.model.preset={preset}", f"train.weights={weights}"]
    values += [override if override.startswith("tokenizer.") else f"train.model.{override}" for override in overrides]
    _import("train", values, store, s3_endpoint, as_json)


def _import(target: str, values: list[str], store: str, s3_endpoint: str | None, as_json: bool) -> None:
    """Run the one stage that reads the weights, just as a pipeline with these values would: so it finds what is made here."""
    from pipelines import pipeline, summary, workflow
    from pipelines import tracking as mlflow_tracking
    from pipelines.artifacts import open_store
    from pipelines.external import content_digest

    endpoint = [f"s3.endpoint_url={s3_endpoint}"] if s3_endpoint else []
    run = pipeline.load_run(None, ["name=import", f"store={store}", f"targets=[{target}]", *endpoint, *values])
    opened = open_store(run.store_uri, run.s3)
    opened.check_writable()
    off = mlflow_tracking.TrackingConfig(enabled=False)
    session = workflow.Session(
        store=opened,
        run=mlflow_tracking.start_run("", off, "import", {}),
        tracking=off,
        console=_console(stderr=True),
        connect=lambda: None,
    )
    done = workflow.execute(pipeline.build(run), session)[-1]
    section = run.tokenizer if target == "tokenizer" else run.train
    assert section.weights is not None
    name = "sha256:" + content_digest(section.weights, f"{target}.weights", run.s3)
    place = opened.place(done.manifest.stage, done.manifest.key)
    if as_json:
        answer = {"stage": target, "key": done.manifest.key, "reused": done.is_reused, "weights": name, "place": place}
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show_import(target, values, name, place, _console())


@commands.group()
def artifacts() -> None:
    """What a store holds."""


@artifacts.command(name="show")
@click.argument("artifact", metavar="[STAGE/]KEY")
@_STORE
@_ENDPOINT
@click.option(
    "--contact-sheet",
    type=click.Path(path_type=Path),
    help="Of a token map: write a PNG, images beside what their codes decode to.",
)
@click.option("--images", default=24, show_default=True, type=click.IntRange(1, 400), help="On the contact sheet.")
@_JSON
def show_artifact(
    artifact: str, store: str, s3_endpoint: str | None, contact_sheet: Path | None, images: int, as_json: bool
) -> None:
    """Show an artifact: what it was made from, by what, what is in it, and what it measured. The beginning of its key is enough."""
    from pipelines import inspection
    from pipelines.artifacts import open_store
    from pipelines.s3 import S3Config

    opened = open_store(store, S3Config(endpoint_url=s3_endpoint))
    manifest = inspection.find(opened, artifact)
    if contact_sheet is not None:
        inspection.write_contact_sheet(opened, manifest, contact_sheet, images)
    if as_json:
        click.echo(manifest.to_json().decode())
    else:
        inspection.show(opened, manifest, _console())
        if contact_sheet is not None:
            click.echo(f"\ncontact sheet {contact_sheet}")


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
    store = open_store(run.store_uri, run.s3)
    store.check_writable()
    workspace = Path(run.workspace)
    _log_to(workspace / "logs" / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}.log")
    console = _console(stderr=as_json)
    with console.status("looking at the dataset"):
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
    by_id = {item.node.id: item.manifest for item in done}
    report = _copy_report(by_id["report"], store, workspace / f"{run.name}.html") if "report" in by_id else None
    scores = by_id["evaluate"].metrics if "evaluate" in by_id else {}
    parent.log_metrics({**scores, "cost/run_seconds": seconds})
    if report is not None:
        parent.log_file(report)
    parent.finish()
    answer = summary.summarize(run.name, done, session, seconds, report)
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show(answer, console)


def _copy_report(manifest: Manifest, store: ArtifactStore, target: Path) -> Path:
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
