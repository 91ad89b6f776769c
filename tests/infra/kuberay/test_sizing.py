"""The sizes in the README of infra, computed again from the models and from the numbers of images."""

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
    rows = README.partition(f"| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _num_parameters(preset: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ENAT(ENATConfig.preset(preset, grid_size=16)).parameters())


def test_memory_of_training() -> None:
    rows = _table("model")
    assert [row[0] for row in rows] == ["ENAT-S", "ENAT-B", "ENAT-L", "ENAT-XL"]
    for name, millions, *sizes in rows:
        parameters = _num_parameters(name.lower())
        assert millions == f"{parameters / 1e6:.1f} M"
        weights = gradients = ema = master = parameters * PARAMETER
        moments = 2 * weights
        expected = [
            weights + gradients + moments + ema,
            weights + gradients + ema + (moments + master) / GPUS,
            weights + ema + (gradients + moments + master) / GPUS,
            ema + (weights + gradients + moments + master) / GPUS,
            weights + ema + moments,  # a checkpoint
            weights + ema,  # the finished model
        ]
        assert [float(cell) for cell in sizes] == pytest.approx([size / 1e9 for size in expected], abs=0.0051), name


def test_the_memory_measured_with_two_workers_is_that_of_the_benchmarks() -> None:
    """The README also gives the computed sizes for two workers."""
    measured, computed = re.findall(r"((?:\d\.\d\d, ){3}\d\.\d\d)", README)
    page = (INFRA.parent / "pipelines" / "guide" / "benchmarks.md").read_text()
    (line,) = [line for line in page.splitlines() if "ZeRO 0 / 1 / 2 / 3" in line]
    assert measured.replace(",", " /") in line
    gigabytes = [_num_parameters("enat-s") * size / 1e9 for size in (20, 12 + 12 / 2, 8 + 16 / 2, 4 + 20 / 2)]
    assert [float(value) for value in computed.split(", ")] == pytest.approx(gigabytes, abs=0.0051)


def test_storage_of_checkpoints() -> None:
    rows = {row[0]: row for row in _table("model")}
    whole, weights = float(rows["ENAT-L"][6]), float(rows["ENAT-L"][7])
    kept = TrainExecution().keep_last + 500_000 // 50_000
    at_the_end = re.search(r"(\d+) GB for ENAT-L at the end of training", README)
    artifact = re.search(r"ten sets of EMA weights \((\d+) GB\)", README)
    assert at_the_end is not None and artifact is not None and kept == 12
    assert int(at_the_end[1]) == pytest.approx(kept * whole, abs=0.6)
    assert int(artifact[1]) == pytest.approx(weights + 10 * weights / 2, abs=0.6)


def test_memory_of_token_maps() -> None:
    rows = _table("dataset")
    assert len(rows) == 3
    for name, images, codes, memory, parquet, more in rows:
        count, length = (int(cell.replace(",", "")) for cell in (images, codes))
        size = count * length * 2 * 2  # bytes of a code; image and mirror image
        assert float(memory.split()[0]) == pytest.approx(size / 1e9, abs=0.0051), name
        at_most = size * 10 / 16 + count * 60  # 1,024 codes need 10 of 16 bits; key, label and sha256 add 60 bytes
        assert float(parquet.split()[0]) == pytest.approx(at_most / 1e9, rel=0.15), name
        samples, captions = (
            re.search(r"50,000 samples: ([\d.]+) GB", more),
            re.search(r"features of ([\d,]+) captions: (\d+) GB", more),
        )
        assert samples or captions
        if samples:
            assert float(samples[1]) == pytest.approx(50_000 * length * 2 / 1e9, abs=0.0051)
        if captions:
            assert int(captions[2]) == pytest.approx(int(captions[1].replace(",", "")) * 77 * 768 * 2 / 1e9, abs=0.6)
