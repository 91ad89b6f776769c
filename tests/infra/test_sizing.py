"""The README's sizes, computed again: from the models themselves, and from what a dataset is."""

from __future__ import annotations

import re

import pytest
import torch
from manifests import INFRA

from enat.config import ENATConfig
from enat.model import ENAT
from pipelines.training.config import TrainExecution

README = (INFRA / "README.md").read_text()
GPUS = 8
PARAMETER = 4  # bytes


def _table(first_column: str) -> list[list[str]]:
    lines = README.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("row", _table("model"), ids=lambda row: row[0])
def test_memory_of_training(row: list[str]) -> None:
    name, millions, *zero, checkpoint, finished = row
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in ENAT(ENATConfig.preset(name.lower(), grid_size=16)).parameters())
    assert millions == f"{parameters / 1e6:.1f} M"
    weights = gradients = ema = master = parameters * PARAMETER
    moments = 2 * weights
    expected = [
        weights + gradients + moments + ema,
        weights + gradients + ema + (moments + master) / GPUS,
        weights + ema + (gradients + moments + master) / GPUS,
        ema + (weights + gradients + moments + master) / GPUS,
    ]
    assert [float(cell) for cell in zero] == pytest.approx([size / 1e9 for size in expected], abs=0.0051)
    assert float(checkpoint) == pytest.approx((weights + ema + moments) / 1e9, abs=0.0051)
    assert float(finished) == pytest.approx((weights + ema) / 1e9, abs=0.0051)


def test_the_measured_memory_of_two_workers_is_that_of_the_benchmarks() -> None:
    """And beside it the sum for two workers."""
    measured, computed = re.findall(r"((?:\d\.\d\d, ){3}\d\.\d\d)", README)
    (line,) = [line for line in (INFRA.parent / "pipelines" / "guide" / "benchmarks.md").read_text().splitlines() if "ZeRO 0 / 1 / 2 / 3" in line]
    assert measured.replace(",", " /") in line
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in ENAT(ENATConfig.preset("enat-s", grid_size=16)).parameters())
    sums = [20, 12 + 12 / 2, 8 + 16 / 2, 4 + 20 / 2]
    assert [float(value) for value in computed.split(", ")] == pytest.approx([parameters * each / 1e9 for each in sums], abs=0.0051)


def test_storage_of_a_training() -> None:
    rows = {row[0]: row for row in _table("model")}
    whole, weights = float(rows["ENAT-L"][6]), float(rows["ENAT-L"][7])
    kept = TrainExecution().keep_last + 500_000 // 50_000
    at_the_end = re.search(r"(\d+) GB for ENAT-L at the end of training", README)
    artifact = re.search(r"ten of EMA weights \((\d+) GB\)", README)
    assert at_the_end is not None and artifact is not None and kept == 12
    assert int(at_the_end[1]) == pytest.approx(kept * whole, abs=0.6)
    assert int(artifact[1]) == pytest.approx(weights + 10 * weights / 2, abs=0.6)


@pytest.mark.parametrize("row", _table("dataset"), ids=lambda row: row[0])
def test_memory_of_token_maps(row: list[str]) -> None:
    _, images, codes, memory, parquet, besides = row
    count, length = (int(cell.replace(",", "")) for cell in (images, codes))
    size = count * length * 2 * 2  # bytes of a code; image and mirror image
    assert float(memory.split()[0]) == pytest.approx(size / 1e9, abs=0.0051)
    drawn_evenly = size * 10 / 16 + count * 60  # 10 bits of 16 are needed for 1,024 codes; key, label and sha256 beside them
    assert float(parquet.split()[0]) == pytest.approx(drawn_evenly / 1e9, rel=0.15)
    if samples := re.search(r"50,000 samples: ([\d.]+) GB", besides):
        assert float(samples[1]) == pytest.approx(50_000 * length * 2 / 1e9, abs=0.0051)
    if captions := re.search(r"features of ([\d,]+) captions: (\d+) GB", besides):
        assert int(captions[2]) == pytest.approx(int(captions[1].replace(",", "")) * 77 * 768 * 2 / 1e9, abs=0.6)
