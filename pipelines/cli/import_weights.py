"""`enat import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import JSON, STORE, SentenceGroup, console, echo_json, s3_options

if TYPE_CHECKING:
    from pipelines.storage.s3_client import S3Config


class _WithKnownWeights(SentenceGroup):
    """A command for each kind of weights, and one for each entry of known.yaml."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from pipelines.sharing.known import load_known

        return [*super().list_commands(ctx), *load_known()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from pipelines.sharing.known import load_known

        return super().get_command(ctx, cmd_name) or (_known_command(cmd_name) if cmd_name in load_known() else None)


@click.group(name="import", cls=_WithKnownWeights)
def import_weights() -> None:
    """Import published weights into a store: any file (.safetensors, .pth or .ckpt; a path, s3://, hf://owner/name/file or https://)
    as vqgan or enat, or known weights by their name."""


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


def _known_command(name: str) -> click.Command:
    from pipelines.sharing.known import load_known

    entry = load_known()[name]
    vqgan = click.option("--vqgan", metavar="FILE", help=f"Weights of its tokenizer, {entry.tokenizer}, or their sha256:...")
    decorators: list[Any] = [JSON, s3_options, STORE, *([vqgan] if entry.kind == "enat" else [])]

    def command(**options: Any) -> None:  # one for each entry: the decorators leave their options on it
        _import_known(name, **options)

    for decorate in (*decorators, click.argument("file", required=False)):
        command = decorate(command)
    text = f"Import {entry.name}, published at {entry.page} (known from: {entry.source}). Licence: {entry.licence}."
    where = "" if entry.file else " FILE is required: only browsers get it from its page."
    made: click.Command = click.command(name, short_help=f"{entry.name} ({entry.source})", help=text + where)(command)
    return made


def _import_known(name: str, *, file: str | None, store: str, s3: S3Config, as_json: bool, vqgan: str | None = None) -> None:
    from pipelines.sharing import known
    from pipelines.storage.external import content_digest

    entry, terminal = known.load_known()[name], console(stderr=True)
    parts = [(name, known.place_of(name, file))]
    if entry.tokenizer is not None:
        if vqgan is None and known.load_known()[entry.tokenizer].file is None:
            page = known.load_known()[entry.tokenizer].page
            raise click.UsageError(f"{name} needs --vqgan, the file of its tokenizer {entry.tokenizer}, from {page}")
        parts.append((entry.tokenizer, known.place_of(entry.tokenizer, vqgan)))
    for part, place in parts:
        sentence = known.verify(part, content_digest(place, part, s3))
        terminal.print(f"{part}: {sentence}", markup=False, highlight=False, soft_wrap=True)
        terminal.print(f"{part}: licence: {known.load_known()[part].licence}", markup=False, highlight=False, soft_wrap=True)
    values = entry.values(*(place for _, place in parts))
    _import("tokenizer" if entry.kind == "vqgan" else "train", values, store, s3, as_json)


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
