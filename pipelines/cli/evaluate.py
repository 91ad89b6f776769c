"""`enat evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipelines.cli.options import JSON, OVERRIDES, console

_LABELS = (
    'How the labels of images without labels were chosen: "1000 classes" (equally many images of each), "1000 classes, drawn" '
    '(at random), "none" (no classes), "captions of NAME, drawn" (or "in order"; NAME is the dataset). If it is not known, the '
    "scores are in a separate table."
)


@click.command()
@OVERRIDES
@click.option("--samples", required=True, metavar="PATH", help="Images: a folder, .tar, .npz or .parquet, local or s3://.")
@click.option("--name", required=True, help="Name of the generator in comparisons, for example DiT-XL/2.")
@click.option("--kind", default="auto", show_default=True, help="folder, tar, npz or parquet. auto: detected from the path.")
@click.option("--labels", metavar="TEXT", help=_LABELS)
@click.option("--config", type=click.Path(path_type=Path), help="A run whose reference and metrics are used.")
@JSON
def evaluate(
    overrides: tuple[str, ...], samples: str, name: str, kind: str, labels: str | None, config: Path | None, as_json: bool
) -> None:
    """Score images of another generator with the same code as our own.

    With --config, the scores are comparable with those of that run if the labels were chosen in the same way. KEY=VALUE sets
    values of the config, for example reference.npz=VIRTUAL_imagenet256_labeled.npz reference.extractor=inception.
    """
    from pipelines.data.image_sets import ImageSetConfig, find_resolution
    from pipelines.run import config as run_config
    from pipelines.run import graph, runner, summary

    values = [*overrides, "targets=[reference]"]  # nothing is trained, so no model is checked
    run = run_config.load_run(config, values if config else ["name=evaluate", *values])
    images = ImageSetConfig(path=samples, name=name, kind=kind, labels=labels, s3=run.s3_of(samples))
    resolution = find_resolution(images) if config is None else None  # the tokenizer of a config sets it
    terminal, source = console(stderr=as_json), str(config or "the command line")
    answer = runner.run(run, source, terminal, lambda run: graph.build_evaluation(run, images, resolution))
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        summary.show(answer, terminal)
