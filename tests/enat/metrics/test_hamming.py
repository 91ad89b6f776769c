"""The nearest rows are those of scipy's distances and of brute force, whatever the parts; equal rows are found on both sides."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from enat.metrics import hamming
from enat.metrics.hamming import first_equal_rows, nearest_of, nearest_rows


def some_codes(*shape, num_codes=5, seed=0):
    return np.random.default_rng(seed).integers(0, num_codes, shape).astype(np.uint16)


def plain_nearest(queries, codes, own=None):
    """Distance, row and side, one pair at a time; of equal ones the first row, as stored before flipped."""
    found = []
    for number, query in enumerate(queries):
        pairs = [
            (int((query != codes[row, side]).sum()), row, bool(side))
            for row in range(len(codes))
            for side in (0, 1)
            if own is None or own[number] != row
        ]
        found.append(min(pairs))
    return found


def as_tuples(found):
    return [*zip(found.distances.tolist(), found.rows.tolist(), found.flipped.tolist(), strict=True)]


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(1, 7)),
    num_codes=st.integers(1, 6),
    rows_at_once=st.integers(1, 50),
    seed=st.integers(0, 100),
    is_own=st.booleans(),
)
def test_nearest_rows_equal_brute_force(sizes, num_codes, rows_at_once, seed, is_own):
    num_queries, num_rows, length = sizes
    codes = some_codes(num_rows, 2, length, num_codes=num_codes, seed=seed)
    own = np.random.default_rng(seed).integers(0, num_rows, num_queries) if is_own else None
    queries = codes[own, 0] if is_own else some_codes(num_queries, length, num_codes=num_codes + 1, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "_ROWS_AT_ONCE", rows_at_once)
        assert as_tuples(nearest_rows(queries, codes, own)) == plain_nearest(queries, codes, own)


def test_distances_equal_scipy():
    queries, codes = some_codes(200, 64, num_codes=30), some_codes(500, 2, 64, num_codes=30, seed=1)
    theirs = cdist(queries, codes.reshape(1000, 64), "hamming").min(axis=1) * 64
    np.testing.assert_allclose(nearest_rows(queries, codes).distances, theirs)


def test_parts_of_the_rows_give_the_nearest_of_all():
    queries, codes = some_codes(20, 6), some_codes(50, 2, 6, seed=1)
    bounds = [0, 1, 17, 50]
    parts = [nearest_rows(queries, codes[start:stop], first_row=start) for start, stop in pairwise(bounds)]
    assert as_tuples(nearest_of(parts)) == as_tuples(nearest_rows(queries, codes))


def test_a_row_alone_has_no_neighbour():
    codes = some_codes(1, 2, 6)
    assert nearest_rows(codes[:, 0], codes, np.array([0])).distances.tolist() == [7]


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"queries of 5 codes .* 3 rows of 6"):
        nearest_rows(some_codes(2, 5), some_codes(3, 2, 6))
    with pytest.raises(ValueError, match="with 0 rows"):
        nearest_rows(some_codes(2, 6), some_codes(0, 2, 6))


def test_equal_rows_are_found_also_mirrored():
    codes = some_codes(9, 2, 12, num_codes=1000)
    codes[4] = codes[2]
    codes[7] = codes[2, ::-1]  # of a mirrored image
    codes[8, 1] = codes[0, 1]  # one side alone is not enough
    assert first_equal_rows(codes).tolist() == [0, 1, 2, 3, 2, 5, 6, 2, 8]
