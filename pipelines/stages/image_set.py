"""Stage images: an index of images that another generator made. Every image is read. All must be complete and of one size."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from pipelines.artifacts.manifest import Manifest
from pipelines.cluster import waiting
from pipelines.data.dataset import INDEX, write_index
from pipelines.data.image_sets import ImageSetConfig, ImageSetSummary, check_images, label_scheme, resolution_of, scan
from pipelines.data.labels import UNKNOWN
from pipelines.data.sources.base import Entry, Findings
from pipelines.formatting import one_line
from pipelines.workflow.stage import Stage, StageContext, StageResult

_IMAGES_PER_TASK = 512


def run(config: ImageSetConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads images: a folder, .tar, .npz or .parquet.

    Writes an index of them. Measures how many there are. Raises ValueError, naming the image, if one cannot be read or has another
    size.
    """
    started = time.monotonic()
    config, findings = replace(config, kind=config.found_kind()), Findings()
    entries = scan(config, findings)
    resolution, scheme = resolution_of(config, entries), label_scheme(config, entries)
    if scheme == UNKNOWN:
        note = f"how {one_line(config.name)} chose labels is not known, so its scores are in a separate table; see --labels"
        context.console.print(f"[yellow]![/] {note}", highlight=False)
    if config.kind == "npz":
        num_jpeg = check_images(config, entries, resolution)
    else:
        num_jpeg = _check_by_workers(config, entries, resolution, context)
    if num_jpeg:
        note = f"{num_jpeg:,} of {len(entries):,} images of {one_line(config.name)} are stored as JPEG, which changes scores; "
        note += "they are in a separate table. Store samples as PNG or .npz"
        context.console.print(f"[yellow]![/] {note}", highlight=False)

    labels = {entry.label for entry in entries}
    return StageResult(
        files=[context.write(INDEX, lambda path: write_index(path, entries, keys_may_repeat=config.kind == "parquet"))],
        summary=ImageSetSummary(
            name=config.name,
            kind=config.kind,
            num_images=len(entries),
            resolution=resolution,
            content_digest=config.digest(),
            labels=scheme,
            num_classes=0 if -1 in labels else max(labels) + 1,
            other_files=len(findings.names.get("other files", [])),
            num_jpeg=num_jpeg,
        ),
        metrics={"images": len(entries)},
        worker_seconds=time.monotonic() - started,
    )


def _check_by_workers(config: ImageSetConfig, entries: list[Entry], resolution: int, context: StageContext) -> int:
    """How many images are JPEG.

    Runs a task for each few images and waits for them in order, so that the error names the first wrong image. The tasks after
    it are short and not cancelled: in Ray 2.60, ray.cancel races with their answers, which can end the driver."""
    import ray

    context.connect()
    task = ray.remote(num_cpus=1)(check_images)
    pieces = [entries[start : start + _IMAGES_PER_TASK] for start in range(0, len(entries), _IMAGES_PER_TASK)]
    running = [task.remote(config, piece, resolution) for piece in pieces]
    num_jpeg = 0
    with context.bar(len(entries), "images") as bar:
        for piece, reference in zip(pieces, running, strict=True):
            num_jpeg += waiting.get(reference)
            bar.advance(len(piece))
    return num_jpeg


def _describe(manifest: Manifest) -> str:
    summary = ImageSetSummary.read(manifest)
    return f"{summary.num_images:,} images from outside, {summary.resolution} px"


STAGE = Stage(
    "images",
    3,
    run,
    config=ImageSetConfig,
    summary=ImageSetSummary,
    kind="evaluation",  # they are read to be scored; the cost of generating them is not known
    files=(INDEX,),
    external=("path",),
    describe=_describe,
    title=lambda config: config.name,
)
