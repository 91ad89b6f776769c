"""How training learns that it is to save or to stop: from the driver, or from Ray when a node is about to go."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pipelines.workflow.progress import Reporter

GO_ON, SAVE, STOP = 0, 1, 2


class StopSignal:
    """Asked once a step by every rank. What one rank knows reaches all of them with the next step, so that they act in the same
    one; the exchange is between CPUs and runs beside the step."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._group: Any = dist.new_group(backend="gloo")
        self._is_alone = dist.get_world_size() == 1
        self._sent: tuple[Any, torch.Tensor] | None = None
        self._seen_preemption: Any = None

    def poll(self) -> int:
        """GO_ON, SAVE or STOP, the same on every rank."""
        raised = GO_ON
        if self._sent is not None:
            work, flag = self._sent
            if work is not None:
                work.wait()
            raised = int(flag)
        flag = torch.tensor(self._own())
        work = None if self._is_alone else dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = work, flag
        return raised

    def _own(self) -> int:
        # Read where Ray Train's watcher puts it: the public function is a collective of its own, which no step should wait for.
        from ray.train.v2._internal.execution.context import get_train_context

        if self._reporter.is_stop_requested():
            return STOP
        info = get_train_context().preemption_context.preemption_info
        if info is not None and info != self._seen_preemption:
            self._seen_preemption = info
            return SAVE
        return GO_ON
