"""What the doctor says of good and bad surroundings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipelines import doctor
from pipelines.cli.main import commands
from pipelines.run.config import RunConfig
from pipelines.workflow import config as configuration


@pytest.fixture(autouse=True)
def _without_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examine(tmp_path: Path) -> Callable[..., dict[str, doctor.Finding]]:
    """Findings by what they are of; the last one of each."""

    def examine(*overrides: str) -> dict[str, doctor.Finding]:
        run = configuration.load_config(RunConfig, None, ("name=it", f"workspace={tmp_path / 'runs'}", *overrides))
        return {finding.what: finding for finding in doctor.examine(run)}

    return examine


def test_where_all_is_well_nothing_stands_in_the_way(examine: Callable[..., Any]) -> None:
    found = examine()
    assert list(found) == ["Python", "packages", "devices", "disk", "Ray", "store", "tracking", "dataset"]
    assert {finding.state for finding in found.values()} == {doctor.GOOD}
    assert "torch 2.13" in found["packages"].said and "local cluster" in found["Ray"].said


@pytest.mark.parametrize(
    ("override", "what", "said"),
    [
        ("store=/proc/nothing/store", "store", "/proc/nothing"),
        ("cluster.address=127.0.0.1:1", "Ray", "there is no Ray cluster at 127.0.0.1:1"),
        ("tracking.uri=http://127.0.0.1:1", "tracking", "127.0.0.1"),
        ("token_map.execution={num_workers: 900}", "room", "token_map.execution asks for 900 CPUs"),
        ("dataset={kind: images, path: nowhere}", "dataset", "nowhere"),
        ("dataset={kind: coco, path: ., captions: nowhere.json}", "dataset", "nowhere.json"),
        ("tokenizer.weights=nowhere.ckpt", "weights", "tokenizer.weights names nowhere.ckpt, which is not there"),
    ],
)
def test_what_stands_in_the_way_is_named_with_what_to_do(examine: Callable[..., Any], override: str, what: str, said: str) -> None:
    found = examine(override)
    assert found[what].state == doctor.BAD and said in found[what].said and found[what].advice
    assert all(finding.state != doctor.BAD for name, finding in found.items() if name != what), "the others are still looked at"


def test_what_affects_some_runs_is_a_warning(examine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e9, "total": 1e8}))
    found = examine("tracking.enabled=false", "reference.extractor=inception")
    for what in ("disk", "shared memory", "tracking", "weights"):
        assert found[what].state == doctor.WARNING and found[what].advice


def test_a_package_of_another_version_is_named(examine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0.0" if name == "pyarrow" else genuine(name))
    found = examine()["packages"]
    assert found.state == doctor.BAD and "pyarrow is 1.0.0, needed ==25.*" in found.said


@pytest.mark.parametrize(("overrides", "code"), [((), 0), (("tokenizer.weights=nowhere.ckpt",), 1)])
def test_the_command_tells_by_its_exit_code(tmp_path: Path, overrides: tuple[str, ...], code: int) -> None:
    arguments = ["doctor", f"workspace={tmp_path / 'runs'}", *overrides]
    shown = CliRunner().invoke(commands, arguments)
    assert shown.exit_code == code and "✓ Python" in shown.output and ("✗ weights" in shown.output) is (code == 1)
    told = CliRunner().invoke(commands, [*arguments, "--json"])
    assert told.exit_code == code
    assert {finding["what"] for finding in json.loads(told.stdout)} >= {"Python", "store"}
