"""`enat import`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipelines.cli.options import JSON, STORE, SentenceGroup, console, echo_json, s3_options

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config


@click.group(name="import", cls=SentenceGroup)
def import_weights() -> None:
    """Import published weights (.safetensors, .pth or .ckpt; a path, s3:// or hf://owner/name/file) into a store."""


@import_weights.command(name="vqgan")
@click.argument("weights")
@click.option("--preset", default="vqgan-256", show_default=True, help="The tokenizer's architecture.")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@STORE
@s3_options
@JSON
def import_vqgan(weights: str, preset: str, overrides: tuple[str, ...], store: str, s3: S3Config, as_json: bool) -> None:
    """Import a tokenizer and print the lines with which a config uses it. FIELD=VALUE replaces a value of the preset."""
    values = [f"tokenizer.preset={preset}", f"tokenizer.weights={weights}", *(f"tokenizer.{override}" for override in overrides)]
    _import("tokenizer", values, store, s3, as_json)


@import_weights.command(name="enat")
@click.argument("weights")
@click.option("--preset", required=True, help="enat-s, enat-b, enat-l or enat-xl.")
@click.option("--vqgan", required=True, help="Weights of its tokenizer: a file, or the sha256:... of an imported one.")
@click.option("--vqgan-preset", default="vqgan-256", show_default=True)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@STORE
@s3_options
@JSON
def import_enat(
    weights: str,
    preset: str,
    vqgan: str,
    vqgan_preset: str,
    overrides: tuple[str, ...],
    store: str,
    s3: S3Config,
    as_json: bool,
) -> None:
    """Import a generator and print the lines with which a config uses it.

    tokenizer.FIELD=VALUE, or FIELD=VALUE for the generator, replaces a value of the preset.
    """
    values = [f"tokenizer.preset={vqgan_preset}", f"tokenizer.weights={vqgan}"]
    values += [f"train.model.preset={preset}", f"train.weights={weights}"]
    values += [override if override.startswith("tokenizer.") else f"train.model.{override}" for override in overrides]
    _import("train", values, store, s3, as_json)


def _import(target: str, values: list[str], store: str, s3: S3Config, as_json: bool) -> None:
    """Run the stage that reads the weights exactly as a pipeline with these values does, so that the pipeline reuses the result."""
    from pipelines.artifacts.open import open_store
    from pipelines.run import config as run_config
    from pipelines.run import graph, summary
    from pipelines.storage.external import content_digest
    from pipelines.tracking import run as tracking
    from pipelines.workflow import driver, stage

    reached = [f"s3.{name}={value}" for name, value in vars(s3).items() if value]
    run = run_config.load_run(None, ["name=import", f"store={store}", f"targets=[{target}]", *reached, *values])
    opened = open_store(run.store_uri, run.s3)
    opened.check_writable()
    off = tracking.TrackingConfig(enabled=False)
    session = stage.Session(
        store=opened,
        run=tracking.start_run("", off, "import", {}),
        tracking=off,
        console=console(stderr=True),
        connect=lambda: None,
    )
    done = driver.execute(graph.build(run), session)[-1]
    section = run.tokenizer if target == "tokenizer" else run.train
    assert section.weights is not None
    name = "sha256:" + content_digest(section.weights, f"{target}.weights", run.s3)
    place = opened.place(done.manifest.stage, done.manifest.key)
    if as_json:
        echo_json({"stage": target, "key": done.manifest.key, "reused": done.is_reused, "weights": name, "place": place})
    else:
        summary.show_import(target, values, name, place, console())
