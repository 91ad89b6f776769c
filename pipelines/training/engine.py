"""A model under DeepSpeed: ZeRO 0 to 3, any precision, and state that an engine of any other world size and stage can load.

The state is not written by DeepSpeed, whose checkpoints require unpickling, but as fragments of named parameters (checkpoints.py).
Each rank writes the fragments of weights and moments that it holds; each rank of a later run reads the fragments that it needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from enat.model import ENAT, ENATOutput
from pipelines.training.checkpoints import Fragments, fragment_name, own_share, owners
from pipelines.training.config import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_LOSS_SCALE = 2.0**16
_STEPS_TO_DOUBLE = 2000  # without an overflow, as torch.amp.GradScaler does
_STATE_SHARE = 0.4  # of a device's memory, beside activations
_MAX_OVERFLOWS = 20  # in a row, after which the loss scale is a millionth of what it was


class Engine:
    """A model that all ranks of the process group train together.

    All ranks must call backward equally often, once per pass. The last of passes_per_step calls updates the weights by the mean
    gradient over passes and ranks. Weights are float32 in every precision; precision applies to matrix products.
    """

    def __init__(self, model: ENAT, config: TrainConfig, device: torch.device, passes_per_step: int) -> None:
        self.config, self.rank, self.world_size = config, dist.get_rank(), dist.get_world_size()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.zero_stage = effective_zero_stage(config, self.world_size, num_parameters, _least_memory(device))
        model.to(device).train()
        model.activation_checkpointing = config.execution.activation_checkpointing
        prepare_forward(model, config, device)
        optimizer = torch.optim.AdamW(_weight_decay_groups(model, config), lr=config.learning_rate, betas=config.betas, fused=True)
        self.deepspeed = _initialize(model, optimizer, config, self.zero_stage, passes_per_step)
        self.model = model
        self.loss_scale = _FIRST_LOSS_SCALE
        self.num_updates = 0
        self._updates_since_overflow = self._overflows_in_a_row = 0
        self._is_stuck = False
        self.measures_norm = True  # of the ZeRO stages, only 0 can leave out measuring the gradient's norm
        self._norm: Any = None
        self._passes_left = self._passes_per_step = passes_per_step

    def __call__(self, tokens: Tensor, condition: Any, previous: ENATOutput | None, **options: Any) -> Any:
        """ENAT.forward under DeepSpeed.

        ZeRO-3 releases a module's weights in the backward hook of its input. Without a gradient for the previous features it would
        never release the weights that project them, and ranks with and without reuse would gather different weights.
        """
        if self.zero_stage == 3 and previous is not None:
            previous.features.requires_grad_()
        return self.deepspeed(tokens, condition, previous, **options)

    def backward(self, loss: Tensor, learning_rate: float) -> None:
        """Compute gradients of a scalar loss. The last pass of a step also updates the weights."""
        if self.config.precision == "fp16":
            self.deepspeed.optimizer.override_loss_scale(self.loss_scale)
        self.deepspeed.backward(loss)
        self._passes_left -= 1
        if self._passes_left == 0:
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = learning_rate
            if self.zero_stage == 0:
                self._norm = self._clip() if self.measures_norm or self.config.max_grad_norm is not None else None
        self.deepspeed.step()
        if self._passes_left == 0:
            self._passes_left = self._passes_per_step
            self._count_update()

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping: inf if it overflowed, None if not measured. Waits for the device."""
        if self.zero_stage == 0 and self._norm is None:
            return None
        norm = float(self._norm if self.zero_stage == 0 else self.deepspeed.get_global_grad_norm())
        return norm if norm >= 0 else float("inf")  # DeepSpeed returns -1 if it is not finite

    def is_overflow_of_scale(self) -> bool:
        """Whether the last step was skipped because of an overflow that a lower loss scale may still resolve."""
        return self.config.precision == "fp16" and bool(self.deepspeed.optimizer.overflow) and not self._is_stuck

    @contextlib.contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """A context in which every rank has the full values of parameters that ZeRO-3 partitions. All ranks must enter it."""
        context: AbstractContextManager[Any] = contextlib.nullcontext()
        if self.zero_stage == 3:
            import deepspeed

            context = deepspeed.zero.GatheredParameters(list(parameters), enabled=True)
        with context:
            yield

    def pieces(self) -> list[tuple[list[str], list[nn.Parameter]]]:
        """The model's parameters by block, small enough to be gathered one block at a time."""
        pieces: dict[str, tuple[list[str], list[nn.Parameter]]] = {}
        for name, parameter in self.model.named_parameters():
            names, parameters = pieces.setdefault(".".join(name.split(".")[:2]), ([], []))
            names.append(name)
            parameters.append(parameter)
        return list(pieces.values())

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict on the CPU. All ranks must call it; only rank 0 gets the parameters."""
        state: dict[str, Tensor] = {}
        for names, parameters in self.pieces():
            with self.gathered(parameters):
                if self.rank == 0:
                    state |= {name: value.detach().to("cpu", copy=True) for name, value in zip(names, parameters, strict=True)}
        return state | {name: value.detach().cpu() for name, value in self.model.named_buffers()}

    # State ---------------------------------------------------------------------------------------------------------------------

    def fragments(self) -> dict[str, Tensor]:
        """The weights and moments that this rank writes. Ranks do not wait for each other."""
        found: dict[str, Tensor] = {}
        if self.zero_stage < 3:
            found |= own_share("weight", self.model, self.rank, self.world_size)
        owner = owners(self.model, self.world_size) if self.zero_stage == 0 else {}
        for name, part in self._slices():
            if owner.get(name, self.rank) != self.rank:
                continue
            for moment in _MOMENTS if self.num_updates else ():  # torch creates them in the first update, which fp16 may skip
                found[fragment_name(moment, name, part.start)] = part.of(self._inner.state[part.flat][moment])
            if self.zero_stage == 3:
                found[fragment_name("weight", name, part.start)] = part.of(part.flat)
        return found

    def counters(self) -> dict[str, float]:
        """The state apart from tensors."""
        return {
            "num_updates": self.num_updates,
            "loss_scale": self.loss_scale,
            "updates_since_overflow": self._updates_since_overflow,
        }

    def load(self, fragments: Fragments, counters: Mapping[str, Any]) -> None:
        """Load a checkpoint's moments and counters. The engine's model must already have the checkpoint's weights."""
        self.num_updates, self.loss_scale = counters["num_updates"], counters["loss_scale"]
        self._updates_since_overflow = counters["updates_since_overflow"]
        if self.num_updates == 0:
            return
        for name, part in self._slices():
            state = self._inner.state[part.flat]
            for moment in _MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(part.flat)
                part.of(state[moment]).copy_(fragments.read(moment, name, part.start, part.length))
        for flat in {id(part.flat): part.flat for _, part in self._slices()}.values():
            # The fused optimizer keeps its step on the device of the weights.
            self._inner.state[flat]["step"] = torch.tensor(float(self.num_updates), device=flat.device)

    @property
    def _inner(self) -> Any:
        """torch's AdamW over the weights that this rank updates."""
        optimizer = self.deepspeed.optimizer
        return optimizer if self.zero_stage == 0 else optimizer.optimizer

    def _slices(self) -> Iterator[tuple[str, _Slice]]:
        """This rank's share of every parameter, as slices of the flat tensors that its optimizer updates."""
        optimizer = self.deepspeed.optimizer
        parameters: Iterable[tuple[str, Any]] = self.model.named_parameters()  # with the attributes that DeepSpeed adds
        for name, parameter in parameters:
            if self.zero_stage == 0:
                yield name, _Slice(parameter, 0, 0, parameter.numel())
            elif self.zero_stage == 3:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = self.rank * size
                length = min(size, parameter.ds_numel - start)  # the rest is padding
                if length > 0:
                    yield name, _Slice(optimizer.fp32_partitioned_groups_flat[group], start, offset, length)
            elif (mapping := parameter._hp_mapping) is not None:
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield name, _Slice(flat, low.start, high.start, low.numel)

    def _clip(self) -> Tensor:
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm

    def _count_update(self) -> None:
        if self.config.precision != "fp16":
            self.num_updates += 1
        elif self.deepspeed.optimizer.overflow:
            self._overflows_in_a_row += 1
            self._is_stuck = self.loss_scale == 1 or self._overflows_in_a_row >= _MAX_OVERFLOWS
            self.loss_scale, self._updates_since_overflow = max(1.0, self.loss_scale / 2), 0
        else:
            self._overflows_in_a_row, self._is_stuck = 0, False
            self.num_updates += 1
            self._updates_since_overflow += 1
            if self._updates_since_overflow == _STEPS_TO_DOUBLE:
                self.loss_scale, self._updates_since_overflow = self.loss_scale * 2, 0


@dataclass(frozen=True)
class _Slice:
    """Values start..start+length-1 of a flattened parameter are flat[offset : offset + length]."""

    flat: Tensor
    start: int
    offset: int
    length: int

    def of(self, like_flat: Tensor) -> Tensor:
        return like_flat.detach().view(-1)[self.offset : self.offset + self.length]


def effective_zero_stage(config: TrainConfig, world_size: int, num_parameters: int, memory: float) -> int:
    """The ZeRO stage in use: 0 for a single worker, which has nobody to share with, else the configured one, else the lowest one
    that fits. memory: of the device of a worker, in bytes.

    Stages above 0 cost time: for a single worker with 98 M parameters on two CPU cores 0.3 s per step for copies, and for two
    workers with a small model a fifth of a step. fp16 takes at least stage 1, because only stages 1 to 3 scale the loss.
    """
    given, lowest = config.execution.zero_stage, 1 if config.precision == "fp16" else 0
    if given is not None:
        return given if world_size > 1 else lowest and given
    if world_size == 1:
        return lowest
    # float32, per weight: itself, its gradient, its two moments, and the EMA, which every worker has whole
    state = (20.0, 12 + 8 / world_size, 8 + 12 / world_size, 4 + 16 / world_size)
    highest = 2 if config.execution.compile else 3  # stage 3 swaps weights under compiled code
    fitting = (stage for stage in range(lowest, highest) if state[stage] * num_parameters <= _STATE_SHARE * memory)
    return next(fitting, highest)


def zero_options(zero_stage: int, device: str) -> dict[str, Any]:
    """Options of DeepSpeed. On GPUs gradients are reduced while the backward pass continues; stage 0 has no such option."""
    return {"stage": zero_stage} | ({"overlap_comm": True} if zero_stage and device == "cuda" else {})


def _least_memory(device: torch.device) -> float:
    """Bytes of the smallest device of all ranks, so that they choose the same. Ranks on CPUs share the memory of their machine."""
    if device.type == "cuda":
        own = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        own = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    least = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def prepare_forward(model: ENAT, config: TrainConfig, device: torch.device) -> None:
    """Make a model's forward run in the config's precision and, if configured, compiled. Its weights do not change."""
    if config.precision in _AUTOCAST:
        # Wraps the method: a wrapping module would change the names of all parameters.
        autocast = torch.autocast(device.type, _AUTOCAST[config.precision])
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
    if config.execution.compile:
        model.compile_blocks()


def _weight_decay_groups(model: ENAT, config: TrainConfig) -> Sequence[dict[str, Any]]:
    parameters = list(model.parameters())
    if config.weight_decay_on == "all":
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return [
        {"params": [value for value in parameters if (id(value) in matrices) is decays], "weight_decay": weight_decay}
        for decays, weight_decay in ((True, config.weight_decay), (False, 0.0))
    ]


def _import_deepspeed() -> Any:
    """DeepSpeed 0.19 without what it imports for other uses, which takes seconds before the first step: MLflow for its autotuner,
    and torch's compiler for the optimizer Muon."""
    is_hidden = "mlflow" not in sys.modules
    if is_hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment] # importing it raises ImportError
    try:
        import deepspeed
    finally:
        if is_hidden:
            del sys.modules["mlflow"]
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon
    return deepspeed


def _initialize(model: ENAT, optimizer: torch.optim.Optimizer, config: TrainConfig, zero_stage: int, passes_per_step: int) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import_deepspeed()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a shared-memory all-reduce at first use, which takes 25 s and needs a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    if zero_stage == 3:
        # The head uses the weight of the embedding, another module.
        deepspeed.zero.register_external_parameter(model, model.token_embedding.weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,  # for bookkeeping: one "sample" is one pass
            "gradient_accumulation_steps": passes_per_step,
            "gradient_clipping": config.max_grad_norm if config.max_grad_norm and zero_stage else 0.0,
            "zero_optimization": zero_options(zero_stage, next(model.parameters()).device.type),
            "zero_allow_untested_optimizer": True,
            "communication_data_type": config.execution.reduce_in,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device four times a step
        },
    )
    if zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # would only copy every gradient
    return engine
