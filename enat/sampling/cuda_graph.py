"""The loop of the sampler as one CUDA graph: a call launches once, which small models are bound by otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from enat.model import ENAT, TextCondition
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import decode_steps

_WARM_UPS = 3  # calls before the capture, in which libraries choose and allocate, as torch's documentation recommends

Replay = Callable[[], Sequence[Tensor]]


class GraphedLoop:
    """A replacement of enat.sampling.sampler.decode_steps for one model and its guide, whose weights must stay where they are.

    The first call with inputs of new shapes is recorded; later ones copy their inputs and replay it. Graphs keep their memory.
    `capture`: runs a function of no arguments and returns what replays it; the default is a CUDA graph.
    """

    def __init__(self, capture: Callable[[Callable[[], Sequence[Tensor]]], Replay] | None = None) -> None:
        self._capture = capture or capture_cuda_graph
        self._recorded: dict[Any, tuple[list[Tensor], Replay]] = {}

    def __call__(
        self,
        model: ENAT,
        conditions: Tensor | TextCondition,
        tokens: Tensor,
        uniforms: Tensor,
        config: SamplerConfig,
        *,
        num_given: int = 0,
        halton_rank: Tensor | None = None,
        guide: ENAT | None = None,
    ) -> list[Tensor]:
        of_text = isinstance(conditions, TextCondition)
        own = [conditions.hidden, conditions.pooled] if isinstance(conditions, TextCondition) else [conditions]
        inputs = [tokens, uniforms, *own, *([] if halton_rank is None else [halton_rank])]
        device = tokens.device.type
        is_bf16 = torch.is_autocast_enabled(device)
        key = config, num_given, is_bf16, guide is None, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._recorded:
            kept = [tensor.clone() for tensor in inputs]
            condition = TextCondition(kept[2], kept[3]) if of_text else kept[2]
            rank = None if halton_rank is None else kept[-1]

            def loop() -> list[Tensor]:
                # Without autocast's cache of weights, which ends with its context, while the graph would still read it.
                with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=is_bf16, cache_enabled=False):
                    settings: dict[str, Any] = {"num_given": num_given, "halton_rank": rank, "guide": guide}
                    return decode_steps(model, condition, kept[0], kept[1], config, **settings)

            self._recorded[key] = kept, self._capture(loop)
        kept, replay = self._recorded[key]
        for place, tensor in zip(kept, inputs, strict=True):
            place.copy_(tensor)
        return [state.clone() for state in replay()]  # the next replay overwrites them


def capture_cuda_graph(function: Callable[[], Sequence[Tensor]]) -> Replay:
    """Record a function that works on tensors that stay. What it returns is overwritten by each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return made

    return replay
