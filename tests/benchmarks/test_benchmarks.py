"""A short slice of every benchmark: that they run, and that their figures add up. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import tokenization


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
