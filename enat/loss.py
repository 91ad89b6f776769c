"""The training objective: predict masked codes, fresh or with reused features (paper sec. 4.2; published settings).

Shape legend: B images, L tokens, M masked tokens, V codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enat.masking import MaskedCodes
from enat.model import ENATOutput

LABEL_SMOOTHING = 0.1


def masked_cross_entropy(output: ENATOutput, codes: Tensor, label_smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """Mean cross-entropy over masked positions, in nats, float32 scalar.

    output: of a forward with logits="masked" (B, M, V) or "all" (B, L, V).   codes: the truth, int64 (B, L).
    """
    logits = output.logits
    if logits.shape[1] != output.num_masked:
        logits = logits.gather(1, output.masked_index[..., None].expand(-1, -1, logits.shape[-1]))
    targets = codes.gather(1, output.masked_index)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)


@torch.no_grad()
def previous_features(teacher: nn.Module, masked: MaskedCodes, labels: Tensor) -> ENATOutput | None:
    """What the step before would have left: the EMA model's output on more heavily masked tokens; None in fresh mode.

    teacher must be in eval mode: the sampler, too, reuses features that were computed without dropout.
    """
    if masked.previous_tokens is None:
        return None
    assert not teacher.training
    return teacher(masked.previous_tokens, labels, num_masked=masked.previous_num_masked, logits="masked")


def objective(
    model: nn.Module,
    teacher: nn.Module,
    codes: Tensor,
    labels: Tensor,
    masked: MaskedCodes,
    *,
    dropout_generator: torch.Generator | None = None,
    label_smoothing: float = LABEL_SMOOTHING,
) -> tuple[Tensor, ENATOutput]:
    """Loss of one group and the output it came from.

    model: an ENAT, or an engine that forwards to one.   teacher: its EMA.   codes: int64 (B, L).
    labels: int64 (B,), already dropped to the null label where the recipe says so.
    """
    previous = previous_features(teacher, masked, labels)
    output = model(
        masked.tokens, labels, previous, num_masked=masked.num_masked, logits="masked", dropout_generator=dropout_generator
    )
    return masked_cross_entropy(output, codes, label_smoothing), output
