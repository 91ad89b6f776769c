"""`enat init` and `enat config`: a config is written, and its keys are explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from pipelines.cli.options import JSON, console, echo_json


@click.command()
@click.argument("folder")
@click.option(
    "--resolution", type=int, required=True, metavar="PX", help="Height and width that images are cropped and resized to."
)
@click.option("--classes", "needs_classes", is_flag=True, help="Refuse images without classes.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("own-images.yaml"), show_default=True, help="The config to write."
)
@JSON
def init(folder: str, resolution: int, needs_classes: bool, output: Path, as_json: bool) -> None:
    """Write a config for the images in FOLDER, sized for this machine.

    FOLDER holds images, with or without a folder for each class, or tar shards (WebDataset) or Parquet files of images. It may also
    be s3://bucket/prefix. Class names come from the folders, .cls files and label columns. Nothing is computed.
    """
    from pipelines.artifacts.open import open_store
    from pipelines.cluster import hardware
    from pipelines.formatting import one_line, show_count
    from pipelines.prediction import show as show_prediction
    from pipelines.run import own_images, prediction, runner
    from pipelines.run.loading import load_run
    from pipelines.storage import atomic

    terminal = console(stderr=as_json)
    machines = hardware.of_this_machine()
    if output.exists():
        raise ValueError(f"{output} exists; give another file with --output, or remove it")
    with terminal.status("listing the images"):
        images = own_images.find_images(folder, needs_classes=needs_classes)
    text = own_images.config_text(images, resolution, machines, str(output))
    try:
        is_written = atomic.write_if_absent(output, [text.encode()])
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}); give another file with --output") from error
    if not is_written:
        raise ValueError(f"{output} exists; give another file with --output, or remove it")
    run = load_run(output)
    foreseen = prediction.foreseen_by(images.num_images, len(images.class_names), images.num_captions)
    store, jobs = open_store(run.store_uri, run.s3), runner.default_jobs(run.cluster)
    predicted = prediction.of_plan(run, prediction.unread_plan(run), store, machines, num_jobs=jobs, foreseen_by=foreseen)
    if as_json:
        answer: dict[str, Any] = {"config": str(output), "kind": images.dataset.kind, "images": images.num_images}
        echo_json({**answer, "classes": list(images.class_names), "predicted": show_prediction.to_json(predicted)})
        return
    classes = f" in {len(images.class_names):,} classes" if images.class_names else ", without classes"
    terminal.print(
        f"[green]✓[/] {one_line(str(output))}: {show_count(images.num_images, 'image')}{classes}, kind {images.dataset.kind}",
        highlight=False,
    )
    show_prediction.show_total(predicted, terminal)
    terminal.print(f"next      enat run {one_line(str(output))}", highlight=False, soft_wrap=True)


@click.command()
@click.argument("key", required=False, default="")
@JSON
def config(key: str, as_json: bool) -> None:
    """Describe the keys of a config: the sections, the keys of section KEY, or all about one KEY such as train.num_steps."""
    from rich.markup import escape
    from rich.table import Table

    from pipelines.run import keys

    found = keys.find(key)
    if as_json:
        echo_json([dataclasses.asdict(each) for each in found])
        return
    terminal = console()
    if key and len(found) == 1:
        (only,) = found
        lines = {"type": only.type, "default": only.default or "", "unit": only.unit, "in key": only.in_key}
        terminal.print(f"[bold]{escape(only.path)}[/]  {escape(only.text)}", highlight=False)
        for name, value in lines.items():
            if value:
                terminal.print(f"  [dim]{name:<8}[/]{escape(value)}", highlight=False)
        return
    if key:
        terminal.print(f"[bold]{escape(key)}[/]  {escape(found[0].text)}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("key", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column != "meaning")
    for each in found[1:] if key else found:
        default = "..." if each.default is None else each.default
        table.add_row(escape(each.path), escape(default), escape(each.text))
    terminal.print(table, highlight=False)
