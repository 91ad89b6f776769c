"""Slices of the fault tests: repeatable, of the duration asked for, never empty."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import slices

TESTS = [f"tests/test_{file}.py::test_{number}" for file in "abcd" for number in range(20)]
SECONDS = {f"tests/test_{file}.py": {"setup": 30.0, "test": 3.0} for file in "abc"}  # nothing is known of file d


def _duration(picked: set[str]) -> float:
    known = {file: SECONDS.get(file, slices._UNKNOWN) for file in {test.partition("::")[0] for test in picked}}
    return sum(each["setup"] for each in known.values()) + sum(known[test.partition("::")[0]]["test"] for test in picked)


def test_a_slice_fills_its_minutes_and_depends_on_the_seed_alone() -> None:
    picked = slices.pick(TESTS, 4, "a commit", SECONDS)
    assert 230 < _duration(picked) <= 240
    assert slices.pick(TESTS[::-1], 4, "a commit", SECONDS) == picked != slices.pick(TESTS, 4, "the next commit", SECONDS)


def test_every_test_is_in_the_slice_of_some_seed() -> None:
    assert set().union(*(slices.pick(TESTS, 4, str(seed), SECONDS) for seed in range(40))) == set(TESTS)


@pytest.mark.parametrize(("minutes", "seed", "message"), [(0.01, "a commit", "holds none of the 1"), (4, None, "--seed")])
def test_an_empty_slice_and_a_missing_seed_are_errors(minutes: float, seed: str | None, message: str) -> None:
    config = SimpleNamespace(option=SimpleNamespace(slice=minutes, seed=seed))
    with pytest.raises(pytest.UsageError, match=message):
        slices.pytest_collection_modifyitems(config, [SimpleNamespace(nodeid=TESTS[0])])


def test_the_durations_are_of_existing_files() -> None:
    root = Path(__file__).parents[1]
    assert [file for file in json.loads(slices.SECONDS.read_text()) if not (root / file).exists()] == []
