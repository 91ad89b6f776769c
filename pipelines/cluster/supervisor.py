"""A command in a child process. Its parent says so when the child has lost its Ray cluster, and begins again once.

Ray ends a process that has lost its cluster by _exit(), which Python does not notice.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
from contextlib import suppress

import click

_PR_SET_PDEATHSIG = 1
_to_parent: list[int] = []  # in the child: the pipe
_status: list[int] = []  # of the command, when it is over


def supervise() -> None:
    """Return in a child process. The parent passes signals on to it, and exits as it does."""
    has_restarted = False
    while True:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _become_child(writing)
            return
        os.close(writing)
        status, told = _wait_for(child, reading)
        if "ended" in told or "lost" not in told:
            sys.exit(status)
        restarts = "restarts" in told and not has_restarted
        remedy = "starting Ray again" if restarts else "run the same command again to continue from what is committed"
        click.echo(f"enat: {told['lost']}; {remedy}", err=True)
        if not restarts:
            sys.exit(1)
        has_restarted = True


def end(status: int) -> None:
    """The command is over, and this process exits with this status. From now on it ignores interrupts: its exit may take seconds,
    and Python and Ray would print their tracebacks."""
    if not is_supervised():
        atexit.register(gc.freeze)  # else Python looks for garbage once more, a second after imports of torch and MLflow
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tell(ended="yes")
    _status.append(status)


def tell(**words: str) -> None:
    """Tell the parent, if there is one. lost: what it says if this process does not end by itself.   restarts: a new process would
    have a new cluster.   ended: this process ends by itself."""
    for pipe in _to_parent:
        os.write(pipe, "".join(f"{name}={value}\n" for name, value in words.items()).encode())


def is_supervised() -> bool:
    return bool(_to_parent)


def _become_child(writing: int) -> None:
    _to_parent.append(writing)
    atexit.register(_leave)  # first, so that it is called last
    os.setpgid(0, 0)  # Ctrl-C reaches the parent only, which passes it on
    with suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Python's messages keep their way when what C++ prints is redirected.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def _leave() -> None:
    """Exit without freeing what is in memory, which takes Python more than a second after imports of torch and MLflow."""
    if _status:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(_status[0])


def _wait_for(child: int, reading: int) -> tuple[int, dict[str, str]]:
    """The exit code of the child, and what it has told. If a signal ended it, this process ends in the same way."""

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os.set_blocking(reading, False)  # a process that the child forked may still have the other end
    with suppress(BlockingIOError), os.fdopen(reading, "rb", buffering=0) as pipe:
        lines = (pipe.read(1 << 16) or b"").decode().splitlines()
    return status, dict(line.split("=", 1) for line in lines)
