"""A short run of the benchmark of growth. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import growth
import pytest

from pipelines.artifacts.open import open_store
from pipelines.run import graph


def test_an_exponent_is_that_of_a_power() -> None:
    sizes = [10, 100, 1000]
    assert growth.exponent(sizes, [3.0 * size**2 for size in sizes]) == pytest.approx(2)
    assert growth.exponent(sizes, [0.5] * 3) == pytest.approx(0)


def test_filled_stores_hold_artifacts_that_are_described(tmp_path: Path) -> None:
    growth.fill(tmp_path, range(9))
    store = open_store(str(tmp_path))
    manifests = [*store.manifests()]
    assert len(manifests) == 9 and all(graph.describe(manifest) for manifest in manifests)
    assert sum(store.read_input(manifest, "input") is not None for manifest in manifests) == 6


@pytest.mark.faults
def test_every_command_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_ARTIFACTS", (3, 6))
    figures = growth.store(tmp_path, 1)
    assert {f"{name}_exponent" for name in growth._COMMANDS} <= figures.keys()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["moments_and_fid", "kid", "precision_and_recall"])
def test_every_metric_is_measured(name: str, tmp_path: Path) -> None:
    measured = growth.measure_metric(tmp_path, name, 1100)
    assert measured["seconds"] > 0 and measured["gigabytes"] > 0.01
