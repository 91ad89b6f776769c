"""`enat evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipelines.commands.options import JSON, OVERRIDES, console


@click.command()
@OVERRIDES
@click.option("--samples", required=True, metavar="PATH", help="Images: a folder, .tar, .npz or .parquet, also s3://.")
@click.option("--name", required=True, help="Of the generator, as it is to stand in comparisons, such as DiT-XL/2.")
@click.option("--kind", default="auto", show_default=True, help="folder, tar, npz or parquet, where it cannot be told by looking.")
@click.option("--config", type=click.Path(path_type=Path), help="A run whose reference and metrics are taken.")
@JSON
def evaluate(overrides: tuple[str, ...], samples: str, name: str, kind: str, config: Path | None, as_json: bool) -> None:
    """Score images that another generator made, by the same code as our own.

    With --config the scores are comparable with those of that run. KEY=VALUE replaces values of it, or gives them, such as
    reference.npz=VIRTUAL_imagenet256_labeled.npz reference.extractor=inception.
    """
    from pipelines import pipeline, runs, summary
    from pipelines.image_sets import ImageSetConfig, find_resolution

    values = [*overrides, "targets=[reference]"]  # nothing is trained, so nothing of a model is checked
    run = pipeline.load_run(config, values if config else ["name=evaluate", *values])
    images = ImageSetConfig(path=samples, name=name, kind=kind, s3=run.s3)
    resolution = find_resolution(images) if config is None else None  # a config says it by its tokenizer
    terminal, source = console(stderr=as_json), str(config or "the command line")
    answer = runs.run(run, source, terminal, lambda run: pipeline.build_evaluation(run, images, resolution))
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show(answer, terminal)
