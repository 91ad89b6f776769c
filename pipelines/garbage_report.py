"""What people and programs see of garbage.py: what can go and what was removed, stage by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.garbage import Outcome, Plan, Removal
from pipelines.inventory import one_line, phrase, short
from pipelines.units import show_age, show_size

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
