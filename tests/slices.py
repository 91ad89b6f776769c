"""A random slice of the selected tests, for continuous integration: `pytest -m faults --slice 8 --seed SEED`.

The seed, the names of the tests and `slice_seconds.json` determine a slice, so anyone can repeat it. The JSON file holds the
seconds that each test file needs once (fixtures of the module) and per test, on two idle cores. `--record-seconds` measures them
again.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

SECONDS = Path(__file__).with_name("slice_seconds.json")
_UNKNOWN = {"setup": 10.0, "test": 15.0}  # of a file that was not measured yet


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slices")
    group.addoption(
        "--slice", type=float, metavar="MINUTES", help="run a random part of the selected tests, of about this duration"
    )
    group.addoption("--seed", metavar="TEXT", help="seed of the random part, for example the commit")
    group.addoption("--record-seconds", action="store_true", help=f"write the durations of this run to {SECONDS.name}")


def pick(tests: Sequence[str], minutes: float, seed: str, seconds: dict[str, dict[str, float]]) -> set[str]:
    """Node ids of tests in random order until the minutes are filled. A test that does not fit any more is passed over."""
    order = sorted(tests)
    random.Random(seed).shuffle(order)
    left, files, picked = 60 * minutes, set[str](), set[str]()
    for test in order:
        file = test.partition("::")[0]
        known = seconds.get(file, _UNKNOWN)
        needed = known["test"] + (0 if file in files else known["setup"])
        if needed <= left:
            left -= needed
            files.add(file)
            picked.add(test)
    return picked


@pytest.hookimpl(trylast=True)  # after the selection by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    minutes, seed = config.option.slice, config.option.seed
    if minutes is None:
        return
    if not seed:
        raise pytest.UsageError("--slice needs a --seed, so that the slice can be repeated")
    picked = pick([item.nodeid for item in items], minutes, seed, json.loads(SECONDS.read_text()))
    if not picked:
        raise pytest.UsageError(f"--slice {minutes:g} holds none of the {len(items)} selected tests")
    left_out = [item for item in items if item.nodeid not in picked]
    items[:] = [item for item in items if item.nodeid in picked]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Print the slice and how to repeat it."""
    if config.option.slice is None:
        return []
    head = f"slice of {config.option.slice:g} minutes, seed {config.option.seed}: {len(items)} tests"
    return [head, *(f"  {item.nodeid}" for item in items)]


class _Record:
    """Seconds of each phase by file."""

    def __init__(self) -> None:
        self.setup: dict[str, float] = defaultdict(float)
        self.calls: dict[str, list[float]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        if report.when == "call":
            self.calls[file].append(report.duration)
        else:
            self.setup[file] += report.duration

    def pytest_sessionfinish(self) -> None:
        measured = {
            file: {"setup": round(self.setup[file], 1), "test": round(sum(calls) / len(calls), 1)}
            for file, calls in self.calls.items()
        }
        SECONDS.write_text(json.dumps(json.loads(SECONDS.read_text()) | measured, indent=1, sort_keys=True) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.record_seconds:
        config.pluginmanager.register(_Record())
