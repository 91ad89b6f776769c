"""Training while nodes come and go: with as many workers as fit, and the same losses as without interruption."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from material.tiny_training import Material, changed, checkpoint_steps, worker_context
from pipelines.artifacts.manifest import DamagedFileError
from pipelines.training.checkpoints import find_checkpoints, open_checkpoint
from references.plain_training import train_plainly
from services.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
PATIENCE = 240


@contextmanager
def training(nodes: RayNodes, material: Material, key: str, folder: Path, **execution: Any) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).with_name("cluster_training.py")
    command = [sys.executable, str(script), nodes.address, material.store.uri, key, json.dumps(execution)]
    variables = {**nodes.environment, "ENAT_PROGRESS_SECONDS": "1"}
    with (folder / "log").open("wb") as log, subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def history(material: Material, key: str) -> list[dict[str, float]]:
    """Of the newest checkpoint: rows of one step each."""
    context = worker_context(material, key)
    for checkpoint in reversed([found for found in find_checkpoints(context) if found.is_whole]):
        try:
            rows: list[dict[str, float]] = open_checkpoint(material.store, context, checkpoint).state["history"]
        except DamagedFileError:
            continue  # removed since it was found
        return rows
    return []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
        time.sleep(0.2)


def numbers_of_workers(rows: list[dict[str, float]]) -> list[int]:
    """Without repetitions."""
    numbers = [int(row["num_workers"]) for row in rows]
    return [number for place, number in enumerate(numbers) if place == 0 or numbers[place - 1] != number]


def test_elastic_run_grows_with_a_node_that_comes_and_shrinks_with_one_that_is_lost(material, key, tmp_path):
    execution = {"num_workers": 2, "min_workers": 1, "resize_seconds": 1.0, "checkpoint_every": 4, "max_failures": 3}

    def has_seen(*numbers: int) -> Callable[[], bool]:
        return lambda: numbers_of_workers(history(material, key)) == [*numbers]

    with ray_nodes(1) as nodes, training(nodes, material, key, tmp_path, **execution) as process:
        wait_until(has_seen(1), process, tmp_path)
        other = nodes.add_node(1)
        wait_until(has_seen(1, 2), process, tmp_path)
        nodes.kill(other)
        wait_until(has_seen(1, 2, 1), process, tmp_path)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    rows = history(material, key)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and numbers_of_workers(rows) == [1, 2, 1]
    plain = train_plainly(material, changed(num_steps=len(rows)))
    np.testing.assert_allclose([row["loss"] for row in rows], plain.column("loss"), rtol=1e-5)


def test_training_saves_before_a_node_goes(material, key, tmp_path):
    """`ray drain-node` announces the node's end, as a cloud does that reclaims its machine. No checkpoint is due."""
    execution = {"num_workers": 2, "checkpoint_every": 100_000, "max_failures": 1}
    with ray_nodes(1) as nodes:
        nodes.add_node(1)
        with training(nodes, material, key, tmp_path, **execution) as process:
            wait_until(lambda: bool(re.search("train [1-9]", (tmp_path / "log").read_text())), process, tmp_path)
            nodes.drain(deadline_seconds=100)
            wait_until(lambda: bool(checkpoint_steps(material, key)), process, tmp_path)
            assert process.poll() is None, "training continues until the node is gone"
