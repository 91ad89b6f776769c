"""The training objective: predict masked codes, fresh or with reused features (paper sec. 4.2; published settings).

Shape legend: B images, L tokens, M masked tokens, V codebook size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from enat.config import LABEL_SMOOTHING
from enat.model import ENATOutput, TextCondition
from enat.training.masking import MaskedCodes


def masked_cross_entropy(
    output: ENATOutput, codes: Int64[Tensor, "B L"], label_smoothing: float = LABEL_SMOOTHING, z_loss: float = 0.0
) -> Float32[Tensor, ""]:
    """Mean cross-entropy over masked positions, in nats.

    `output`: of a forward with logits="masked" or "all".   `codes`: the true codes.
    `z_loss`: weight of the mean squared log-normaliser, added to the loss. It keeps logits from drifting, which costs digits in
        half precision (PaLM, arXiv 2204.02311, sec. 5: weight 1e-4). The published recipe does not use it.
    """
    logits = _masked_logits(output).float().flatten(0, 1)
    targets = codes.gather(1, output.masked_index).flatten()
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(dim=-1).square().mean() if z_loss else loss


@torch.no_grad()
def token_accuracy(output: ENATOutput, codes: Int64[Tensor, "B L"]) -> Float32[Tensor, ""]:
    """Share of masked positions whose most likely code is the true one. Arguments as in masked_cross_entropy."""
    return (_masked_logits(output).argmax(dim=-1) == codes.gather(1, output.masked_index)).float().mean()


def _masked_logits(output: ENATOutput) -> Float32[Tensor, "B M V"]:
    """Logits of masked positions, whether or not the forward computed the others."""
    logits = output.logits
    if logits.shape[1] == output.num_masked:
        return logits
    return logits.gather(1, output.masked_index[..., None].expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def previous_features(teacher: nn.Module, masked: MaskedCodes, condition: Tensor | TextCondition) -> ENATOutput | None:
    """The output that the step before would have left: that of the EMA model on more heavily masked tokens. None in fresh mode.

    Computes features only, without logits.
    `teacher`: must be in eval mode, because the sampler also reuses features that were computed without dropout.
    """
    if masked.previous_tokens is None:
        return None
    assert not teacher.training
    return teacher(masked.previous_tokens, condition, num_masked=masked.previous_num_masked, logits="none")


def objective(
    model: nn.Module,
    teacher: nn.Module,
    codes: Int64[Tensor, "B L"],
    condition: Tensor | TextCondition,
    masked: MaskedCodes,
    *,
    dropout_mask: Tensor | None = None,
    label_smoothing: float = LABEL_SMOOTHING,
    z_loss: float = 0.0,
) -> tuple[Tensor, ENATOutput]:
    """Loss of one group, and the output it was computed from.

    `model`: an ENAT, or an engine that forwards to one.   `teacher`: its EMA.
    `condition`: labels int64 (B,) or captions, already replaced by the null condition for dropped images.
    `dropout_mask`: see draw_dropout_mask. All images have the same number of masked tokens, so the loss of a group computed in
        several passes is the mean of their losses, weighted by images.
    """
    previous = previous_features(teacher, masked, condition)
    output = model(masked.tokens, condition, previous, num_masked=masked.num_masked, logits="masked", dropout_mask=dropout_mask)
    return masked_cross_entropy(output, codes, label_smoothing, z_loss), output
