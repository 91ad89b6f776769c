"""A short run of every benchmark. The figures add up; no times are asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenization
import torch
import training
import training_loops
from click.testing import CliRunner

from enat.config import ENATConfig


@pytest.mark.faults
def test_the_measured_pipeline_makes_a_map_of_all_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    workload = tokenization._DECODER_BOUND
    measured = tokenization.run_pipeline(tmp_path, workload, 24)
    assert measured["seconds"] > 0 and measured["peak_bytes"] > 1e8, "Ray's processes alone take more"
    assert tokenization._plain_decoder(tmp_path, workload.config, 24) > 0
    assert tokenization._plain_encoder(tmp_path, workload.config, 16) > 0


def test_a_row_is_little_larger_than_the_entropy_of_its_codes(tmp_path: Path) -> None:
    size = tokenization.bytes_per_image(tmp_path)["bytes_per_image_on_disk_at_most"]
    assert 640 < size < 800


def test_the_reader_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenization, "_ROWS_PER_SHARD", 2000)
    figures = tokenization.reader(tmp_path, 4000)
    assert figures["reader_rows"] == 4000 and figures["reader_rows_per_second"] > 0 and figures["opening_seconds"] > 0


def test_the_compared_loops_compute_the_same() -> None:
    """In fresh and reusing steps: otherwise their ratio would be meaningless."""
    config = ENATConfig(encoder_layers=2, decoder_layers=2, embed_dim=32, num_heads=2, grid_size=4, codebook_size=32, num_classes=4)
    draws = training_loops.Draws(config, 4, "cpu")
    bare, *others = (
        make(training_loops.make_model(config, "cpu"), "fp32")
        for make in (training_loops.BareLoop, training_loops.ObviousLoop, training_loops.PublishedLikeLoop)
    )
    for step in range(6):
        loss = bare.step(*draws.group(step)).item()
        assert [other.step(*draws.group(step)).item() for other in others] == pytest.approx([loss] * 2, rel=1e-5)
    for other in others:
        torch.testing.assert_close(other.ema.state_dict(), bare.ema.state_dict(), rtol=0, atol=1e-5)


@pytest.mark.faults
def test_the_pipeline_is_measured_on_the_groups_of_the_bare_loop(tmp_path: Path) -> None:
    figures = training.overhead(tmp_path, training.Machine("enat-s", "cpu", "fp32", 0, 4, 16), 1, turns=1)
    assert figures["pipeline_over_bare"] > 0 and 0 <= figures["data_wait_share"] < 1
    assert ("pipeline_over_bare_with_a_core_left" in figures) == ((os.cpu_count() or 1) > 1)


def test_runs_of_training_use_the_device_and_precision_of_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one GPU, runs of two workers are left out, and the figures state it."""
    calls: list[tuple[str, list[Any]]] = []

    def note(file: str, function: str, place: Path, *arguments: Any) -> Any:
        calls.append((function, json.loads(json.dumps(arguments))))
        if function == "bare":
            return 1.0
        return dict.fromkeys(("step_seconds", "data_wait_share", "images_per_second", "memory_gb"), 1.0)

    monkeypatch.setattr(training, "in_process", note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of a test")
    for num_gpus, is_left_out in ((1, True), (2, False)):
        calls.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        output = CliRunner().invoke(training.main, ["--json"], catch_exceptions=False).stdout
        figures = json.loads(output)
        assert (figures["device"], figures["precision"], figures["model"]) == (f"{num_gpus} x GPU of a test", "bf16", "enat-l")
        assert ("not measured: 2 workers need a GPU each" in str(figures["two_workers_over_one"])) is is_left_out
        configs = [training._config(arguments[0]) for function, arguments in calls if function in ("bare", "pipeline")]
        assert all(config.execution.device == "cuda" and config.precision == "bf16" for config in configs)
        assert all(config.model.preset == "enat-l" and config.group_size == 128 for config in configs)
        assert max(config.execution.num_workers for config in configs) == num_gpus
        (loops,) = [arguments[0] for function, arguments in calls if function == "loops"]
        assert (loops["preset"], loops["device"], loops["precision"]) == ("enat-l", "cuda", "bf16")


_WITHOUT_PIPELINE = """
import importlib.util, json, sys
absent = {"ray", "pyarrow", "deepspeed", "mlflow", "safetensors", "pipelines"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
own = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in absent else own(name, package)
import torch
torch.set_num_threads(1)
import training_loops, sampling_loops
from enat.config import ENATConfig
tiny = dict(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2, grid_size=4, codebook_size=16, num_classes=4)
ENATConfig.preset = classmethod(lambda cls, name, **given: cls(**tiny))
training = training_loops.compare("tiny", group_size=2, num_steps=1, device="cpu", precision="fp32", compiled=False)
sampling = sampling_loops.measure("tiny", batch_size=2, device="cpu", precision="fp32", num_rounds=1, compiled=False)
print(json.dumps([sorted(training), sorted(sampling)]))
"""


@pytest.mark.faults
def test_the_loops_run_where_only_the_method_is_installed() -> None:
    """As on a GPU machine with torch alone."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PIPELINE], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr
    training_figures, sampling_figures = json.loads(process.stdout.splitlines()[-1])
    assert any("seconds_per_step" in name for name in training_figures)
    assert "matmul_tflops" in sampling_figures and not any("50k" in name for name in sampling_figures)
