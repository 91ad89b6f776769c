"""Tensors on a GPU that does not exist: shapes, types and devices, but no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OnGpuOnly(TorchDispatchMode):
    """Every operation has all of its tensors on the GPU. names: of the operations.   device: "meta" in place of the fake GPU, for
    backward passes, which ask for a real one.

    A number in a tensor without dimensions may be on the CPU: a kernel gets it as an argument.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.names = device, list[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        self.names.append(str(operation))
        for each in tree_leaves((args, kwargs, made)):
            if isinstance(each, torch.Tensor) and each.ndim:
                assert each.device.type == self.device, f"{operation} has a tensor {tuple(each.shape)} on the {each.device.type}"
        return made


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Tensors that are made inside are on the fake GPU. An operation whose result depends on values raises an error."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("cuda"):
        yield mode


def moved(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A network of the CPU, with fake weights on the fake GPU in place of its own."""
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(_fake(value, mode), requires_grad=value.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _fake(buffer, mode)
    return network


def _fake(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
