"""Worker processes of this test session, found by the titles that Ray gives them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil


def titled_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Every descendant of this process with its title. Processes that end meanwhile are skipped."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone, or ended and not yet waited for
            yield process, " ".join(process.cmdline())


def kill_a_worker(task: str, is_over: Callable[[], bool]) -> str | None:
    """Kill the first worker whose title contains `task`, as soon as there is one.

    Returns its title, or None if is_over() held first.
    """
    while not is_over():
        for process, title in titled_processes():
            if title.startswith("ray::") and task in title:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return title
        time.sleep(0.002)
    return None
