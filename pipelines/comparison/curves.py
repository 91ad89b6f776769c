"""Scores while training, read from the training runs in MLflow: a curve for each model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.comparison.sections import Row
from pipelines.formatting import printable
from pipelines.tracking import search
from pipelines.tracking.search import TrackedRun
from pipelines.training.task import SCORES

_MAX_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Curve:
    """name: of the model in this comparison.   reference: "stage/key" of what its samples were compared with.

    num_samples: of each step.   scores: by step, in order; names of scores and of their errors.
    """

    name: str
    reference: str
    num_samples: int
    scores: Mapping[int, Mapping[str, float]]


def read_curves(uri: str, rows: Sequence[Row], runs: Sequence[TrackedRun], notes: list[str]) -> tuple[Curve, ...]:
    """Of the models of these rows, as far as their training computed scores. runs: evaluations, in whose experiments to look.

    A file that cannot be read is left out with a note: anyone may write to MLflow.
    """
    names = {row.trained: row.model_name for row in rows if (row.trained or "").startswith("train/")}
    if not names:
        return ()
    experiments = sorted({run.experiment_id for run in runs})
    found: dict[str, Curve] = {}
    for run in search.search_runs(uri, experiments, "tags.`enat.stage` = 'train' and attributes.status = 'FINISHED'"):
        trained = f"train/{run.tags.get('enat.key')}"
        if trained not in names or trained in found:
            continue
        try:
            content = search.read_file(uri, run.run_id, SCORES, _MAX_BYTES)
            found |= {} if content is None else {trained: _parse(content, names[trained])}
        except (ValueError, search.TrackingError) as error:
            notes.append(f"{SCORES} of run {run.run_id} is left out: {printable(str(error))}.")
    return tuple(found[trained] for trained in names if trained in found)


def _parse(content: bytes, name: str) -> Curve:
    """Raises ValueError for anything but what stage train writes."""
    try:
        fields = json.loads(content)
        scores = {int(row["step"]): _numbers(row) for row in fields["rows"]}
        return Curve(
            name=name,
            reference=printable(str(fields["reference"])),
            num_samples=int(fields["num_samples"]),
            scores=dict(sorted(scores.items())),
        )
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("it does not hold scores of steps") from error


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
