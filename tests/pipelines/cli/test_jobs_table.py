"""Tables about a cluster fit a terminal of 80 columns, and keep ids and names of stages in one piece."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipelines.cli import jobs as commands
from pipelines.cluster import capacity as cluster_capacity
from pipelines.cluster.capacity import Capacity, ResourceRequest, judge
from pipelines.cluster.resources import Workers
from pipelines.jobs.client import Job
from pipelines.jobs.progress import stages_in_progress

LOG = "▸ tokenizer\n  tokenizer 19 of 100,000 steps\n"
LONG = "enat-imagenet256-ablations-of-decoder-attention-and-reused-features-on-eight-nodes-46ece79afa63-2"


def _job(id: str, status: str, message: str = "", **metadata: str) -> Job:
    now = time.time()
    return Job(
        id=id,
        run="x",
        attempt=1,
        status=status,
        message=message,
        entrypoint="",
        started=now - 7200,
        ended=None if status == "RUNNING" else now - 7000,
        exit_code=None,
        metadata={"enat.user": "ada", "enat.config": "configs/digits.yaml", **metadata},
    )


def _shown(width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(commands, "table_console", lambda: console)
    reason = "dataset.path: /nowhere is not a directory. Fix the path, or download the files first."
    found = [_job("enat-digits-46ece79afa63", "RUNNING"), _job(LONG, "FAILED", f"Job failed\nenat: {reason}\n")]
    cluster: Any = SimpleNamespace(stages_in_progress=lambda job: stages_in_progress(LOG if job.is_active else ""))
    commands._show(found, cluster)
    return console.file.getvalue().splitlines()


def test_jobs_are_one_table_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    head, first, second = _shown(300, monkeypatch)
    assert head.split() == ["id", "status", "user", "config", "age", "ran", "stage", "why"]
    assert first.startswith("enat-digits-46ece79afa63 ") and "tokenizer 19 of 100,000 steps" in first
    assert second.startswith(f"{LONG}  failed") and second.rstrip().endswith("or download the files first.")


def test_jobs_fit_a_narrow_terminal_with_ids_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _shown(80, monkeypatch)
    assert [line for line in lines if not line.startswith(" ")] == ["enat-digits-46ece79afa63", LONG]
    assert all(len(line.rstrip()) <= 80 for line in lines if line != LONG)
    told = " ".join(" ".join(lines).split())
    assert "running, ada, digits.yaml, started 2 h ago, ran 2 h: tokenizer 19 of 100,000 steps" in told
    assert "failed, ada, digits.yaml, started 2 h ago, ran 3 min: dataset.path: /nowhere is not a" in told


def test_the_room_of_a_cluster_fits_with_names_in_one_piece() -> None:
    capacity = Capacity(tuple({"CPU": 96.0, "GPU": 8.0} for _ in range(8)))
    names = ("train@decoder_attention-full", "reference/inception_clean", "generate@untrained")
    workers = Workers(num_workers=128, cpus_per_worker=12, gpus_per_worker=1)
    verdicts = [judge(ResourceRequest(node=name, workers=workers), capacity) for name in names]
    for width in (80, 48):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        cluster_capacity.show(verdicts, capacity, console)
        lines = console.file.getvalue().splitlines()
        assert {*names} <= {line.split(" ")[0] for line in lines} and all(len(line.rstrip()) <= width for line in lines)
        if width == 80:
            assert all("128 x 12 CPU + 1 GPU" in line and "64 too little" in line for line in lines[1:4])
