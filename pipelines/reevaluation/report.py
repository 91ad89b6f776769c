"""The answer of a re-evaluation: a table, a line per model, and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.evaluation.protocol import SCORES
from pipelines.formatting import one_line, printable, show_age, show_number
from pipelines.reevaluation.reevaluate import Outcome, exit_code
from pipelines.registry.evaluation_record import DISTANCES
from pipelines.workflow.work import Prices

_COLORS = {"fresh": "dim", "due": "yellow", "busy": "yellow", "evaluated": "green", "drift": "red", "failed": "red"}
_SECONDS_PER_HOUR = 3600.0


def to_json(outcomes: Sequence[Outcome], prices: Prices | None = None) -> dict[str, Any]:
    """The answer of `enat reevaluate --json`. Numbers that are not finite are null."""
    return {
        "exit_code": exit_code(outcomes),
        "counts": dict(Counter(outcome.verdict for outcome in outcomes)),
        "models": [_row(outcome, prices) for outcome in outcomes],
    }


def _row(outcome: Outcome, prices: Prices | None) -> dict[str, Any]:
    cost = {name: getattr(outcome, name) for name in ("seconds", "worker_seconds", "device_seconds")}
    cost |= {"stages_computed": outcome.num_computed}
    if prices is not None:
        hours = (outcome.worker_seconds / _SECONDS_PER_HOUR, outcome.device_seconds / _SECONDS_PER_HOUR)
        cost |= {"money": prices.of(*hours), "currency": prices.currency}
    return {
        "model": outcome.version.name,
        "version": outcome.version.version,
        "artifact": outcome.version.tags.get("enat.artifact"),
        "verdict": outcome.verdict,
        "note": outcome.note,
        "evaluation": outcome.evaluation,
        "was": dict(outcome.was),
        "now": dict(outcome.now),
        "drift": {
            moved.metric: {
                "was": moved.was,
                "now": moved.now,
                "relative": moved.relative if abs(moved.relative) < float("inf") else None,
                "tolerance": moved.tolerance,
            }
            for moved in outcome.moved
        },
        "cost": cost,
    }


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    if not outcomes:
        console.print("there are no registered models to evaluate")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "", "was", "now", "verdict", "cost"):
        table.add_column(column, justify="right" if column in ("version", "was", "now") else "left", overflow="fold")
    for outcome in outcomes:
        metric = _shown_metric(outcome.was, outcome.now)
        verdict = f"[{_COLORS[outcome.verdict]}]{outcome.verdict}[/]"
        scores = [_number(side.get(metric)) for side in (outcome.was, outcome.now)]
        table.add_row(
            one_line(outcome.version.name), outcome.version.version, SCORES.get(metric, ""), *scores, verdict, _cost(outcome)
        )
    console.print()
    console.print(table, highlight=False)
    console.print()
    for outcome in outcomes:
        name = f"{outcome.version.name} version {outcome.version.version}"
        console.print(printable(f"{outcome.verdict}: {name}: {outcome.note}"), markup=False, highlight=False, soft_wrap=True)


def _shown_metric(was: Mapping[str, float], now: Mapping[str, float]) -> str:
    """A distance that both have, or else the first score of either."""
    sides = [side for side in (now, was) if side]
    names = [*DISTANCES, *SCORES]
    in_all = next((name for name in names if sides and all(name in side for side in sides)), None)
    return in_all or next((name for name in names if any(name in side for side in sides)), "")


def _number(value: float | None) -> str:
    return "–" if value is None else show_number(value, digits=5)


def _cost(outcome: Outcome) -> str:
    if outcome.verdict in ("fresh", "due", "busy"):
        return "–"
    if not outcome.num_computed:
        return "reused" if outcome.verdict != "failed" else f"{outcome.seconds:.1f} s"
    device = f", {show_age(outcome.device_seconds)} of devices" if outcome.device_seconds else ""
    return f"{outcome.seconds:.1f} s, {show_age(outcome.worker_seconds)} of workers{device}"
