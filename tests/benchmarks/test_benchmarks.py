"""A short slice of every benchmark: that they run, and that their figures add up. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenization
import torch
import training
import training_loops

from enat import ENATConfig


@pytest.mark.faults
def test_the_pipeline_under_measurement_makes_a_map_of_all_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    workload = tokenization._DECODER_BOUND
    measured = tokenization._run_pipeline(tmp_path, workload, 24)
    assert measured["seconds"] > 0 and measured["peak_bytes"] > 1e8, "Ray's processes alone take more"
    assert tokenization._plain_decoder(tmp_path, workload.config, 24) > 0
    assert tokenization._plain_encoder(tmp_path, workload.config, 16) > 0


def test_a_row_takes_little_more_than_its_codes_entropy(tmp_path: Path) -> None:
    size = tokenization.bytes_per_image(tmp_path)["bytes_per_image_on_disk_at_most"]
    assert 640 < size < 800


def test_the_reader_reads() -> None:
    assert tokenization.reader(10_000)["reader_rows_per_second"] > 0


def test_the_loops_that_are_compared_compute_the_same() -> None:
    """Fresh and reusing steps; else their ratio would say nothing."""
    config = ENATConfig(encoder_layers=2, decoder_layers=2, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    draws = training_loops.Draws(config, 4, "cpu")
    obvious = training_loops.ObviousLoop(training_loops.make_model(config, "cpu"), "fp32")
    bare = training_loops.BareLoop(training_loops.make_model(config, "cpu"), "fp32")
    for step in range(6):
        assert obvious.step(*draws.group(step)).item() == pytest.approx(bare.step(*draws.group(step)).item(), rel=1e-5)
    torch.testing.assert_close(obvious.ema.state_dict(), bare.ema.state_dict(), rtol=0, atol=1e-5)


@pytest.mark.faults
def test_the_pipeline_is_measured_on_the_groups_of_the_bare_loop(tmp_path: Path) -> None:
    figures = training.overhead(tmp_path, "enat-s", 1, turns=1)
    assert figures["pipeline_over_bare"] > 0 and 0 <= figures["data_wait_share"] < 1
