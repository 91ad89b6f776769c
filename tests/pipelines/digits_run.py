"""A run of configs/digits.yaml by the command line, small enough for tests, and where it wrote."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "configs" / "digits.yaml"


@dataclass(frozen=True)
class CommandLineRun:
    """One run of `enat run`, what it said, and where it wrote."""

    overrides: tuple[str, ...]
    workspace: Path
    process: subprocess.CompletedProcess[str]
    seconds: float

    @property
    def store(self) -> Any:
        from pipelines.artifacts.local_store import LocalStore

        return LocalStore(self.workspace / "store")

    def planned(self) -> dict[str, Any]:
        """Nodes of the run by id, each with the manifest that the store has for it."""
        from pipelines.run import config as run_config
        from pipelines.run import graph
        from pipelines.workflow import driver

        run = run_config.load_run(DIGITS, (*self.overrides, f"workspace={self.workspace}"))
        return {planned.node.id: planned for planned in driver.plan(graph.build(run), self.store)}


TINY_DIGITS = (
    "tokenizer.recipe.num_steps=30",
    "token_map.shard_size=64",
    "reference.num_epochs=1",
    "train.num_steps=20",
    "train.execution={num_workers: 1, checkpoint_every: 5, log_every: 5, sample_every: 10}",
    "generate.num_samples=40",
    "generate.shard_size=20",
)
