"""A process that ends what outlives the command that started a local cluster: `python reaper.py PID`, with a pipe from the command.

The command may be killed, and cannot end anything then. Ray's daemons end with it. Their agents would wait a minute for Ray's
answer. In a few of a hundred runs a worker never ends: at its exit Ray destroys an event loop, whose last operation posts another
one to the same loop, which waits for a lock that the destruction holds (ray 2.60, Publisher::~Publisher).
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

import psutil

_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.5, 5.0  # until Ray has started, and after that
_LEFT_SECONDS = 3.0  # that processes have to end by themselves


def main(command: psutil.Process) -> None:
    """Looks now and then, whenever the command asks, and once more when it has ended, which closes the pipe."""
    raylets, started, has_ended = set[psutil.Process](), set[psutil.Process](), False
    while not has_ended:
        is_asked = False
        if select.select([sys.stdin], [], [], _LOOK_SECONDS if raylets else _FIRST_LOOK_SECONDS)[0]:
            is_asked = bool(os.read(sys.stdin.fileno(), 1))
            has_ended = not is_asked
        with contextlib.suppress(psutil.Error):
            raylets |= {child for child in command.children() if child.name() == "raylet"}
        for raylet in raylets:
            with contextlib.suppress(psutil.Error):
                started |= {*raylet.children(recursive=True)}
        started = {process for process in started if process.is_running()}
        if is_asked:
            os.write(sys.stdout.fileno(), b"\n")
    for process in psutil.wait_procs(started, timeout=_LEFT_SECONDS)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    with contextlib.suppress(psutil.NoSuchProcess):
        main(psutil.Process(int(sys.argv[1])))
