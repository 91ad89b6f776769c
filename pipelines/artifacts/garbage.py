"""Remove what is no longer needed: artifacts that were not used for a while, and that nothing that is kept was made from.

Kept are artifacts that were made or used within the age limit, those that are named, models that MLflow's registry has and their
last evaluations, inputs that a stage recorded which was at work within the limit, and everything that any of these was made from.
Unfinished stages and stray files (of a run that lost a race, or was killed) are removed by age alone.

*Use* is the time at which any file in an artifact's folder was last written. Every run writes a record of use there before it looks
whether the artifact exists, and again every few minutes until the run ends, for all artifacts that it has so far (last_used.py). A
removal looks at the time again, deletes the manifest, looks once more, and puts the manifest back if a record came in between. So
if a run and a removal overlap, either the run finds no artifact and makes it again, or the artifact stays.

One case remains: a run that starts while the files are being removed, and reuses some that are about to go. Both sides look twice:
a commit looks for its files after the manifest is written (ArtifactStore.commit), and a removal looks for a manifest after the
files are gone. So no manifest stays without its files: the run fails with a message, and the same command makes the artifact again.
A crash leaves files that no manifest names, for the next removal.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from rich.console import Console
from rich.table import Table

from pipelines.artifacts.inventory import Describe, created, find_unfinished, phrase
from pipelines.artifacts.lineage import Lineage
from pipelines.artifacts.manifest import MANIFEST, PARTS, USED, DamagedManifestError, Manifest, Name, name_of, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import one_line, show_age, show_count, show_size
from pipelines.storage.base import MissingFileError, StoredFile, in_parallel

Kind: TypeAlias = Literal["artifact", "unfinished", "stray files"]
Reason: TypeAlias = Literal["recent", "named", "registered", "damaged", "elsewhere", "needed"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
_THREADS = 8  # removals at once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """Files that can be removed. manifest: of an artifact; removed first.   used: seconds since 1970."""

    kind: Kind
    stage: str
    key: str
    files: tuple[StoredFile, ...]
    used: float
    manifest: Manifest | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """removals: artifacts before those that they were made from.   kept: artifacts, and why.   damaged: manifests that cannot be
    read; their folders stay, and so do those of their inputs that can be made out.   limit: what was used since then (seconds
    since 1970) stays."""

    removals: Sequence[Removal]
    kept: Mapping[Name, Reason]
    damaged: Sequence[DamagedManifestError]
    limit: float


@dataclass
class Outcome:
    """What collect did. spared: planned removals that were not made, with the reason."""

    removed: list[Removal] = field(default_factory=list)
    spared: list[tuple[Removal, str]] = field(default_factory=list)


def plan(store: ArtifactStore, *, limit: float, named: Collection[Name] = (), registered: Collection[Name] = ()) -> Plan:
    """Plan removals. limit: seconds since 1970.   named, registered: (stage, key) of artifacts to keep."""
    folders = {
        (stage, key): files for stage, key, files in store.folders()
    }  # before manifests: an artifact that is committed meanwhile is new
    read = [*store.read_manifests()]
    manifests = {name_of(found): found for found in read if isinstance(found, Manifest)}
    damaged = [found for found in read if isinstance(found, DamagedManifestError)]
    unfinished = find_unfinished(((*name, files) for name, files in folders.items() if name not in manifests), manifests.values())

    roots: dict[Name, Reason] = {}
    for name, manifest in manifests.items():
        if name not in folders:
            roots[name] = "elsewhere"  # behind a link, or committed just now
        elif _last_used(folders[name], manifest) >= limit:
            roots[name] = "recent"
        elif name in named:
            roots[name] = "named"
        elif name in registered:
            roots[name] = "registered"
    kept = dict(roots)
    graph = Lineage(manifests.values())
    needed = [name for each in damaged for name in each.inputs]
    at_work = [store.recorded_inputs(each.stage, each.key) for each in unfinished if each.used >= limit]
    # What a stage at work needs is not known if its record is damaged: everything stays until the stage records it again.
    needed += [*manifests] if None in at_work else [name for inputs in at_work for name in inputs or ()]
    for name in (*needed, *graph.ancestors([*roots, *needed])):
        if name in manifests:
            kept.setdefault(name, "needed")

    removals = [
        Removal("artifact", *name, tuple(folders[name]), _last_used(folders[name], manifests[name]), manifests[name])
        for name in reversed(graph.oldest_first(manifests))
        if name not in kept
    ]
    removals += [Removal("unfinished", each.stage, each.key, each.files, each.used) for each in unfinished if each.used < limit]
    for name in kept:
        if stray := _stray_files(folders.get(name, []), manifests[name], limit):
            removals.append(Removal("stray files", *name, stray, max(file.modified for file in stray), manifests[name]))
    return Plan(removals=removals, kept=kept, damaged=damaged, limit=limit)


def _last_used(files: Iterable[StoredFile], manifest: Manifest | None = None) -> float:
    made = created(manifest) if manifest is not None else None
    return max([file.modified for file in files] + ([made] if made is not None else []), default=0.0)


def _stray_files(files: Iterable[StoredFile], manifest: Manifest, limit: float) -> tuple[StoredFile, ...]:
    """Old files of a committed artifact that it does not name, except its record of use."""
    own = {MANIFEST, USED, *(record.path for record in (*manifest.files, *manifest.records))}
    return tuple(file for file in files if file.name not in own and file.modified < limit)


def collect(store: ArtifactStore, planned: Plan, advance: Callable[[Removal], None] = lambda _: None) -> Outcome:
    """Make the planned removals, except of what was used meanwhile. advance: called after each removal, made or spared."""
    outcome, needed = Outcome(), set[Name]()
    graph = Lineage(removal.manifest for removal in planned.removals if removal.kind == "artifact" and removal.manifest)

    def remove(removal: Removal) -> str | None:
        if removal.kind == "artifact" and (removal.stage, removal.key) in needed:
            return "something made from it was used meanwhile"
        return _remove(store, removal, planned.limit)

    for some in _in_turn(planned.removals, graph):
        for removal, reason in zip(some, in_parallel(remove, some, _THREADS), strict=True):
            if reason is None:
                outcome.removed.append(removal)
            else:
                outcome.spared.append((removal, reason))
            advance(removal)
        needed.update(graph.ancestors([(spared.stage, spared.key) for spared, _ in outcome.spared]))
    return outcome


def _in_turn(removals: Iterable[Removal], graph: Lineage) -> list[list[Removal]]:
    """Groups of removals that can be made at the same time. Artifacts come after those that were made from them."""
    turns: dict[Name, int] = {}
    groups: dict[int, list[Removal]] = {}
    for removal in removals:
        name = (removal.stage, removal.key)
        turn = 0
        if removal.kind == "artifact":
            turn = turns[name] = 1 + max((turns.get(made, 0) for made in graph.outputs(name)), default=0)
        groups.setdefault(turn, []).append(removal)
    return [some for _, some in sorted(groups.items())]


def _remove(store: ArtifactStore, removal: Removal, limit: float) -> str | None:
    """Returns None if it was removed, else the reason why not."""
    name, manifest = (removal.stage, removal.key), removal.manifest
    if removal.kind == "stray files":
        return _remove_stray(store, removal, limit)
    files = store.list_files(*name)
    if _last_used(files, manifest) >= limit:  # also if it was removed and made again
        return "work on it continues" if manifest is None else "it was used meanwhile"
    if manifest is None and MANIFEST in {file.name for file in files}:
        return "it was finished meanwhile"
    if manifest is not None:
        store.delete_manifest(*name)
        files = store.list_files(*name)
        if _last_used(files) >= limit:
            _put_back(store, manifest)
            return "it was used meanwhile"
    return _remove_files(store, name, files, limit)


def _put_back(store: ArtifactStore, manifest: Manifest) -> None:
    try:
        store.commit(manifest)
    except (MissingFileError, DamagedManifestError) as error:
        _log.warning("%s was damaged; the run that asks for it now makes it again (%s)", short(name_of(manifest)), error)


def _remove_files(store: ArtifactStore, name: Name, files: Iterable[StoredFile], limit: float) -> str | None:
    """Remove files that no manifest names. Returns None if they were removed, else the reason why some stay.

    Records of parts are removed before the files that they name, and the record of use last. What a crash leaves is then consistent
    and still recognized as an artifact's folder. A run may start at any moment: see the module's docstring.
    """
    paths = {file.name for file in files} - {USED}
    records = {path for path in paths if path.startswith(f"{PARTS}/")}
    if records:
        store.delete_files(*name, sorted(records))
        if _last_used(store.list_files(*name)) >= limit:  # a run that has read the records finds their files
            return "work on it continues"
    if paths - records:
        store.delete_files(*name, sorted(paths - records))
    left = {file.name: file for file in store.list_files(*name)}
    if MANIFEST in left:
        if (made := store.read_manifest(*name)) is not None and not [*store.missing_files(made)]:
            return "it was made again meanwhile"
        store.delete_manifest(*name)
        _log.warning(
            "%s was made from files that were being removed, and is removed again; repeat the run that made it", short(name)
        )
    if USED in left and _last_used(left.values()) < limit:  # else a run has just written it
        store.delete_files(*name, [USED])
    return None


def _remove_stray(store: ArtifactStore, removal: Removal, limit: float) -> str | None:
    name = (removal.stage, removal.key)
    manifest = store.read_manifest(*name)
    if manifest is None:
        return "the artifact is gone"
    planned = {file.name for file in removal.files}
    paths = [file.name for file in _stray_files(store.list_files(*name), manifest, limit) if file.name in planned]
    paths.sort(key=lambda path: not path.startswith(f"{PARTS}/"))  # records before the files that they name
    if paths:
        store.delete_files(*name, paths)
    return None


# Showing -------------------------------------------------------------------------------------------------------------------


def show(
    planned: Plan,
    outcome: Outcome | None,
    store: str,
    now: float,
    console: Console,
    *,
    describe: Describe = lambda manifest: "",
) -> None:
    """Print a plan and its outcome. outcome: None for a dry run."""
    removals = planned.removals if outcome is None else outcome.removed
    if removals:
        table = _table("size", "used", "what", "artifact", "")
        for removal in removals:
            manifest = removal.manifest if removal.kind == "artifact" else None
            what = show_count(len(removal.files), "file") if manifest is None else phrase(manifest, describe)
            age = f"{show_age(now - removal.used)} ago"
            table.add_row(show_size(removal.size), age, removal.kind, short((removal.stage, removal.key)), one_line(what))
        console.print(table, highlight=False)
        console.print()
        console.print(_totals(removals), highlight=False)
        console.print()
    for removal, reason in outcome.spared if outcome else ():
        console.print(f"{short((removal.stage, removal.key))} stays: {reason}", highlight=False)
    reasons = Counter(planned.kept.values())
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    total = show_size(sum(removal.size for removal in removals))
    console.print(f"kept {len(planned.kept)} artifacts ({why})", highlight=False)
    if outcome is None:
        verb = "would be freed; --delete removes it" if removals else "would be freed: nothing can be removed"
    else:
        verb = "freed"
    console.print(f"{total} {verb}, in {one_line(store)}", highlight=False, soft_wrap=True)


def _totals(removals: Sequence[Removal]) -> Table:
    table = _table("stage", "artifacts", "unfinished", "stray files", "size")
    for stage in sorted({removal.stage for removal in removals}):
        own = [removal for removal in removals if removal.stage == stage]
        counts = [_count(own, kind) for kind in _KINDS]
        table.add_row(stage, *map(str, counts), show_size(sum(removal.size for removal in own)))
    return table


def _count(removals: Sequence[Removal], kind: str) -> int:
    """Number of artifacts or of unfinished ones; of stray files, the number of files."""
    return sum(len(removal.files) if kind == "stray files" else 1 for removal in removals if removal.kind == kind)


def to_json(planned: Plan, outcome: Outcome | None) -> dict[str, Any]:
    removals = planned.removals if outcome is None else outcome.removed
    by_stage = {
        stage: sum(removal.size for removal in removals if removal.stage == stage)
        for stage in sorted({removal.stage for removal in removals})
    }
    return {
        "deleted": outcome is not None,
        "bytes": sum(by_stage.values()),
        "bytes_by_stage": by_stage,
        "removals": [_removal(removal) for removal in removals],
        "spared": [{**_removal(removal), "reason": reason} for removal, reason in outcome.spared] if outcome else [],
        "kept": {"/".join(name): reason for name, reason in planned.kept.items()},
        "damaged": [{"stage": damaged.stage, "key": damaged.key, "reason": str(damaged)} for damaged in planned.damaged],
    }


def _removal(removal: Removal) -> dict[str, Any]:
    values = {"kind": removal.kind, "stage": removal.stage, "key": removal.key, "bytes": removal.size}
    return {**values, "used": removal.used, "files": [file.name for file in removal.files]}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_text = column in ("stage", "what", "artifact", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column not in ("", "stage"))
    return table
