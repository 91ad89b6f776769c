"""Tasks of a stage. Ray runs them. In a run so small that it has not connected to Ray, they are calls in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.cluster import connection, waiting


@dataclass(frozen=True, eq=False)
class _Result:
    """Of a call in this process, in place of a reference to an object of Ray."""

    value: Any


def put(value: Any) -> Any:
    """What stands for a value among the arguments of tasks, which get the value itself. Ray sends it to each node once."""
    if not connection.is_connected():
        return _Result(value)
    import ray

    return ray.put(value)


def submit(task: Callable[..., Any], *arguments: Any, resources: Mapping[str, float], **keywords: Any) -> Any:
    """Start a task, and return a reference to its result. In this process, return when it has ended."""
    if not connection.is_connected():
        given = [each.value if isinstance(each, _Result) else each for each in arguments]
        with on_one_thread():
            return _Result(task(*given, **keywords))
    import ray

    return ray.remote(**resources)(task).remote(*arguments, **keywords)


def get(reference: Any) -> Any:
    """The result of a task, or the value that was put. Raises what the task raised."""
    return reference.value if isinstance(reference, _Result) else waiting.get(reference)


def wait(references: Sequence[Any]) -> list[Any]:
    """Some of the references whose tasks have ended, at least one."""
    return [each for each in references if isinstance(each, _Result)] or waiting.wait(references)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """As in a worker of Ray with one CPU: sums depend on the number of threads of a matrix product."""
    import torch
    from threadpoolctl import threadpool_limits

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(num_threads)
