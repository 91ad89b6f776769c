"""Which process of which machine this is, so that others can tell whether it still runs."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from functools import cache
from pathlib import Path

import psutil

_CLOCK_SECONDS = 10


@cache
def this_host() -> str:
    """Machines may share a name, and containers of a machine have processes of their own."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {uuid.getnode():012x} {namespace.readlink() if namespace.is_symlink() else ''}"


def this_process() -> str:
    return f"{os.getpid()} {psutil.Process().create_time():.0f}"


def is_alive(process: str) -> bool:
    """A later process with the same id was created at another time, which the system's clock tells within seconds.

    A text that somebody has changed names no process, so nothing is known to have ended.
    """
    try:
        pid, created = map(int, process.split())
    except ValueError:
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid)
        return abs(found.create_time() - created) < _CLOCK_SECONDS and found.status() != psutil.STATUS_ZOMBIE
    return False
