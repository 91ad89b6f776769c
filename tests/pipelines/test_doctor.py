"""Findings of `enat doctor` in good and bad environments."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from material.layouts import write
from pipelines import doctor
from pipelines.cli.main import commands
from pipelines.run.config import RunConfig
from pipelines.workflow import config as configuration


@pytest.fixture(autouse=True)
def _without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examine(tmp_path: Path) -> Callable[..., dict[str, doctor.Finding]]:
    """The last finding of each check."""

    def examine(*overrides: str) -> dict[str, doctor.Finding]:
        values = ("name=it", "dataset.kind=digits", f"workspace={tmp_path / 'runs'}", *overrides)
        run = configuration.load_config(RunConfig, None, values)
        return {finding.what: finding for finding in doctor.examine(run)}

    return examine


def test_all_findings_of_a_good_machine_are_good(examine: Callable[..., Any]) -> None:
    found = examine()
    assert list(found) == ["Python", "packages", "devices", "disk", "Ray", "store", "tracking", "dataset"]
    assert {finding.state for finding in found.values()} == {doctor.GOOD}
    assert "torch 2.13" in found["packages"].detail and "local cluster" in found["Ray"].detail


def test_a_problem_is_reported_with_advice_and_other_checks_still_run(examine: Callable[..., Any]) -> None:
    for override, what, named in (
        ("store=/proc/nothing/store", "store", "/proc/nothing"),
        ("cluster.address=127.0.0.1:1", "Ray", "127.0.0.1:1"),
        ("tracking.uri=http://127.0.0.1:1", "tracking", "127.0.0.1"),
        ("token_map.execution={num_workers: 900}", "room", "token_map.execution asks for 900 CPUs"),
        ("dataset={kind: images, path: nowhere}", "dataset", "nowhere"),
        ("dataset={kind: coco, path: ., captions: nowhere.json}", "dataset", "nowhere.json"),
        ("tokenizer.weights=nowhere.ckpt", "weights", "tokenizer.weights is nowhere.ckpt"),
    ):
        found = examine(override)
        assert found[what].state == doctor.BAD and named in found[what].detail and found[what].advice
        assert all(finding.state != doctor.BAD for name, finding in found.items() if name != what)


def test_a_machine_is_examined_without_a_dataset_and_a_run_is_not(tmp_path: Path) -> None:
    run = configuration.load_config(RunConfig, None, ("name=it", f"workspace={tmp_path / 'runs'}"))
    assert "dataset" not in {finding.what for finding in doctor.examine(run, is_of_run=False)}
    (found,) = (finding for finding in doctor.examine(run) if finding.what == "dataset")
    assert found.state == doctor.BAD and "`enat init FOLDER`" in found.detail


def test_splits_are_listed_and_one_must_be_chosen(examine: Callable[..., Any], tmp_path: Path) -> None:
    for name in (
        "tar/train-0.tar",
        "tar/train-1.tar",
        "tar/val-0.tar",
        "plain/a.tar",
        "images/train/c/a.jpg",
        "images/val/c/a.jpg",
    ):
        write(tmp_path / name, b"")

    def of(kind: str, folder: str, **values: str) -> doctor.Finding:
        return examine(f"dataset={json.dumps({'kind': kind, 'path': str(tmp_path / folder), **values})}")["dataset"]

    both = "train (2 files), validation (1 file)"
    assert f"{both}, of which train (2 files) is read" in of("tar", "tar", split="train").detail
    assert f"{both}, of which validation (1 file) is read" in of("tar", "tar/val-*.tar").detail
    assert "train, val, of which val is read" in of("image_folder", "images", split="validation").detail
    assert of("tar", "plain").detail == f"tar, {tmp_path / 'plain'}"
    for kind, folder, named in (("tar", "tar", both), ("image_folder", "images", "train, val"), ("images", "images", "train, val")):
        finding = of(kind, folder)
        assert finding.state == doctor.BAD and named in finding.detail and "dataset.split" in finding.detail


def test_problems_of_some_runs_are_warnings(examine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e9, "total": 1e8}))
    found = examine("tracking.enabled=false", "reference.extractor=inception")
    for what in ("disk", "shared memory", "tracking", "weights"):
        assert found[what].state == doctor.WARNING and found[what].advice


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        ("echo 575.57.08", "bad", "the GPU driver 575.57.08 is too old"),
        ("echo 580.95.05; echo 580.95.05", "warning", "a GPU driver (580.95.05) is installed, but torch finds no GPU"),
        ("echo NVIDIA-SMI has failed; exit 9", "warning", "a GPU driver (version unknown) is installed"),
    ],
)
def test_the_gpu_driver_is_compared_with_what_torch_needs(
    answer: str, state: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_num_gpus", lambda: 0)
    (finding,) = doctor._devices()
    assert (finding.state, finding.detail[: len(detail)]) == (state, detail)


def test_a_package_of_another_version_is_reported(examine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0.0" if name == "pyarrow" else genuine(name))
    found = examine()["packages"]
    assert found.state == doctor.BAD and "pyarrow is 1.0.0, but ==25.* is required" in found.detail


@pytest.mark.parametrize(("overrides", "code"), [((), 0), (("tokenizer.weights=nowhere.ckpt",), 1)])
def test_the_exit_code_is_1_if_a_finding_is_bad(tmp_path: Path, overrides: tuple[str, ...], code: int) -> None:
    arguments = ["doctor", f"workspace={tmp_path / 'runs'}", *overrides]
    shown = CliRunner().invoke(commands, arguments)
    assert shown.exit_code == code and "✓ Python" in shown.output and ("✗ weights" in shown.output) is (code == 1)
    machine = CliRunner().invoke(commands, [*arguments, "--json"])
    assert machine.exit_code == code
    assert {finding["what"] for finding in json.loads(machine.stdout)} >= {"Python", "store"}
