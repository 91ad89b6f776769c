"""A DeepSpeed engine around a model, and its state in files.

State is written as safetensors, one file of optimizer moments per rank, because DeepSpeed's own checkpoints need unpickling.
ZeRO-1 cuts the flattened parameters into one partition per rank, so joining the ranks' files and cutting them again resumes
at any world size.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

STATE = "state.json"


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, groups_per_rank: int) -> Any:
    """ZeRO-1 in float32. Call backward and step once per group: the last of groups_per_rank calls updates the weights.

    The gradient is the mean over all groups of all ranks.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a shared-memory all-reduce when first used: 25 s, and a compiler is needed.
        deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: one "sample" is one group
            "gradient_accumulation_steps": groups_per_rank,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Any) -> float:
    """Of the whole gradient of the last step; waits for the device."""
    return float(engine.get_global_grad_norm())


def save_rank_state(folder: Path, engine: Any, state: Mapping[str, Any]) -> None:
    """This rank's share of a checkpoint; rank 0 adds `state` and the world size. Weights are the caller's to save."""
    moments = {}
    inner = engine.optimizer.optimizer  # torch's AdamW over this rank's flat partitions
    for index, group in enumerate(inner.param_groups):
        for name, value in inner.state[group["params"][0]].items():
            moments[f"{index}.{name}"] = value.detach().cpu().contiguous()
    save_file(moments, folder / f"optimizer-{dist.get_rank():05d}.safetensors")
    if dist.get_rank() == 0:
        (folder / STATE).write_text(json.dumps({**state, "world_size": dist.get_world_size()}))


def load_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint folder has the state of every rank that took part, and none of its files is cut short."""
    try:
        ranks = range(load_state(folder)["world_size"])
        for path in (*folder.glob("*.safetensors"), *(folder / f"optimizer-{rank:05d}.safetensors" for rank in ranks)):
            with safe_open(str(path), framework="pt"):
                pass  # opening compares the file's length with its header
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return True


def load_moments(folder: Path, engine: Any, world_size: int) -> None:
    """Put the moments that `world_size` ranks saved into this engine, whatever its own world size.

    The engine must have been made from a model that holds the checkpoint's weights: its float32 partitions are cut from them.
    """
    files = [load_file(folder / f"optimizer-{rank:05d}.safetensors") for rank in range(world_size)]
    inner = engine.optimizer.optimizer
    for index, group in enumerate(inner.param_groups):
        partition = group["params"][0]
        size, rank, ranks = partition.numel(), dist.get_rank(), dist.get_world_size()
        for key in (key for key in files[0] if key.startswith(f"{index}.")):
            value = files[0][key]
            if value.ndim:  # a moment: join the old partitions (their padding is at the very end, and zero), cut new ones
                joined = torch.cat([file[key] for file in files])
                joined = nn.functional.pad(joined, (0, max(0, size * ranks - joined.numel())))
                value = joined[rank * size : (rank + 1) * size].to(partition.device)
            inner.state[partition][key.split(".", 1)[1]] = value.clone()
