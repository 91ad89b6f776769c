"""A process that ends what outlives the command that started a local cluster: `python reaper.py PID`, with a pipe from the command.

The command may be killed, and cannot end anything then. Ray's daemons end with it. Their agents would wait a minute for Ray's
answer. In a few of a hundred runs a worker never ends: at its exit Ray destroys an event loop, whose last operation posts another
one to the same loop, which waits for a lock that the destruction holds (ray 2.60, Publisher::~Publisher).
"""

from __future__ import annotations

import contextlib
import select
import sys

import psutil

_LOOK_SECONDS = 5.0
_LEFT_SECONDS = 3.0  # that processes have to end by themselves


def main(command: psutil.Process) -> None:
    started: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:  # readable when the command has ended, which closes the pipe
        with contextlib.suppress(psutil.Error):
            raylets = [child for child in command.children() if child.name() == "raylet"]
            started = {child for raylet in raylets for child in raylet.children(recursive=True)}
    for process in psutil.wait_procs(started, timeout=_LEFT_SECONDS)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    with contextlib.suppress(psutil.NoSuchProcess):
        main(psutil.Process(int(sys.argv[1])))
