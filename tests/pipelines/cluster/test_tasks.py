"""Tasks of a run that has not connected to Ray. How Ray runs tasks is tested with the stages that have them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from pipelines.cluster import connection, tasks


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "is_connected", lambda: False)


def _describe(values: np.ndarray, factor: int, *, plus: int) -> tuple[int, int, list[int]]:
    return os.getpid(), torch.get_num_threads(), (factor * values + plus).tolist()


def test_a_task_is_a_call_in_this_process_on_one_thread() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stored = tasks.put(np.arange(3))
        references = [tasks.submit(_describe, stored, factor, resources={"num_cpus": 2}, plus=1) for factor in (2, 3)]
        assert tasks.wait(references) == references
        assert [tasks.get(each) for each in references] == [(os.getpid(), 1, [1, 3, 5]), (os.getpid(), 1, [1, 4, 7])]
        assert tasks.get(stored).tolist() == [0, 1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def test_what_a_task_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        tasks.submit(int, "text", resources={})
