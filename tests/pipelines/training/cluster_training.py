"""A training run of the tiny model on a cluster, in a process of its own, slow enough to watch what nodes do to it.

    python cluster_training.py ADDRESS STORE KEY '{"num_workers": 2, ...}'

SIGTERM ends it with a checkpoint, as it ends the command.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]

SECONDS = 0.25  # that a step takes longer
NUM_STEPS = 100_000  # more than any test waits for


def slowly(task: Mapping[str, Any]) -> Any:
    """The training loop of a worker, which has a step take its time."""
    from pipelines.training import loop

    class Slow(loop.Trainer):
        def train_step(self) -> None:
            time.sleep(SECONDS)
            super().train_step()

    loop.Trainer = Slow  # type: ignore[misc]
    return loop.train_loop(task)


def main(address: str, store_folder: str, key: str, execution: str) -> None:
    from pipelines.cluster import connection

    connection.prepare_environment()
    from rich.console import Console

    from material.tiny_training import CONFIG
    from pipelines.artifacts.open import open_store
    from pipelines.stages import train
    from pipelines.tracking.run import RunHandle
    from pipelines.workflow.stage import StageContext

    store = open_store(store_folder)
    inputs = {stage: store.read_manifest(stage, stage * 4) for stage in ("tokenizer", "token_map")}
    train.train_loop = slowly  # type: ignore[attr-defined]
    context = StageContext(
        stage="train",
        key=key,
        store=store,
        run=RunHandle("", None),
        console=Console(stderr=True),
        connect=lambda: connection.connect(connection.ClusterConfig(address=address)),
    )
    given = dataclasses.replace(CONFIG.execution, **json.loads(execution))
    train.run(dataclasses.replace(CONFIG, num_steps=NUM_STEPS, execution=given), inputs, context)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
