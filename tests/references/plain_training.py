"""A plain training loop for one process, without Ray and DeepSpeed, as the reference for the training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from enat.model import ENAT, TextCondition, draw_dropout_mask
from enat.training.loss import objective, token_accuracy
from enat.training.masking import mask_codes
from material.tiny_training import Material, Trained
from pipelines.data.captions import CaptionFeatures
from pipelines.data.token_map import TokenMap
from pipelines.training.config import TrainConfig
from pipelines.training.task import initial_model

Plainly = Callable[[TrainConfig], Trained]


def train_plainly(material: Material, config: TrainConfig) -> Trained:
    """One process, every group in turn, torch's own AdamW, clipping and autocast, an EMA by hand."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are too small for more
    try:
        return _train_plainly(material, config)
    finally:
        torch.set_num_threads(num_threads)


def _train_plainly(material: Material, config: TrainConfig) -> Trained:
    token_map, captions = material.token_map, material.captions if config.model.text else None
    model = initial_model(material.architecture(config), config.seed or 0)
    if captions is not None:
        model.set_null_caption(*(torch.from_numpy(array[0]) for array in captions.take(np.array([-1]))))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(_decay_groups(model, config), betas=config.betas)
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    scale = 2.0**16 if config.precision == "fp16" else 1.0
    model.train()
    history = []
    for step in range(config.num_steps):
        batch, rows = token_map.batch_rows(config.seed or 0, step, config.batch_size), []
        for group in range(config.num_groups):
            with torch.autocast("cpu", precision) if precision else nullcontext():
                loss, accuracy, is_reuse = _group_loss(model, ema, token_map, captions, batch, config, step, group)
            (loss * scale / config.num_groups).backward()
            rows.append((loss.item(), accuracy.item(), is_reuse))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf"))
        for some in optimizer.param_groups:
            some["lr"] = config.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(config.ema_decay).add_(parameter, alpha=1 - config.ema_decay)
        losses, accuracies, modes = zip(*rows, strict=True)
        history.append(
            {
                "step": step + 1,
                "loss": float(np.mean(losses)),
                "token_accuracy": float(np.mean(accuracies)),
                "gradient_norm": norm.item(),
                "num_reuse": float(sum(modes)),
            }
        )
    return Trained(ema.state_dict(), model.state_dict(), history)


def _group_loss(
    model: ENAT,
    ema: ENAT,
    token_map: TokenMap,
    captions: CaptionFeatures | None,
    batch: Any,
    config: TrainConfig,
    step: int,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    size = config.batch_size // config.num_groups
    rng = np.random.default_rng([config.seed, step, group])
    own = slice(group * size, (group + 1) * size)
    codes, condition = map(torch.from_numpy, token_map.take(batch.rows[own], batch.flipped[own] & config.flip))
    if captions is not None:
        condition = TextCondition(*map(torch.from_numpy, captions.take(batch.captions[own])))
    condition = model.drop_condition(condition, torch.from_numpy(rng.random(size) < config.cond_drop_prob))
    masked = mask_codes(codes, model.config.mask_id, config.masking, rng)
    dropout = torch.Generator().manual_seed(int(rng.integers(2**63)))
    kept = draw_dropout_mask(model.config, size, dropout, torch.device("cpu"))
    options = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
    loss, output = objective(model, ema, codes, condition, masked, dropout_mask=kept, **options)
    return loss, token_accuracy(output, codes), masked.previous_tokens is not None


def _decay_groups(model: ENAT, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices are the weights of linear layers: all parameters with two axes but embeddings."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embedding" not in name
        (decayed if is_matrix or config.weight_decay_on == "all" else others).append(parameter)
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
