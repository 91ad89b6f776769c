"""How long four models take on a cluster with room for all, over the longest of them alone.

Twice: with stages whose workers wait, as the driver of a cluster with GPUs sees them, and with tiny models, which the cores of one
machine bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from common import in_process, run_script, show, where

_CHAINS = {"s": 3.0, "b": 4.0, "l": 5.0, "xl": 6.0}  # seconds of the workers of each stage
_STAGES = ("train", "generate", "evaluate")
_MODELS = {"s": 32, "b": 64, "l": 96, "xl": 128}  # channels
_ENAT = Path(sys.executable).with_name("enat")


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    seconds: float
    execution: Any = field(default=None)


def wait(folder: Path, chains: list[str], num_jobs: int | None) -> float:
    """Seconds that chains of three stages take, whose workers hold one CPU of Ray each and wait."""
    import ray
    from rich.console import Console

    from pipelines.artifacts.open import open_store
    from pipelines.cluster import connection, waiting
    from pipelines.cluster.resources import Workers
    from pipelines.tracking.run import RunHandle, TrackingConfig
    from pipelines.workflow import driver
    from pipelines.workflow.node_run import Session
    from pipelines.workflow.stage import Node, Stage, StageContext, StageResult

    connection.prepare_environment()
    connection.connect(connection.ClusterConfig(address=os.environ["RAY_ADDRESS"]))

    def run(config: _Waiting, inputs: Mapping[str, Any], context: StageContext) -> StageResult:
        context.connect_for(config.execution, "train")
        waiting.get(ray.remote(num_cpus=1)(lambda: time.sleep(config.seconds)).remote())
        return StageResult(files=[])

    nodes: list[Node] = []
    for chain in chains:
        for number, name in enumerate(_STAGES):
            config = _Waiting(seconds=_CHAINS[chain] + number / 1000, execution=Workers())
            reads = {"before": nodes[-1].id} if number else {}
            nodes.append(Node(f"{name}@{chain}", Stage(name, 1, run), config, reads))
    session = Session(
        store=open_store(str(folder)),
        run=RunHandle("", None),
        tracking=TrackingConfig(enabled=False),
        console=Console(stderr=True),
        connect=lambda: None,
    )
    ray.get(ray.remote(num_cpus=1)(lambda: None).remote())  # a worker process exists
    started = time.monotonic()
    driver.execute(nodes, session, num_jobs=num_jobs)
    return time.monotonic() - started


def _train(config: Path, workspace: Path, models: list[str], *options: str) -> float:
    """Seconds that `enat run` reports for some of the models."""
    dropped = [f"variants.{name}=null" for name in _MODELS if name not in models]
    values = [*dropped, f"workspace={workspace}", *options]
    done = subprocess.run([str(_ENAT), "run", str(config), *values, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["seconds"])


def _config(folder: Path) -> Path:
    values = {
        "name": "sizes",
        "dataset": {"kind": "digits"},
        "tokenizer": {"preset": "vqgan-small", "recipe": {"num_steps": 50, "batch_size": 64}},
        "reference": {"extractor": "classifier", "num_epochs": 2},
        "train": {
            "model": {"encoder_layers": 4, "decoder_layers": 1, "embed_dim": 32, "num_heads": 4},
            "num_steps": 200,
            "batch_size": 128,
            "num_groups": 2,
        },
        "generate": {"num_samples": 256, "sampler": {"num_steps": 8}},
        "targets": ["evaluate"],
        "tracking": {"enabled": False},
        "variants": {name: {"train": {"model": {"embed_dim": width}}} for name, width in _MODELS.items() if name != "s"},
    }
    path = folder / "sizes.yaml"
    path.write_text(json.dumps(values))
    return path


@click.command()
@click.option("--models/--no-models", "is_trained", default=True, help="Also train four tiny models, which takes minutes.")
@click.option("--json", "as_json", is_flag=True)
def main(is_trained: bool, as_json: bool) -> None:
    """Print ratios: four chains over the longest, and over one by one."""
    from services.ray_nodes import ray_nodes

    with ray_nodes(1) as nodes, tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            nodes.add_node(1)
        os.environ.update({**nodes.environment, "RAY_ADDRESS": nodes.address})
        place, file = Path(folder), __file__
        longest = in_process(file, "wait", place / "longest", ["xl"], None)
        together = in_process(file, "wait", place / "together", list(_CHAINS), None)
        in_turn = in_process(file, "wait", place / "in-turn", list(_CHAINS), 1)
        figures: dict[str, Any] = {
            **where(),
            "cluster": "4 nodes of Ray with 1 CPU each on this machine",
            "waiting_longest_seconds": longest,
            "waiting_four_over_longest": together / longest,
            "waiting_one_by_one_over_side_by_side": in_turn / together,
        }
        if is_trained:
            config = _config(place)
            for name in ("longest", "together"):
                _train(config, place / name, [], "targets=[token_map,reference]")
            longest = _train(config, place / "longest", [], "train.model.embed_dim=128")
            together = _train(config, place / "together", list(_MODELS))
            figures |= {"models_longest_seconds": longest, "models_four_over_longest": together / longest}
    show("Stages side by side", figures, as_json)


if __name__ == "__main__":
    run_script({"wait": wait}, main)
