"""Nearest rows of codes by Hamming distance, exactly, and rows that are equal.

Codes of a tokenizer seldom agree: with a codebook of K codes in equal use, two rows agree at one position of K. So only agreements
are counted. An index lists, for each position and code, the rows that have this code there. The rows in the L lists of a query,
counted, are its agreements. That is about K times less work than comparing every position of every row.

Shape legend: N queries, R rows, L codes of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 1 << 15  # whose index and counts stay in the processor's cache


@dataclass(frozen=True, eq=False)
class NearestRows:
    """Of each query: the number of codes in which it differs from the nearest row, that row, and whether it is nearest as flipped.

    distances: int64 (N,), in [0, L].   rows: int64 (N,).   flipped: bool (N,).
    Of equally near rows the first counts, and of equally near sides of a row the one as stored.
    """

    distances: np.ndarray
    rows: np.ndarray
    flipped: np.ndarray


def nearest_rows(queries: np.ndarray, codes: np.ndarray, own: np.ndarray | None = None, *, first_row: int = 0) -> NearestRows:
    """The nearest of some rows to each query.

    queries: integers (N, L).   codes: integers (R, 2, L), as stored and flipped (pipelines.data.token_map), R at least 1.
    own: int64 (N,), the row that a query is itself; it is not its own neighbour. If there is no other, the distance is L + 1.
    first_row: number of the first of these rows. Raises ValueError for rows of another length.
    """
    num_rows, _, length = codes.shape
    if queries.shape[1] != length or not num_rows:
        raise ValueError(f"queries of {queries.shape[1]} codes cannot be compared with {num_rows} rows of {length}")
    return nearest_of(
        [
            _nearest_in(queries, codes[start : start + _ROWS_AT_ONCE, side], own, first_row + start, is_flipped=bool(side))
            for start in range(0, num_rows, _ROWS_AT_ONCE)
            for side in (0, 1)
        ],
    )


def nearest_of(parts: Sequence[NearestRows]) -> NearestRows:
    """The nearest of all, from those of parts of the rows."""
    distances, rows, flipped = (np.stack([getattr(part, name) for part in parts]) for name in ("distances", "rows", "flipped"))
    order = (distances << 48) + (rows << 1) + flipped
    best = order.argmin(axis=0), np.arange(order.shape[1])
    return NearestRows(distances[best], rows[best], flipped[best])


def _nearest_in(queries: np.ndarray, rows: np.ndarray, own: np.ndarray | None, first_row: int, *, is_flipped: bool) -> NearestRows:
    num_rows, length = rows.shape
    by_position = np.ascontiguousarray(rows.T)
    num_codes = int(max(rows.max(), queries.max())) + 1
    lists = np.argsort(by_position, axis=1, kind="stable").ravel()  # the rows with each code at each position
    positions = np.arange(length) * num_codes
    ends = np.bincount((by_position + positions[:, None]).ravel(), minlength=length * num_codes).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    agreements, nearest = np.empty((2, len(queries)), np.int64)
    for query, codes in enumerate(queries):
        places = positions + codes
        listed = [lists[start:end] for start, end in zip(starts[places].tolist(), ends[places].tolist(), strict=True)]
        counts = np.bincount(np.concatenate(listed), minlength=num_rows)
        if own is not None and 0 <= own[query] - first_row < num_rows:
            counts[own[query] - first_row] = -1
        nearest[query] = counts.argmax()
        agreements[query] = counts[nearest[query]]
    return NearestRows(length - agreements, nearest + first_row, np.full(len(queries), is_flipped))


def first_equal_rows(codes: np.ndarray) -> np.ndarray:
    """The first row that is equal to each one: int64 (R,), its own number if there is none before it.

    codes: integers (R, 2, L), as stored and flipped. Rows are equal if both sides are, also of a mirrored image, whose sides are
    exchanged. Digests of 128 bits are compared.
    """
    digests = [b"".join(sorted(hashlib.blake2b(side.tobytes(), digest_size=16).digest() for side in row)) for row in codes]
    firsts: dict[bytes, int] = {}
    return np.array([firsts.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)
