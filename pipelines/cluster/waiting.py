"""Waiting for results of Ray such that the thread of a stage can be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

_LOOK_SECONDS = 0.5  # an exception reaches a thread, which is not the main one, between two calls


def get(reference: Any) -> Any:
    """ray.get(reference)."""
    import ray

    if not _is_main():
        wait([reference])
    return ray.get(reference)


def wait(references: Sequence[Any]) -> list[Any]:
    """Some of the references that are done, at least one."""
    import ray

    timeout = None if _is_main() else _LOOK_SECONDS
    while not (done := ray.wait(list(references), timeout=timeout)[0]):
        pass
    return list(done)


def result_of(future: Future[Any]) -> Any:
    """future.result()."""
    while not _is_main():
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():
                raise
    return future.result()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
