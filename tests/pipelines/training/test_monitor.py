"""Metrics of training: means over the groups of all ranks."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from enat.execution.peak import matmul_peak
from material.tiny_training import run_ranks
from pipelines.training.monitor import GroupRecord, first_not_finite, squared_distance, summarize, total_macs

CPU = torch.device("cpu")


def _values(*groups: tuple[float, float, float, bool, float]) -> np.ndarray:
    """One step of groups: loss, accuracy, mask ratio, whether reused, MACs."""
    return np.array([groups], dtype=float)


def test_row_is_means_over_groups_and_over_kinds_of_groups():
    row = summarize(_values((1.0, 0.1, 0.5, False, 7), (2.0, 0.2, 0.65, True, 7), (6.0, 0.6, 0.69, True, 7)))
    assert row == pytest.approx(
        {
            "loss": 3.0,
            "token_accuracy": 0.3,
            "fresh_loss": 1.0,
            "reuse_loss": 4.0,
            "loss_by_mask_ratio/0.0-0.6": 1.0,
            "loss_by_mask_ratio/0.6-0.7": 4.0,
        }
    )


def test_every_mask_ratio_has_one_bucket():
    buckets = {0.0: "0.0-0.6", 0.5999: "0.0-0.6", 0.6: "0.6-0.7", 0.7: "0.7-0.8", 0.85: "0.8-0.9", 0.9: "0.9-1.0", 1.0: "0.9-1.0"}
    for ratio, bucket in buckets.items():
        row = summarize(_values((2.5, 0.0, ratio, False, 0)))
        assert {name: value for name, value in row.items() if "ratio" in name} == {f"loss_by_mask_ratio/{bucket}": 2.5}


def test_steps_of_an_interval_count_alike():
    values = np.concatenate([_values((1.0, 0.0, 0.8, False, 1)), _values((3.0, 1.0, 0.8, False, 2))])
    assert summarize(values)["loss"] == 2.0 and summarize(values)["token_accuracy"] == 0.5 and total_macs(values) == 3.0


def test_loss_that_is_not_finite_is_found_with_its_groups():
    values = np.ones((4, 3, 5))
    assert first_not_finite(values) is None
    values[3, 0, 0] = math.nan
    values[2, 1:, 0] = math.inf, math.nan
    assert first_not_finite(values) == (2, [1, 2])
    values[0, 0, 1] = math.nan  # another metric is not the loss
    assert first_not_finite(values) == (2, [1, 2])


def _collect_of_rank():
    """Groups of steps 10 and 11, in any order; the second collection is empty."""
    record, rank = GroupRecord(3), dist.get_rank()
    for step in (11, 10):
        for group in ((1, 0), (2,))[rank]:
            measured = torch.tensor([step, group / 10])
            record.add(step, group, measured, mask_ratio=0.75, is_reuse=group == 1, macs=1e12 + step)
    return record.collect(10, 2, CPU), record.collect(12, 1, CPU)


def test_record_of_every_rank_has_the_groups_of_all():
    (first, empty), (second, _) = run_ranks(2, _collect_of_rank)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2, 3, 5) and first.dtype == np.float64 and not empty.any()
    for step, group in ((0, 0), (1, 1), (1, 2)):
        expected = [10 + step, group / 10, 0.75, group == 1, 1e12 + 10 + step]
        np.testing.assert_allclose(first[step, group], expected, rtol=1e-7)


def test_squared_distance_sums_over_pieces():
    weights = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    averaged = [weight * 1.1 for weight in weights]
    whole = squared_distance(averaged, weights)
    pieces = [squared_distance([mine], [other]) for mine, other in zip(averaged, weights, strict=True)]
    for place in range(2):
        assert sum(piece[place].item() for piece in pieces) == pytest.approx(whole[place].item())
    assert whole[1].item() == pytest.approx(169.0) and math.sqrt(whole[0] / whole[1]) == pytest.approx(0.1, rel=1e-5)


def test_device_peak_is_plausible():
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e8 < matmul_peak(CPU, dtype) < 1e15


@pytest.mark.slow
def test_memory_of_a_cpu_is_the_peak_of_the_process():
    """In a new process, whose peak is still low."""
    program = """if True:
        import torch
        from pipelines.cluster.device import peak_memory_gb
        before = peak_memory_gb("cpu")
        held = torch.ones(500_000_000, dtype=torch.uint8)
        del held
        print(before, peak_memory_gb("cpu"))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.05 < before < 5 and before + 0.2 < after < before + 0.55
