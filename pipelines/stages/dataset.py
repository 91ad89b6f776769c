"""Stage dataset: an index of a dataset, one row per image in the order that all later stages use, and findings about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.artifacts.manifest import FileRecord, Manifest
from pipelines.cluster import waiting
from pipelines.data.dataset import INDEX, DatasetSummary, IndexSummary, write_index
from pipelines.data.sources.base import Entry, Findings, Source
from pipelines.data.sources.config import DatasetConfig, open_source
from pipelines.formatting import one_line
from pipelines.workflow.stage import Stage, StageContext, StageResult, WorkerContext
from pipelines.workflow.work import Done, Foreseen, UnforeseeableError, Work

FINDINGS = "findings.json"
_LISTING_THREADS = 16
_SHOWN_AT_MOST = 3
_LISTING_SECONDS = 20e-6  # of one image, from a local disk
_INDEX_BYTES, _CAPTION_BYTES = 12, 30  # of an image and a caption in the index


def run(config: DatasetConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
    """Reads the listing of a dataset, or its files if they contain several images (tar, Parquet).

    Writes the index, one row per image, and findings about the dataset. Measures the numbers of images, classes and captions.
    Raises ValueError for a dataset without images, with duplicate keys, with labels that have no class, or with
    captions of other images only.
    """
    source, findings = open_source(config), Findings()
    started = time.monotonic()
    scanned = _scan_by_workers(source, config, findings, context) if source.reads_to_scan else _scan_here(source, findings)
    made: list[IndexSummary] = []

    def write(path: Path) -> None:
        made.append(write_index(path, scanned, keys_may_repeat=source.keys_may_repeat))
        if not made[0].num_images:
            raise ValueError(f"dataset {config.title} has no images at {config.path}")
        if config.captions is not None and not made[0].num_captions:
            of = f"none of the {made[0].num_images:,} images at {config.path} has captions"
            raise ValueError(f"{of} in {config.captions}; set dataset.captions to the file of their split")

    file: FileRecord = context.write(INDEX, write)
    index = made[0]
    findings.merge({"repeated paths": [*index.renamed]} if index.renamed else {})
    class_names = _class_names(source, config, index)
    for label, name in enumerate(class_names):
        if label not in index.images_per_label:
            findings.add("classes without images", name)
    record = context.write(FINDINGS, lambda path: path.write_text(json.dumps(findings.names, indent=1)))
    for kind, names in findings.names.items():
        shown = one_line(", ".join(names[:_SHOWN_AT_MOST]) + (", ..." if len(names) > _SHOWN_AT_MOST else ""))
        context.console.print(f"[yellow]![/] {kind} ({len(names):,}): [dim]{shown}[/]", highlight=False)
    counts = {kind.replace(" ", "_"): len(names) for kind, names in findings.names.items()}
    return StageResult(
        files=[file],
        records=[record],
        summary=DatasetSummary(
            name=config.title,
            num_images=index.num_images,
            num_captions=index.num_captions,
            class_names=tuple(class_names),
            findings=counts,
        ),
        metrics={"images": index.num_images, "classes": len(class_names), "captions": index.num_captions, **counts},
        worker_seconds=(seconds := time.monotonic() - started),
        work=[Done(_listing(index.num_images), seconds, 1)],
    )


def _scan_here(source: Source, findings: Findings) -> Iterator[Entry]:
    """Lists files only. One thread per folder, because a bucket answers slowly."""
    units = source.units()
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        for start in range(0, len(units), _LISTING_THREADS):
            some = [(unit, Findings()) for unit in units[start : start + _LISTING_THREADS]]
            if len(some) == 1:  # one folder of everything: not held in memory
                yield from source.scan(some[0][0], findings)
                continue
            for entries, (_, found) in zip(pool.map(lambda pair: list(source.scan(*pair)), some), some, strict=True):
                findings.merge(found.names)
                yield from entries


def _scan_by_workers(source: Source, config: DatasetConfig, findings: Findings, context: StageContext) -> Iterator[Entry]:
    """One task per file. The result of a task is committed as a part, so an interrupted scan continues."""
    import ray

    units = source.units()
    done = context.store.read_parts(context.stage, context.key)
    context.connect()
    task = ray.remote(num_cpus=1)(_scan_file)
    worker_context = context.for_workers()
    running = {
        unit: task.remote(config, unit, _part_name(n), worker_context) for n, unit in enumerate(units) if _part_name(n) not in done
    }
    with context.bar(len(units), "files") as bar:
        for number, unit in enumerate(units):
            part: dict[str, Any] = waiting.get(running.pop(unit)) if unit in running else done.pop(_part_name(number))
            findings.merge(part["findings"])
            for key, position, size, label, captions in part["entries"]:
                yield Entry(key, unit, position, size, label, tuple(captions))
            bar.advance(1)


def _scan_file(config: DatasetConfig, unit: str, name: str, context: WorkerContext) -> dict[str, Any]:
    findings = Findings()
    scanned = open_source(config).scan(unit, findings)
    entries = [[entry.key, entry.position, entry.size, entry.label, entry.captions] for entry in scanned]
    part = {"entries": entries, "findings": findings.names}
    context.store.put_part(context.stage, context.key, name, part)
    return part


def _part_name(number: int) -> str:
    return f"scan-{number:05d}"


def _class_names(source: Source, config: DatasetConfig, index: IndexSummary) -> list[str]:
    """By label. Raises ValueError if a label has no class."""
    known, largest = source.known_classes(), max(index.images_per_label)
    advice = " are named in the files"
    if known is None:
        advice = "; set dataset.num_classes"
        known = [str(label) for label in range(config.num_classes or largest + 1)]
    elif config.num_classes not in (None, len(known)):
        raise ValueError(f"dataset.num_classes is {config.num_classes}, but the files name {len(known)} classes")
    if largest >= len(known):
        raise ValueError(f"dataset {config.title} has label {largest}, but {len(known)} classes{advice}")
    return list(known)


def foresee(config: DatasetConfig, inputs: Mapping[str, Any]) -> Foreseen:
    """Lists the files. Raises UnforeseeableError if they would have to be read."""
    source = open_source(config)
    if source.reads_to_scan:
        raise UnforeseeableError(f"how many images {config.title} has is known after stage dataset; make it, or give --images")
    num_images, labels, num_captions = 0, {-1}, 0
    for entry in _scan_here(source, Findings()):
        num_images, num_captions = num_images + 1, num_captions + len(entry.captions)
        labels.add(entry.label)
    known = source.known_classes()
    num_classes = len(known) if known is not None else config.num_classes or max(labels) + 1
    return foresee_images(config, num_images=num_images, num_classes=num_classes, num_captions=num_captions)


def foresee_images(config: DatasetConfig, *, num_images: int, num_classes: int, num_captions: int) -> Foreseen:
    """The same for numbers that are known otherwise."""
    return Foreseen(
        summary=DatasetSummary(
            name=config.title,
            num_images=num_images,
            num_captions=num_captions,
            class_names=tuple(map(str, range(num_classes))),
        ),
        work=[_listing(num_images)],
        size=_INDEX_BYTES * num_images + _CAPTION_BYTES * num_captions,
    )


def _listing(num_images: int) -> Work:
    return Work(name="listing", count=num_images, cpu_seconds=_LISTING_SECONDS)


def _describe(manifest: Manifest) -> str:
    summary = DatasetSummary.read(manifest)
    counts = {"images": summary.num_images, "classes": len(summary.class_names), "captions": summary.num_captions}
    findings = [f"{what.replace('_', ' ')} {count:,}" for what, count in summary.findings.items() if count]
    return ", ".join([*(f"{count:,} {what}" for what, count in counts.items() if count), *findings])


STAGE = Stage(
    "dataset",
    2,  # 2: hidden files are not part of it, captions of tar and Parquet files are
    run,
    config=DatasetConfig,
    summary=DatasetSummary,
    foresee=foresee,
    kind="tokenizing",
    files=(INDEX, FINDINGS),
    external=("path", "captions"),
    title=lambda config: config.title,
    describe=_describe,
    reevaluation="conditions",
)
