"""The Ray cluster that a command starts on its own machine: its start, the loss of its processes, and what outlives the command."""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pipelines.cluster import lean, supervisor

_log = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_LOOK_SECONDS = 2.0  # for the reaper, which takes milliseconds
_WATCH_SECONDS = 0.5
_NOTICE_SECONDS = 2.0  # between the first error and the end of the process that caused it
_VITAL = ("gcs_server", "raylet")  # the raylet ends with each of its agents


def start(options: Mapping[str, Any]) -> None:
    """Start Ray. If its processes do not answer in time, as on a busy machine, they are ended and started again.

    Raises RuntimeError if no attempt succeeds.
    """
    import ray

    _start_reaper()
    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            with lean.few_processes():
                ray.init(**options)
            break
        except ValueError:
            raise
        except Exception as error:
            _log.info("Ray did not start", exc_info=True)
            ray.shutdown()
            _kill_remains()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if attempt == _START_ATTEMPTS:
                raise RuntimeError(
                    f"Ray did not start in {attempt} attempts ({reason}). Run the same command when this machine is less busy"
                ) from error
            _log.warning("Ray did not start (%s); trying again", reason)
    atexit.register(_before_shutdown)
    if supervisor.is_supervised():
        _watch()


def _before_shutdown() -> None:
    """Ignore interrupts while Ray shuts down, which takes seconds: they would print its traceback. The reaper looks at what still
    runs, because afterwards nothing tells which workers were of this command."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    reaper = _start_reaper()
    assert reaper.stdin is not None and reaper.stdout is not None
    with suppress(OSError):
        os.write(reaper.stdin.fileno(), b"\n")
        select.select([reaper.stdout], [], [], _LOOK_SECONDS)


@cache
def _start_reaper() -> subprocess.Popen[bytes]:
    """One for this process."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("reaper.py")), str(os.getpid())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _kill_remains() -> None:
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.name() in _VITAL:
                child.kill()


def _watch() -> None:
    """End this process when a process of the cluster has ended. Its calls would fail one after the other, or wait for a minute."""
    from ray._private import worker

    node = worker._global_node
    logs = node.get_logs_dir_path()
    supervisor.tell(lost=f"Ray has lost one of its processes (its logs are in {logs})", restarts="yes")
    os.dup2(os.open(f"{logs}/driver.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)  # lines of Ray's C++
    is_leaving = threading.Event()
    atexit.register(is_leaving.set)  # before that of Ray, which ends the processes

    def watch() -> None:
        while not is_leaving.wait(_WATCH_SECONDS):
            for name in (name for name, _ in node.dead_processes() if name in _VITAL):
                supervisor.tell(lost=f"Ray's process {name} has ended (its log is {logs}/{name}.out)")
                os._exit(1)

    threading.Thread(target=watch, name="ray-watch", daemon=True).start()


def settle() -> None:
    """Wait until the loss of the cluster would have ended this process, before its consequences are reported as errors."""
    if supervisor.is_supervised() and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        time.sleep(_NOTICE_SECONDS)
