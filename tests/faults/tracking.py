"""MLflow that is away at the start of a run, in the middle, at the end, or all the time, and loses answers."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from network import proxy
from oracle import STAGES, Laboratory, Outcome, differences, wait_until

from services.mlflow_server import mlflow_server

MOMENTS = ("start", "middle", "end", "always")


def tracking(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """What the server missed is recorded by the end of the next command, once."""
    stage, moment = rng.choice(("train", "train", "generate", "tokenizer", "token_map")), rng.choice(MOMENTS)
    store, experiment = lab.copy_before(lab.folder / "work", stage), f"{rng.getrandbits(64):x}"
    before, pause = (rng.uniform(0, lab.points[stage]["seconds"]) for _ in range(2))
    outcome = Outcome(f"{stage}: MLflow is away at {moment}")
    with proxy(_server(lab), rng, ("lost", "reset")) as faults:
        arguments = [*lab.run_of(lab.folder / "work", stage), "tracking.enabled=true", f"tracking.uri={faults.url}"]
        arguments += [f"tracking.experiment={experiment}"]
        faults.is_away = moment in ("start", "always")
        command = lab.start(*arguments, cluster=lab.cluster)
        if moment != "always":
            wait_until(lambda: command.is_over, before)
            faults.is_away = not faults.is_away
        if moment == "middle":
            wait_until(lambda: command.is_over, pause)
            faults.is_away = False
        faults.left = rng.choice((0, 2))
        codes = [command.wait()]
        faults.is_away, faults.left, back = False, 0, time.monotonic()
        again = lab.start(*arguments, cluster=lab.cluster)
        codes.append(again.wait())
        outcome.seconds = time.monotonic() - back
    texts = command.text + again.text
    outcome.is_rough, outcome.log = "Traceback" in texts, str(command.log)
    if "enat: " in texts:
        outcome.verdict = "detected"
    if codes != [0, 0]:
        outcome.verdict, outcome.note = "hung" if None in codes else "lost", f"exit codes {codes}"
    elif wrong := differences(store, lab.oracle, STAGES[: STAGES.index(stage) + 1]):
        outcome.verdict, outcome.note = "silent", "; ".join(wrong[:3])
    else:
        outcome.verdict, outcome.note = _recorded(_server(lab), experiment, stage, store) or (outcome.verdict, "")
    return [outcome]


def _server(lab: Laboratory) -> str:
    """One for the laboratory; runs reach it through a proxy."""
    if lab.tracking is None:
        folder = lab.folder / "mlflow"
        folder.mkdir(exist_ok=True)
        lab.tracking = lab.stack.enter_context(mlflow_server(folder))
    return lab.tracking


def _has_values(data: Any, metrics: Mapping[str, float]) -> bool:
    """As metrics, or as tags of a run with curves."""
    tags = ({name: data.tags.get(f"enat.value.{name}") for name in metrics}, {name: repr(value) for name, value in metrics.items()})
    return tags[0] == tags[1] or all(data.metrics.get(name) == value for name, value in metrics.items())


def _recorded(url: str, experiment: str, stage: str, store: Path) -> tuple[str, str] | None:
    """What is missing from MLflow, or there twice."""
    from mlflow import MlflowClient

    from pipelines.artifacts.open import open_store

    client, opened = MlflowClient(url), open_store(str(store))
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (key,) = opened.folder.folders(f"{stage}/")
    manifest = opened.read_manifest(stage, key)
    assert manifest is not None
    own = [run for run in runs if run.data.tags.get("enat.key") == key]
    starts = Counter(run.data.tags["enat.start"] for run in runs)
    made = [run for run in own if run.data.tags.get("enat.reused") == "false"]
    if max(starts.values()) > 1 or len(made) > 1:
        return "doubled", f"{len(made)} runs made {stage}; {max(starts.values())} of one start"
    if not any(_has_values(run.data, manifest.metrics) for run in own):
        return "lost", "no run has the metrics"
    if stage != "train":
        return None
    histories = [[point.step for point in client.get_metric_history(run.info.run_id, "loss")] for run in own]
    if any(len(steps) != len(set(steps)) for steps in histories):
        return "doubled", f"steps {histories}"
    complete = [steps for steps in histories if sorted(steps) == list(range(1, 13))]
    return None if len(complete) == 1 else ("doubled" if complete else "lost", f"steps {histories}")
