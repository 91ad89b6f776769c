"""List what a store holds: artifacts by the beginning of their keys or by their properties, and unfinished ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from pipelines.artifacts.manifest import (
    MANIFEST,
    PARTS,
    USED,
    WORK,
    DamagedManifestError,
    Manifest,
    Name,
    inputs_of,
    name_of,
    short,
)
from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import one_line, printable, show_age, show_number, show_size
from pipelines.storage.base import StorageError, StoredFile

Describe = Callable[[Manifest], str]
_SHOWN_CHOICES = 6
_COLUMNS = ("size", "age", "artifact", "dataset", "")
_NUMBERS = ("size", "age", "parts")
_MOST_FOLDED = 100  # rows of a table whose cells are folded
_SHOWN_METRICS = 2  # of an artifact that its stage does not describe


# Finding -------------------------------------------------------------------------------------------------------------------


def find(store: ArtifactStore, name: str) -> Manifest:
    """Find the artifact whose key, or stage/key, begins with `name`.

    Raises StorageError if none or several match, or if the artifact is damaged.
    """
    return find_all(store, [name])[0]


def find_all(store: ArtifactStore, names: Sequence[str]) -> list[Manifest]:
    """The same for several names. The store is listed once."""
    manifests = []
    for found in look_up(store, names):
        if isinstance(found, DamagedManifestError):
            raise found
        manifests.append(found)
    return manifests


def look_up(store: ArtifactStore, names: Sequence[str]) -> list[Manifest | DamagedManifestError]:
    """The same, with an error in place of each damaged artifact."""
    present = [*store.names()] if names else []
    chosen = [[place for place in present if _begins(place, name)] for name in names]
    wanted = sorted({place for places in chosen for place in places})
    read = {(found.stage, found.key): found for found in store.read_manifests(wanted)}
    answers = []
    for name, places in zip(names, chosen, strict=True):
        found = [read[place] for place in places if place in read]
        if not found:
            stages = ", ".join(sorted({stage for stage, _ in present}))
            holds = f"it has artifacts of {stages} (enat artifacts ls)" if stages else "it is empty"
            raise StorageError(f"the store {store.uri} has no artifact whose key begins with {name}; {holds}")
        if len(found) > 1:
            several = ", ".join(short((each.stage, each.key)) for each in found[:_SHOWN_CHOICES])
            raise StorageError(f"{name} may mean {several}; give more of the key")
        answers += found
    return answers


def _begins(place: Name, name: str) -> bool:
    stage, slash, key = name.rpartition("/")
    return place[1].startswith(key) and (not slash or place[0] == stage)


# Describing ----------------------------------------------------------------------------------------------------------------


def created(manifest: Manifest) -> float | None:
    """Seconds since 1970; None if the manifest does not contain the time."""
    try:
        moment = datetime.fromisoformat(manifest.provenance["created"])
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def dataset_of(
    manifest: Manifest, manifests: Mapping[Name, Manifest], dataset_name: Callable[[Manifest], str | None]
) -> str | None:
    """The name of the dataset that it was made from, directly or through others. dataset_name: given by one artifact itself."""
    waiting, seen = [manifest], {name_of(manifest)}
    for each in waiting:  # grows: the nearest come first
        if (name := dataset_name(each)) is not None:
            return name
        for source in inputs_of(each):
            if source in manifests and source not in seen:
                seen.add(source)
                waiting.append(manifests[source])
    return None


def phrase(manifest: Manifest, describe: Describe) -> str:
    """An artifact in a few words: its stage's description, or else its first metrics."""
    if words := describe(manifest):
        return words
    metrics = [f"{name.removeprefix('final/')} {show_number(value)}" for name, value in manifest.metrics.items()]
    return ", ".join(metrics[:_SHOWN_METRICS])


# Listing -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which artifacts are listed: sizes in bytes from..to, ages in seconds from..to. None: any."""

    stages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    larger_than: int | None = None
    smaller_than: int | None = None
    older_than: float | None = None
    newer_than: float | None = None


@dataclass(frozen=True)
class Entry:
    """An artifact as it is listed. age_seconds: since it was made; None where the manifest does not say."""

    stage: str
    key: str
    size: int
    age_seconds: float | None
    dataset: str | None
    phrase: str


def list_artifacts(
    manifests: Iterable[Manifest],
    query: Query,
    *,
    now: float,
    by_size: bool = False,
    describe: Describe,
    dataset_name: Callable[[Manifest], str | None],
) -> list[Entry]:
    """Newest first, those of unknown age last; by_size: largest first. now: seconds since 1970."""
    every = {name_of(manifest): manifest for manifest in manifests}
    entries = []
    for manifest in every.values():
        made = created(manifest)
        age = None if made is None else now - made
        size, dataset = manifest.size, dataset_of(manifest, every, dataset_name)
        entries.append(Entry(manifest.stage, manifest.key, size, age, dataset, phrase(manifest, describe)))
    chosen = [entry for entry in entries if _is_asked_for(entry, query)]
    if by_size:
        return sorted(chosen, key=lambda entry: (-entry.size, entry.stage, entry.key))
    return sorted(chosen, key=lambda entry: (math.inf if entry.age_seconds is None else entry.age_seconds, entry.stage, entry.key))


def _is_asked_for(entry: Entry, query: Query) -> bool:
    age = math.nan if entry.age_seconds is None else entry.age_seconds  # what is not known is neither older nor newer
    return all(
        [
            not query.stages or entry.stage in query.stages,
            not query.datasets or entry.dataset in query.datasets,
            query.larger_than is None or entry.size >= query.larger_than,
            query.smaller_than is None or entry.size <= query.smaller_than,
            query.older_than is None or age >= query.older_than,
            query.newer_than is None or age <= query.newer_than,
        ]
    )


@dataclass(frozen=True)
class Unfinished:
    """The work of a run that ended early or is still running. used: when one of its files was last written."""

    stage: str
    key: str
    num_parts: int
    files: tuple[StoredFile, ...]
    used: float

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def find_unfinished(folders: Iterable[tuple[str, str, list[StoredFile]]], manifests: Iterable[Manifest]) -> list[Unfinished]:
    """Find unfinished artifacts, last used first. folders, manifests: all of a store.

    A folder of somebody else is left out: one counts if it holds records of this program, or if its stage has artifacts.
    """
    open_folders, stages = [], {manifest.stage for manifest in manifests}
    for stage, key, files in folders:
        tops = {file.name.split("/")[0] for file in files}
        if MANIFEST in tops:
            continue
        open_folders.append((stage, key, files))
        if tops & {PARTS, WORK, USED}:
            stages.add(stage)
    found = [
        Unfinished(
            stage,
            key,
            sum(file.name.startswith(f"{PARTS}/") and file.name.endswith(".json") for file in files),
            tuple(files),
            max(file.modified for file in files),
        )
        for stage, key, files in open_folders
        if stage in stages
    ]
    return sorted(found, key=lambda each: (-each.used, each.stage, each.key))


def list_table(entries: Sequence[Entry]) -> Table:
    table = _table(*_COLUMNS)
    for entry in entries:
        size, age, artifact, *foreign = _cells(entry)
        table.add_row(size, age, artifact, *map(one_line, foreign))
    return table


def show_list(entries: Sequence[Entry], store: str, console: Console) -> None:
    if 0 < len(entries) <= _MOST_FOLDED:
        console.print(list_table(entries), highlight=False)
        console.print()
    elif entries:
        for line in _lines([_COLUMNS, *map(_cells, entries)], console.width):
            console.out(line, highlight=False)
        console.print()
    total = show_size(sum(entry.size for entry in entries))
    console.print(f"{len(entries):,} artifacts, {total}, in {one_line(store)}", highlight=False, soft_wrap=True)


def show_unfinished(unfinished: Sequence[Unfinished], store: str, now: float, console: Console) -> None:
    table = _table("size", "age", "unfinished", "parts")
    for each in unfinished:
        table.add_row(show_size(each.size), show_age(now - each.used), short((each.stage, each.key)), f"{each.num_parts:,}")
    if unfinished:
        console.print(table, highlight=False)
        console.print()
    total = show_size(sum(each.size for each in unfinished))
    console.print(f"{len(unfinished):,} unfinished, {total}, in {one_line(store)}", highlight=False, soft_wrap=True)


def unfinished_json(each: Unfinished, now: float) -> dict[str, Any]:
    values = {"stage": each.stage, "key": each.key, "size": each.size, "age_seconds": now - each.used}
    return {**values, "parts": each.num_parts}


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    age = "–" if entry.age_seconds is None else show_age(entry.age_seconds)
    dataset = "–" if entry.dataset is None else entry.dataset
    return show_size(entry.size), age, short((entry.stage, entry.key)), dataset, entry.phrase


def _lines(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The same table with one line for each row, cut at the width. rich takes a millisecond to fold a row."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        padding = [" " * (most - cell_len(cell)) for cell, most in zip(row, widths, strict=True)]
        sides = zip(row, padding, _COLUMNS, strict=True)
        line = "  ".join(space + cell if name in _NUMBERS else cell + space for cell, space, name in sides).rstrip()
        yield line if cell_len(line) <= width else set_cell_size(line, width - 1) + "…"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_number = column in _NUMBERS
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number or column == "artifact")
    return table
