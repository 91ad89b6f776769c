"""A prediction in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pipelines.formatting import show_duration, show_size
from pipelines.prediction.predict import Prediction, Range, StagePrediction

LEAST = ("rate", "writes", "range")  # columns that a narrow terminal leaves out, in this order


def columns(prediction: Prediction) -> tuple[str, ...]:
    """Titles of the columns of a table of stages. Those of GPUs are left out if none is used."""
    return ("takes", "range", *(["GPU-hours"] if prediction.device_hours.value else []), "writes", "rate")


def cells(prediction: Prediction, node: str) -> tuple[str, ...]:
    """Of these columns. Empty for a stage that is reused."""
    stage, num_columns = prediction.stages.get(node), len(columns(prediction))
    if stage is None:
        return ("",) * num_columns
    if stage.problem is not None:
        return ("?", *[""] * (num_columns - 1))
    hours = [_hours(stage.device_hours.value) if stage.device_hours.value else ""] if prediction.device_hours.value else []
    return show_duration(stage.seconds.value), f"[dim]{show_range(stage.seconds)}[/]", *hours, show_size(stage.size), stage.source


def show_total(prediction: Prediction, console: Console) -> None:
    """Lines about the whole run, and about what cannot be predicted."""
    if not prediction.stages:
        return
    least = "" if prediction.is_complete else "at least "
    takes = f"{least}{show_duration(prediction.seconds.value)} ({show_range(prediction.seconds)})"
    console.print(f"the run takes {takes} on {prediction.machines.described}", highlight=False)
    if 1 < len(prediction.critical) < len(prediction.stages):  # else one after the other
        console.print(f"its longest path is {', '.join(prediction.critical)}", highlight=False, soft_wrap=True)
    costs = [f"{_hours(prediction.worker_hours.value)} worker-hours"]
    if prediction.device_hours.value:
        costs.append(f"{_hours(prediction.device_hours.value)} GPU-hours")
    costs.append(f"{show_size(prediction.size)} written")
    if prediction.money is not None:
        money = prediction.money
        costs.append(f"{money.value:,.2f} {prediction.currency} ({money.low:,.2f} to {money.high:,.2f})")
    console.print(f"{', '.join(costs)}", highlight=False)
    if most := [node for node, stage in prediction.stages.items() if stage.is_most]:
        console.print(
            f"[yellow]![/] {', '.join(most)}: an upper bound, because sampler.entropy_bound chooses the passes of each image",
            highlight=False,
            soft_wrap=True,
        )
    for problem in dict.fromkeys(stage.problem for stage in prediction.stages.values() if stage.problem is not None):
        console.print(f"[yellow]![/] not predicted: {problem}", highlight=False, soft_wrap=True)


def to_json(prediction: Prediction) -> dict[str, Any]:
    """Of the whole run."""
    return {
        "machines": prediction.machines.described,
        "is_complete": prediction.is_complete,
        "seconds": prediction.seconds.to_dict(),
        "worker_hours": prediction.worker_hours.to_dict(),
        "device_hours": prediction.device_hours.to_dict(),
        "bytes": prediction.size,
        "money": prediction.money.to_dict() if prediction.money is not None else None,
        "currency": prediction.currency,
        "critical_path": list(prediction.critical),
    }


def stage_to_json(stage: StagePrediction | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    if stage.problem is not None:
        return {"problem": stage.problem}
    return {
        "seconds": stage.seconds.to_dict(),
        "worker_hours": stage.worker_hours.value,
        "device_hours": stage.device_hours.value,
        "bytes": stage.size,
        "artifacts_measured": stage.num_measured,
        "is_upper_bound": stage.is_most,
    }


def show_range(seconds: Range) -> str:
    """ "57 to 75 s" """
    (low, unit), (high, other) = (show_duration(side).split() for side in (seconds.low, seconds.high))
    return f"{low} to {high} {unit}" if unit == other else f"{low} {unit} to {high} {other}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
