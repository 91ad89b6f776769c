"""Progress of work that runs on other processes, shown on the driver.

Workers report to a small Ray actor. A thread of the driver reads it and moves one bar. Reports never block, and never fail the
work that they report on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipelines.formatting import one_line

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.3
LINE_SECONDS = "ENAT_PROGRESS_SECONDS"
_HEAD = "node:__internal_head__"  # a resource that the head node alone has


class _State:
    """The latest count of each worker, and whether workers are asked to stop. The sum of the counts is the progress."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._note = ""
        self._messages: list[tuple[str, bool]] = []
        self._losses: list[str] = []
        self._num_losses = 0
        self._is_stop_requested = False

    def report(self, worker: str, done: int, note: str) -> None:
        self._done[worker] = done
        self._note = note or self._note

    def tell(self, message: str, is_shown: bool) -> None:
        self._messages.append((message, is_shown))

    def read(self) -> tuple[int, str, list[tuple[str, bool]]]:
        messages, self._messages = self._messages, []
        return sum(self._done.values()), self._note, messages

    def lose(self, what: str) -> None:
        self._losses.append(what)
        self._num_losses += 1
        self.tell(what, True)

    def take_losses(self) -> tuple[int, list[str]]:
        losses, self._losses = self._losses, []
        return self._num_losses, losses

    def request_stop(self) -> None:
        self._is_stop_requested = True

    def is_stop_requested(self) -> bool:
        return self._is_stop_requested


class Reporter:
    """Reports from a worker. done: how much this worker has finished in total (not since the last report)."""

    def __init__(self, state: Any, worker: str = "") -> None:
        self._state, self._worker = state, worker
        self._answer: Any = None
        self._is_stop_requested = False

    def named(self, worker: str) -> Reporter:
        return Reporter(self._state, worker)

    def report(self, done: int, note: str = "") -> None:
        self._state.report.remote(self._worker, done, note)

    def tell(self, message: str) -> None:
        """Print a line on the terminal, and write it to the log of the run."""
        self._state.tell.remote(message, True)

    def log(self, message: str) -> None:
        """Write a line to the log of the run."""
        self._state.tell.remote(message, False)

    def lose(self, what: str) -> None:
        """Tell that a worker was lost. what: a sentence."""
        self._state.lose.remote(what)

    def take_losses(self) -> tuple[int, list[str]]:
        """How many losses were told so far, and those since the last call. Waits for the driver's answer."""
        import ray

        try:
            return ray.get(self._state.take_losses.remote())
        except ray.exceptions.RayError:
            return 0, []  # the actor is lost, and the work continues without it

    def request_stop(self) -> None:
        """Ask all workers to save what they have and stop."""
        self._state.request_stop.remote()

    def is_stop_requested(self) -> bool:
        """The most recent answer of the driver. The caller never waits."""
        import ray

        if self._answer is None:
            self._answer = self._state.is_stop_requested.remote()
        if ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = self._answer, self._state.is_stop_requested.remote()
            try:
                self._is_stop_requested = ray.get(answer)
            except ray.exceptions.RayError:
                return self._is_stop_requested  # the driver has ended; Ray ends this worker, too
        return self._is_stop_requested


class _SpeedColumn(ProgressColumn):
    """Speed over the last seconds, as for the remaining time."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {task.fields['unit']}/s" if task.speed else "", style="dim")


class _Display:
    """The bars of one terminal, one below the other: of all stages that run side by side."""

    def __init__(self, console: Console) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _SpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def open(self, title: str, total: int, unit: str) -> TaskID:
        with self._lock:
            self._num_open += 1
            if self._num_open == 1:
                self.progress.start()
            return self.progress.add_task(title, total=total, unit=unit, note="")

    def close(self, task: TaskID) -> None:
        with self._lock:
            self._num_open -= 1
            if not self._num_open:
                self.progress.stop()
            self.progress.remove_task(task)


_display_of = cache(_Display)
_opening = threading.Lock()


def show_start(console: Console, title: str) -> None:
    """Print a line in the log of a job, from which `enat jobs ls` reads what is in progress."""
    if not console.is_terminal and LINE_SECONDS in os.environ:
        console.print(f"▸ {title}", highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar on the driver's terminal. If the output is not a terminal: nothing, or a line every ENAT_PROGRESS_SECONDS."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        with _opening:
            self._display = _display_of(console)
        self._done = 0
        self._line_seconds = 0.0 if console.is_terminal else float(os.environ.get(LINE_SECONDS, "0"))
        self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        self._task = self._display.open(self._title, self._total, self._unit)
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close(self._task)

    def update(self, done: int, note: str = "") -> None:
        self._done = done
        self._display.progress.update(self._task, completed=done, note=note)
        self._show_line(note)

    def advance(self, amount: int) -> None:
        self.update(self._done + amount)

    def _show_line(self, note: str) -> None:
        """Print a line in a log, which has no bar."""
        if not self._line_seconds or time.monotonic() - self._last_line < self._line_seconds:
            return
        self._last_line = time.monotonic()
        line = f"  {self._title} {self._done:,} of {self._total:,} {self._unit}  {note}".rstrip()
        self._console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def reporter(self) -> Iterator[Reporter]:
        """A Reporter to send to workers; the bar follows it until the block ends. Its actor runs on the head node, because losing
        any other node would lose the bar and requests to stop."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
        where = NodeAffinitySchedulingStrategy(heads[0], soft=False) if heads else "DEFAULT"  # soft is not heeded without CPUs
        state = ray.remote(num_cpus=0, scheduling_strategy=where)(_State).remote()
        stop = threading.Event()

        def follow() -> None:
            is_over = False
            while not is_over:
                is_over = stop.wait(_POLL_SECONDS)
                try:
                    done, note, messages = ray.get(state.read.remote())
                except ray.exceptions.RayError:
                    return  # the bar is optional: if its actor is lost, the work continues without it
                self.update(done, note)
                for message, is_shown in messages:
                    _log.info("%s: %s", self._title, message)
                    if is_shown:
                        self._console.print(f"[yellow]![/] {one_line(message)}", highlight=False)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield Reporter(state)
        finally:
            stop.set()
            thread.join()
            ray.kill(state)
