"""Number formats in which networks that are not trained compute: encoder, decoder, extractors of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from enat.config import PRECISIONS, check_choice

_TF32: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)


@contextmanager
def computing_in(precision: str, device: str) -> Iterator[None]:
    """Products inside are computed in a number format; results stay as autocast leaves them. device: type, such as "cuda".

    tf32: float32 whose factors have 10 bits of mantissa. GPUs since Ampere have it; elsewhere it is fp32. Do not use it in several
    threads, because torch keeps it for the whole process.   bf16: by autocast.
    """
    check_choice("precision", precision, PRECISIONS)
    before = [backend.allow_tf32 for backend in _TF32]
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        try:
            if precision == "tf32":
                _allow_tf32([True] * len(_TF32))
            yield
        finally:
            if precision == "tf32":
                _allow_tf32(before)


def _allow_tf32(values: Sequence[bool]) -> None:
    for backend, value in zip(_TF32, values, strict=True):
        backend.allow_tf32 = value
