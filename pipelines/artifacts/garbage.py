"""Removing what nobody needs any more: what was not used for a while and nothing that is kept was made from.

Kept are artifacts that were made or used within the age limit, those that are named, models that MLflow's registry has and their
last evaluations, what a stage that was at work within the limit noted, and everything that any of these was made from. Unfinished
stages and stray files (of a run that lost a race, or was killed) go by age alone.

*Use* is when any file in an artifact's folder was last written. Every run writes its note there before it looks whether the
artifact exists, and again every few minutes until the run ends, into all that it has so far (uses.py); a stage that is at work has
noted all that, too. Removing looks at it again, takes the manifest away, looks once more, and puts the manifest back if a note
came in between. So of a run and a removal that meet, either the run finds no artifact and makes it again, or the artifact stays.

What remains is a run that comes in the moments in which the files are removed, and takes over some that are about to go. Both look
twice: a commit looks for its files after the manifest is written (ArtifactStore.commit), a removal for a manifest after the files
are gone. So no manifest stays whose files went; the run fails by name, and the same command makes it again. A crash leaves files
that no manifest names, for the next time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.table import Table

from pipelines.artifacts.inventory import created, find_unfinished, phrase
from pipelines.artifacts.lineage import Lineage
from pipelines.artifacts.manifest import MANIFEST, PARTS, USED, DamagedManifestError, Manifest, Name, StoredPath, name_of, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import one_line, show_age, show_size
from pipelines.storage.base import StoreError

_log = logging.getLogger(__name__)
_THREADS = 8  # removals at once

Kind: TypeAlias = Literal["artifact", "unfinished", "stray files"]
Reason: TypeAlias = Literal["recent", "named", "registered", "damaged", "elsewhere", "needed"]


@dataclass(frozen=True)
class Removal:
    """Files that can go. manifest: of an artifact, which goes first.   used: seconds since 1970."""

    kind: Kind
    stage: str
    key: str
    files: tuple[StoredPath, ...]
    used: float
    manifest: Manifest | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """removals: what was made from others before those.   kept: artifacts, and why.   damaged: manifests that are none; their
    folders are left alone, and so is what they can be seen to be made from.   limit: what was used since then (seconds since
    1970) stays."""

    removals: Sequence[Removal]
    kept: Mapping[Name, Reason]
    damaged: Sequence[DamagedManifestError]
    limit: float


@dataclass
class Outcome:
    """What collect did. spared: removals that were not made, with the reason."""

    removed: list[Removal] = field(default_factory=list)
    spared: list[tuple[Removal, str]] = field(default_factory=list)


def plan(store: ArtifactStore, *, limit: float, named: Collection[Name] = (), registered: Collection[Name] = ()) -> Plan:
    """What could go. limit: seconds since 1970.   named, registered: (stage, key) of what is to stay."""
    folders = {(stage, key): files for stage, key, files in store.folders()}  # before manifests: what is committed meanwhile is new
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
    needed += [name for each in unfinished if each.used >= limit for name in store.noted_inputs(each.stage, each.key)]
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


def _last_used(files: Iterable[StoredPath], manifest: Manifest | None = None) -> float:
    made = created(manifest) if manifest is not None else None
    return max([file.modified for file in files] + ([made] if made is not None else []), default=0.0)


def _stray_files(files: Iterable[StoredPath], manifest: Manifest, limit: float) -> tuple[StoredPath, ...]:
    """Of a committed artifact: what it does not name, but for the notes on it."""
    own = {MANIFEST, USED, *(record.path for record in (*manifest.files, *manifest.records))}
    return tuple(file for file in files if file.path not in own and file.modified < limit)


def collect(store: ArtifactStore, planned: Plan, advance: Callable[[Removal], None] = lambda _: None) -> Outcome:
    """Remove what a plan names and is still as it was. advance: is told of each removal that was made or spared."""
    outcome, needed = Outcome(), set[Name]()
    graph = Lineage(removal.manifest for removal in planned.removals if removal.kind == "artifact" and removal.manifest)

    def remove(removal: Removal) -> str | None:
        if removal.kind == "artifact" and (removal.stage, removal.key) in needed:
            return "something made from it was used meanwhile"
        return _REMOVE[removal.kind](store, removal, planned.limit)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gc") as pool:
        for some in _in_turn(planned.removals, graph):
            for removal, reason in zip(some, pool.map(remove, some), strict=True):
                if reason is None:
                    outcome.removed.append(removal)
                else:
                    outcome.spared.append((removal, reason))
                advance(removal)
            needed.update(graph.ancestors([(spared.stage, spared.key) for spared, _ in outcome.spared]))
    return outcome


def _in_turn(removals: Iterable[Removal], graph: Lineage) -> list[list[Removal]]:
    """Removals that can be made at once, after those of what was made from them."""
    turns: dict[Name, int] = {}
    groups: dict[int, list[Removal]] = {}
    for removal in removals:
        name = (removal.stage, removal.key)
        turn = 0
        if removal.kind == "artifact":
            turn = turns[name] = 1 + max((turns.get(made, 0) for made in graph.outputs(name)), default=0)
        groups.setdefault(turn, []).append(removal)
    return [some for _, some in sorted(groups.items())]


def _remove_artifact(store: ArtifactStore, removal: Removal, limit: float) -> str | None:
    """None where it is gone now, else why not."""
    name, manifest = (removal.stage, removal.key), removal.manifest
    assert manifest is not None
    if _last_used(store.list_files(*name), manifest) >= limit:  # also if it was removed and made again
        return "it was used meanwhile"
    store.delete_manifest(*name)
    after = store.list_files(*name)
    if _last_used(after) >= limit:
        _put_back(store, manifest)
        return "it was used meanwhile"
    return _remove_files(store, name, after, limit)


def _put_back(store: ArtifactStore, manifest: Manifest) -> None:
    try:
        store.commit(manifest)
    except StoreError as error:
        _log.warning("%s was damaged and is made again by the run that asks for it now (%s)", short(name_of(manifest)), error)


def _remove_unfinished(store: ArtifactStore, removal: Removal, limit: float) -> str | None:
    name = (removal.stage, removal.key)
    files = store.list_files(*name)
    if _last_used(files) >= limit:
        return "work on it goes on"
    if MANIFEST in {file.path for file in files}:
        return "it was finished meanwhile"
    return _remove_files(store, name, files, limit)


def _remove_files(store: ArtifactStore, name: Name, files: Iterable[StoredPath], limit: float) -> str | None:
    """Remove files of what has no manifest. None where they are gone now, else why some stay.

    Records of parts go before the files they vouch for, and the note of use last, so that whatever a crash leaves is consistent,
    and seen as this program's. A run may come at any moment: a commit and this look for each other's doing after their own.
    """
    paths = {file.path for file in files} - {USED}
    records = {path for path in paths if path.startswith(f"{PARTS}/")}
    if records:
        store.delete_files(*name, sorted(records))
        if _last_used(store.list_files(*name)) >= limit:  # a run that read the records before finds their files
            return "work on it goes on"
    if paths - records:
        store.delete_files(*name, sorted(paths - records))
    left = {file.path: file for file in store.list_files(*name)}
    if MANIFEST in left:
        if (made := store.read_manifest(*name)) is not None and not [*store.missing_files(made)]:
            return "it was made again meanwhile"
        store.delete_manifest(*name)
        _log.warning("%s was made of files that were being removed, and is gone again; run again what made it", short(name))
    if USED in left and _last_used(left.values()) < limit:  # else it is of a run that has just come
        store.delete_files(*name, [USED])
    return None


def _remove_stray(store: ArtifactStore, removal: Removal, limit: float) -> str | None:
    name = (removal.stage, removal.key)
    manifest = store.read_manifest(*name)
    if manifest is None:
        return "the artifact is gone"
    planned = {file.path for file in removal.files}
    paths = [file.path for file in _stray_files(store.list_files(*name), manifest, limit) if file.path in planned]
    paths.sort(key=lambda path: not path.startswith(f"{PARTS}/"))  # records before the files they vouch for
    if paths:
        store.delete_files(*name, paths)
    return None


_REMOVE: Mapping[Kind, Callable[[ArtifactStore, Removal, float], str | None]] = {
    "artifact": _remove_artifact,
    "unfinished": _remove_unfinished,
    "stray files": _remove_stray,
}


_KINDS = ("artifact", "unfinished", "stray files")


def show(planned: Plan, outcome: Outcome | None, store: str, now: float, console: Console) -> None:
    """outcome: None where nothing was to be removed yet."""
    removals = planned.removals if outcome is None else outcome.removed
    if removals:
        table = _table("size", "used", "what", "artifact", "")
        for removal in removals:
            what = phrase(removal.manifest) if removal.kind == "artifact" and removal.manifest else f"{len(removal.files)} files"
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
        verb = "would be freed; --delete removes it" if removals else "would be freed: there is nothing to remove"
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
    """Artifacts and unfinished ones, but of stray files how many there are."""
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
    return {**values, "used": removal.used, "files": [file.path for file in removal.files]}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_text = column in ("stage", "what", "artifact", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column not in ("", "stage"))
    return table
