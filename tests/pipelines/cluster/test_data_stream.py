"""Jobs over planned rows: every row's record once, as soon as it is done, even if workers are lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.cluster.data_stream import map_by_workers, stream_records
from pipelines.cluster.resources import Execution

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = [{"part": part} for part in range(5)]


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Makes a record of a part, or fails on purpose. Records every part that it is given."""

    def __init__(self, folder: Path, faults: Mapping[str, int]) -> None:
        """faults: deadly_part, which kills so many lives; broken_part."""
        self.folder, self.faults = folder, faults
        (folder / f"process-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        part = int(batch["part"][0])
        (self.folder / f"{part}-{time.monotonic_ns()}").touch()
        if part == self.faults.get("broken_part"):
            raise LookupError(f"part {part} is broken")
        if part == self.faults.get("deadly_part") and _times_given(self.folder, part) <= self.faults["lives"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"record": [{"part": part, "square": part * part}]}


def _records(folder: Path, execution: Execution, *, is_alone: bool = False, **faults: int) -> list[dict[str, Any]]:
    def job(rows: list[dict[str, Any]]) -> ray.data.Dataset:
        planned = ray.data.from_items(rows, override_num_blocks=len(rows))
        return map_by_workers(planned, Worker, (folder, faults), execution, len(rows), is_alone=is_alone)

    return list(stream_records(ROWS, job))


def _times_given(folder: Path, part: int) -> int:
    return len(list(folder.glob(f"{part}-*")))


@pytest.mark.parametrize(
    ("num_workers", "is_alone"),
    [
        pytest.param(1, False, marks=pytest.mark.faults),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_every_row_is_processed_once(tmp_path: Path, num_workers: int, is_alone: bool) -> None:
    records = _records(tmp_path, Execution(num_workers=num_workers), is_alone=is_alone)
    assert sorted(records, key=lambda record: record["part"]) == [{"part": part, "square": part**2} for part in range(5)]
    assert [_times_given(tmp_path, part) for part in range(5)] == [1] * 5
    assert len([*tmp_path.glob("process-*")]) <= 2, "a worker is made once in each process"


@pytest.mark.slow
def test_processes_of_tasks_are_used_again(tmp_path: Path) -> None:
    """Those of actors are not."""
    for job in ("first", "second"):
        (tmp_path / job).mkdir()
        _records(tmp_path / job, Execution(), is_alone=True)
    first, second = ({path.name.split("-")[1] for path in (tmp_path / job).glob("process-*")} for job in ("first", "second"))
    assert first == second


@pytest.mark.faults
@pytest.mark.parametrize(("is_alone", "error"), [(False, "ActorDiedError"), (True, "WorkerCrashedError")])
def test_the_rows_of_a_killed_worker_are_processed_by_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_alone: bool, error: str
) -> None:
    records = _records(tmp_path, Execution(), is_alone=is_alone, deadly_part=2, lives=1)
    assert sorted(record["part"] for record in records) == list(range(5)), "no record twice, none missing"
    assert _times_given(tmp_path, 2) == 2
    assert _times_given(tmp_path, 0) == 1, "what was done before stays done"
    assert f"workers were lost ({error})" in caplog.text


@pytest.mark.slow
def test_an_error_in_the_stage_ends_the_job_at_once_and_frees_its_workers(tmp_path: Path) -> None:
    """Also while the error is kept, as it is until other branches have finished."""
    with pytest.raises(Exception, match="part 1 is broken") as kept:
        _records(tmp_path, Execution(num_workers=2), broken_part=1)
    assert _times_given(tmp_path, 1) == 1, "it would break again"
    (tmp_path / "again").mkdir()
    assert len(_records(tmp_path / "again", Execution(num_workers=2))) == 5 and kept.value is not None


@pytest.mark.slow
def test_a_pool_is_not_larger_than_its_work(tmp_path: Path) -> None:
    assert len(_records(tmp_path, Execution(num_workers=8, cpus_per_worker=0.25))) == 5
    assert len([*tmp_path.glob("process-*")]) <= 5
