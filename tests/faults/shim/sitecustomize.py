"""Faults at the commit points of a process: Python imports this module at its start if this folder is on PYTHONPATH.

A commit point is a call that makes or removes a name in the file system, or puts a file on the disk. The file that ENAT_FAULT names
asks for what happens there, as JSON: {"call": "link", "target": "train/manifest.json", "when": "before", "skip": 0, "act": "KILL"}.
`act`: a signal that this process sends itself, or an error of the disk that the call raises. It happens once; afterwards
<file>.struck holds the process id. With {"record": true} every point is appended to <file>.seen, as [process, call, target].
"""

# Every process of Python begins with this file, which therefore imports little.
# ruff: noqa: PTH110, PTH115, PTH123

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

_CALLS = ("link", "replace", "rename", "unlink", "fsync")
_RANDOM = re.compile(r"[0-9a-f]{64}/|(?<=-)[0-9a-f]{12}(?=[-/])|(?<=\.)[0-9a-f]{12}(?=\.)|(?<=[.-]tmp-)\w+")


def point_of(path: Any) -> str | None:
    """The name of a target, the same in every run: below the folder of a store or a cache, without keys and random parts."""
    if isinstance(path, int):  # of an open file
        path = os.readlink(f"/proc/self/fd/{path}")
    parts = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    for folder in ("/store/", "/cache/"):
        if folder in parts:
            return _RANDOM.sub("", parts.rpartition(folder)[2]).replace("//", "/")
    return None


def install() -> None:
    if place := os.environ.get("ENAT_FAULT"):
        for name in _CALLS:
            setattr(os, name, _wrapped(getattr(os, name), name, place))


def _wrapped(call: Callable[..., Any], name: str, place: str) -> Callable[..., Any]:
    def act(*arguments: Any, **options: Any) -> Any:
        target = point_of(arguments[-1]) if arguments else None
        fault = _due(place, name, target) if target is not None and os.path.exists(place) else None
        if fault and fault["when"] == "before":
            _strike(place, fault["act"])
        result = call(*arguments, **options)
        if fault and fault["when"] == "after":
            _strike(place, fault["act"])
        return result

    return act


def _due(place: str, call: str, target: str | None) -> dict[str, Any] | None:
    """The fault if this is its point. It is taken out of the file, so that no other process has it."""
    with open(place, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fault: dict[str, Any] = json.loads(file.read() or "{}")
        if fault.get("record"):
            with open(f"{place}.seen", "a") as seen:
                seen.write(json.dumps(["worker" if "default_worker" in sys.argv[0] else "driver", call, target]) + "\n")
        if (fault.get("call"), fault.get("target")) != (call, target):
            return None
        fault["skip"] -= 1
        file.seek(0)
        file.truncate()
        file.write("" if fault["skip"] < 0 else json.dumps(fault))
        return fault if fault["skip"] < 0 else None


def _strike(place: str, act: str) -> None:
    with open(f"{place}.struck", "w") as file:
        file.write(str(os.getpid()))
    if not act.startswith("E"):
        os.kill(os.getpid(), getattr(signal, f"SIG{act}"))
        return
    raise OSError(getattr(errno, act), os.strerror(getattr(errno, act)))


install()
