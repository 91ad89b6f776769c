"""This session's worker processes by the titles that Ray gives them: never workers of others on this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil


def titled_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Every process below this one with its title; those that end while they are looked at are passed over."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone, or ended and not yet waited for
            yield process, " ".join(process.cmdline())


def kill_a_worker(task: str, is_over: Callable[[], bool]) -> str | None:
    """Kill one that Ray's title says runs `task` (a part of the title), as soon as there is one.

    Returns its title, or None where is_over() came first.
    """
    while not is_over():
        for process, title in titled_processes():
            if title.startswith("ray::") and task in title:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return title
        time.sleep(0.002)
    return None
