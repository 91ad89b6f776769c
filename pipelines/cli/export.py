"""`enat export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import JSON, console, echo_json, s3_options

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.storage.s3_client import S3Config

_DEFAULT_STORE = "runs/store"


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
    from pipelines.sharing import export as sharing
    from pipelines.tracking import run as tracking

    request = sharing.ExportRequest(
        target=sharing.Target.parse(target),
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
        answer = sharing.export(opened, manifest, request)
    if as_json:
        echo_json(answer)
    else:
        _show(answer, console())


def _show(answer: Mapping[str, Any], terminal: Console) -> None:
    from pipelines.formatting import show_count, show_size

    def line(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{answer['model']}, with {show_count(len(answer['evaluations']), 'evaluation')} on its card")
    for name, size in answer["files"].items():
        line(f"  {name:<20} {show_size(size)}")
    if answer["license"] == "unknown":
        line("the card states no licence; give it with --license")
    line(f"\n{answer['folder']}" if "folder" in answer else f"\n{answer['url']}")
