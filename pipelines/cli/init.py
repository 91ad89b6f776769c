"""`enat init`."""

from __future__ import annotations

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
    from pipelines.run import config as run_config
    from pipelines.run import own_images, prediction, runner
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
    run = run_config.load_run(output)
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
