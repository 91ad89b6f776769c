"""Ctrl-C and SIGTERM while stages run in threads of their own.

Python raises KeyboardInterrupt in the main thread only. There the driver passes it on to the threads of the stages, so that a stage
ends in the same way in any thread.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StageThread(threading.Thread):
    """Runs `work` and gives its result, or what it raised, to `end`."""

    def __init__(self, name: str, work: Callable[[], Any], end: Callable[[Any], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._end = work, end
        self._act: Callable[[], None] | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def run(self) -> None:
        outcome: Any = KeyboardInterrupt()
        try:
            try:
                outcome = self._work()
            except BaseException as error:  # noqa: BLE001 (raised again by the driver)
                outcome = error
            with self._lock:  # nothing is raised in this thread after it
                self._is_over = True
        except KeyboardInterrupt as interrupt:
            outcome = interrupt
        finally:
            self._end(outcome)

    def interrupt(self) -> None:
        """Do what the stage wants to be done, the first time, or raise KeyboardInterrupt in the thread.

        It is raised once the thread executes Python code, so a thread must not wait without end for anything else: see
        cluster.waiting.
        """
        with self._lock:
            act, self._act = self._act, None
            if act is not None:
                act()
            elif not self._is_over and self.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))

    @contextmanager
    def _acting(self, act: Callable[[], None]) -> Iterator[None]:
        self._act = act
        try:
            yield
        finally:
            self._act = None


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """At the first Ctrl-C or SIGTERM do this. Only the second raises KeyboardInterrupt."""
    thread = threading.current_thread()
    if isinstance(thread, StageThread):
        with thread._acting(act):
            yield
        return
    if thread is not threading.main_thread():
        yield
        return
    num_signals = 0

    def on_signal(*_: object) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            raise KeyboardInterrupt
        act()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
