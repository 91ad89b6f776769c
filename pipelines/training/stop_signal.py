"""Signals to save or stop training: from the driver, or from Ray when a node is about to be preempted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pipelines.workflow.progress import Reporter

CONTINUE, SAVE, STOP = 0, 1, 2


class StopSignal:
    """A signal that every rank polls once a step.

    A signal to one rank reaches all ranks with the next step, so all act in the same step. The exchange runs on CPUs in the
    background of the step.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._group: Any = dist.new_group(backend="gloo")
        self._is_alone = dist.get_world_size() == 1
        self._sent: tuple[Any, torch.Tensor] | None = None
        self._seen_preemption: Any = None

    def poll(self) -> int:
        """CONTINUE, SAVE or STOP, the same on every rank."""
        signal = CONTINUE
        if self._sent is not None:
            work, flag = self._sent
            if work is not None:
                work.wait()
            signal = int(flag)
        flag = torch.tensor(self._own())
        work = None if self._is_alone else dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = work, flag
        return signal

    def _own(self) -> int:
        # Ray Train's watcher sets this attribute. The public function is a collective, for which a step would wait.
        from ray.train.v2._internal.execution.context import get_train_context

        if self._reporter.is_stop_requested():
            return STOP
        info = get_train_context().preemption_context.preemption_info
        if info is not None and info != self._seen_preemption:
            self._seen_preemption = info
            return SAVE
        return CONTINUE
