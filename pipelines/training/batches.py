"""The groups of images that a training step learns from, drawn ahead of time.

A global batch consists of `num_groups` equal groups. Every random draw of a group (rows, flips, captions, dropped labels, mask
ratio, masks, reuse, dropout) depends only on (seed, step, group). Ranks take whole groups; more ranks than groups share the rows of
each. Hence the training data does not depend on the number of workers, and a resumed run draws the same groups as an uninterrupted
one.

Shape legend: B images of a group, L tokens, T text tokens, W text width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from enat.model import ENAT, TextCondition, draw_dropout_mask
from enat.training.masking import MaskedCodes, mask_codes
from pipelines.data.captions import CaptionFeatures
from pipelines.data.token_map import TokenMap
from pipelines.training.config import TrainConfig


@dataclass(frozen=True)
class GroupBatch:
    """One group of a step. codes: int64 (B, L).   condition: labels int64 (B,), or captions, before any are dropped.

    piece, num_pieces: which of so many equal pieces of its rows this rank learns from.
    is_dropped: bool (B,), images whose condition is replaced by the null condition.   dropout_seed: seed of the group's dropout.
    weight: 1, or 0 for a repeated group that only keeps a rank in step with ranks that have one group more.
    """

    step: int
    group: int
    codes: Tensor
    condition: Tensor | TextCondition
    is_dropped: Tensor
    masked: MaskedCodes
    dropout_seed: int
    weight: float = 1.0
    piece: int = 0
    num_pieces: int = 1

    @property
    def num_images(self) -> int:
        """Of this rank's piece."""
        return len(self.codes) // self.num_pieces

    @property
    def mask_ratio(self) -> float:
        return self.masked.num_masked / self.codes.shape[1]

    @property
    def is_reuse(self) -> bool:
        return self.masked.previous_tokens is not None

    def to(self, device: torch.device) -> GroupBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> GroupBatch:
        """A copy in pinned memory, from which transfers to a GPU are asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> GroupBatch:
        masked, condition = self.masked, self.condition
        previous = None if masked.previous_tokens is None else change(masked.previous_tokens)
        if isinstance(condition, TextCondition):
            condition = TextCondition(change(condition.hidden), change(condition.pooled))
        else:
            condition = change(condition)
        return replace(
            self,
            codes=change(self.codes),
            condition=condition,
            is_dropped=change(self.is_dropped),
            masked=replace(masked, tokens=change(masked.tokens), previous_tokens=previous),
        )

    def microbatches(self, count: int, model: ENAT) -> Iterator[tuple[Tensor, Tensor | TextCondition, MaskedCodes, Tensor | None]]:
        """Cut this rank's piece into `count` equal microbatches of codes, condition, masked codes and dropout mask.

        Random draws are made for the whole group, so they do not depend on pieces and `count`.
        """
        size, first = self.num_images // count, self.piece * self.num_images
        condition = model.drop_condition(self.condition, self.is_dropped)
        generator = torch.Generator(self.codes.device).manual_seed(self.dropout_seed)
        kept = draw_dropout_mask(model.config, len(self.codes), generator, self.codes.device)
        for start in range(first, first + self.num_images, size):
            rows = slice(start, start + size)
            yield self.codes[rows], condition[rows], self.masked.rows(rows), None if kept is None else kept[rows]


def rows_of(config: TrainConfig, token_map: TokenMap, step: int, group: int) -> np.ndarray:
    """The rows of the token map that a group of a step learns from, int64 (B,)."""
    assert config.seed is not None
    own = slice(group * config.group_size, (group + 1) * config.group_size)
    return token_map.batch_rows(config.seed, step, config.batch_size).rows[own]


def draw_group(config: TrainConfig, token_map: TokenMap, captions: CaptionFeatures | None, step: int, group: int) -> GroupBatch:
    """Draw a group on the CPU. `captions`: features for a text-conditional model."""
    assert config.seed is not None
    size = config.group_size
    own = slice(group * size, (group + 1) * size)
    batch = token_map.batch_rows(config.seed, step, config.batch_size)
    rng = np.random.default_rng([config.seed, step, group])
    codes, labels = map(torch.from_numpy, token_map.take(batch.rows[own], batch.flipped[own] & config.flip))
    is_dropped = torch.from_numpy(rng.random(size) < config.cond_drop_prob)
    masked = mask_codes(codes, token_map.info.codebook_size, config.masking, rng)
    condition: Tensor | TextCondition = labels
    if captions is not None:
        condition = TextCondition(*map(torch.from_numpy, captions.take(batch.captions[own])))
    return GroupBatch(step, group, codes, condition, is_dropped, masked, dropout_seed=int(rng.integers(2**63)))


def pieces_per_group(config: TrainConfig, world_size: int) -> int:
    """Into how many equal pieces the rows of each group are cut: 1, unless there are more ranks than groups.

    Every rank gets equally many pieces if the sizes allow it.
    """
    if world_size <= config.num_groups:
        return 1
    smallest = config.execution.microbatches  # images of a piece
    possible = [count for count in range(1, config.group_size // smallest + 1) if config.group_size % (count * smallest) == 0]
    fitting = [count for count in possible if count * config.num_groups >= world_size]
    even = [count for count in fitting if count * config.num_groups % world_size == 0]
    return (even or fitting)[0]


class Batches:
    """A rank's groups, or pieces of them, beginning with a given step. A thread draws them ahead of their use.

    A rank with fewer of them than others repeats its last one with weight 0, because every rank must take part in every reduction.
    """

    def __init__(
        self,
        config: TrainConfig,
        token_map: TokenMap,
        captions: CaptionFeatures | None,
        *,
        step: int,
        rank: int,
        world_size: int,
        pin: bool = False,
    ) -> None:
        num_pieces = pieces_per_group(config, world_size)
        self.num_units = config.num_groups * num_pieces
        units = [[divmod(int(unit), num_pieces) for unit in some] for some in np.array_split(range(self.num_units), world_size)]
        self.per_step = len(units[0])
        self._own = units[rank]
        self._first = step

        def draw(step: int, group: int, piece: int) -> GroupBatch:
            batch = replace(draw_group(config, token_map, captions, step, group), piece=piece, num_pieces=num_pieces)
            return batch.pinned() if pin else batch

        self._draw = draw
        self._remaining = self._order()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[float, Future[GroupBatch]]] = deque()
        self._fill()
        self.seconds_waited = 0.0

    def take_step(self) -> Iterator[GroupBatch]:
        """The groups of the next step, or pieces of them."""
        for _ in range(self.per_step):
            started = time.perf_counter()
            weight, future = self._ahead.popleft()
            batch = future.result()
            self.seconds_waited += time.perf_counter() - started
            self._fill()
            yield batch if weight == 1 else replace(batch, weight=weight)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        missing = 2 * self.per_step - len(self._ahead)
        for step, (group, piece), weight in islice(self._remaining, missing):
            self._ahead.append((weight, self._thread.submit(self._draw, step, group, piece)))

    def _order(self) -> Iterator[tuple[int, tuple[int, int], float]]:
        step = self._first
        while True:
            for place in range(self.per_step):
                is_own = place < len(self._own)
                yield step, self._own[place if is_own else -1], float(is_own)
            step += 1
