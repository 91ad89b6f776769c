"""`enat import` and `enat export`: weights of others in, own models out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import JSON, STORE, SentenceGroup, console, echo_json, s3_options

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.storage.s3_client import S3Config

_DEFAULT_STORE = "runs/store"  # of exports


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
    from pipelines.run import graph, summary
    from pipelines.run.loading import load_run
    from pipelines.storage.external import content_digest
    from pipelines.tracking import run as tracking
    from pipelines.workflow import driver, node_run

    reached = [f"s3.{name}={value}" for name, value in vars(s3).items() if value]
    run = load_run(None, ["name=import", f"store={store}", f"targets=[{target}]", *reached, *values])
    opened = open_store(run.store_uri, run.s3)
    opened.check_writable()
    off = tracking.TrackingConfig(enabled=False)
    session = node_run.Session(
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


@click.command()
@click.argument("model")
@click.option("--hf", "target", required=True, metavar="FOLDER|OWNER/NAME", help="A new folder, or a repository of the hub.")
@click.option(
    "--license",
    "licence",
    default="unknown",
    show_default=True,
    metavar="ID",
    help="Licence of the weights on the card: an identifier of the hub, such as mit.",
)
@click.option("--public", is_flag=True, help="Make a new repository public. Without it a new repository is private.")
@click.option(
    "-n", "--num-images", type=click.IntRange(0, 1000), default=20, show_default=True, help="Samples on the card's picture."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of these samples.")
@click.option("--device", default="auto", show_default=True, help="Where these samples are made: cpu, cuda, ...")
@click.option("--store", help=f"A folder or s3://bucket/prefix. [default: {_DEFAULT_STORE}]")
@click.option("--tracking-uri", help="MLflow's URI, for a MODEL given by name. [default: MLFLOW_TRACKING_URI, or runs/mlflow.db]")
@s3_options
@JSON
def export(
    model: str,
    target: str,
    licence: str,
    public: bool,
    num_images: int,
    seed: int,
    device: str,
    store: str | None,
    tracking_uri: str | None,
    s3: S3Config,
    as_json: bool,
) -> None:
    """Write a model with its tokenizer, a card and samples to a folder, or upload them to the Hugging Face hub.

    MODEL is a prefix of a model's key ([train/]KEY), or a registered model: name@alias. ENATPipeline.from_pretrained opens the
    result. The token of an upload is HF_TOKEN, or that of `hf auth login`.
    """
    from pipelines.artifacts.open import open_existing, open_store
    from pipelines.sampling import models
    from pipelines.sampling.request import choose_device
    from pipelines.sharing import export as exporting
    from pipelines.tracking import run as tracking

    request = exporting.ExportRequest(
        target=exporting.Target.parse(target),
        licence=licence,
        num_images=num_images,
        seed=seed,
        device=choose_device(device),
        is_public=public,
    )
    if models.is_registered(model):
        uri = tracking.resolve_uri(tracking.TrackingConfig(uri=tracking_uri), Path("runs"))
        opened, manifest = models.find_registered(uri, model, open_store(store, s3) if store else None, s3)
    else:
        opened = open_existing(store or _DEFAULT_STORE, s3)
        manifest = models.find_model(opened, model)
    with console(stderr=True).status("exporting"):
        answer = exporting.export(opened, manifest, request)
    if as_json:
        echo_json(answer)
    else:
        _show_export(answer, console())


def _show_export(answer: Mapping[str, Any], terminal: Console) -> None:
    from pipelines.formatting import show_count, show_size

    def line(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{answer['model']}, with {show_count(len(answer['evaluations']), 'evaluation')} on its card")
    for name, size in answer["files"].items():
        line(f"  {name:<20} {show_size(size)}")
    if answer["license"] == "unknown":
        line("the card states no licence; give it with --license")
    line(f"\n{answer['folder']}" if "folder" in answer else f"\n{answer['url']}")
