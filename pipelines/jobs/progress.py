"""The stages that a job computes now, and how far they are, read from its log."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STARTED = re.compile(r"▸ ([\w@/.-]{1,200})")
_ENDED = re.compile(r"[✓✗] ([\w@/.-]{1,200}) ")
_PROGRESS = re.compile(r"  ([\w@/.-]{1,200}) ([\d,]{1,20}) of ([\d,]{1,20}) (\w{1,40})\b")


@dataclass(frozen=True)
class StageProgress:
    """done, total: None if the stage has not told yet, or never does. unit: such as "steps"."""

    stage: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None

    def describe(self) -> str:
        """Such as "train 120 of 1,000 steps"."""
        return self.stage if self.done is None else f"{self.stage} {self.done:,} of {self.total:,} {self.unit}"


def stages_in_progress(log: str) -> list[StageProgress]:
    """In the order in which they started. log: what the driver printed, with a line for each stage that starts or ends."""
    running: dict[str, StageProgress] = {}
    for line in log.splitlines():
        if match := _STARTED.match(line):
            running[match[1]] = StageProgress(match[1])
        elif match := _ENDED.match(line):
            running.pop(match[1], None)
        elif (match := _PROGRESS.match(line)) and match[1] in running:
            done, total = (int(number.replace(",", "") or 0) for number in (match[2], match[3]))
            running[match[1]] = StageProgress(match[1], done, total, match[4])
    return [*running.values()]
