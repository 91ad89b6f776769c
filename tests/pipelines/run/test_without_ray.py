"""Small runs do without Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from material.digits_run import DIGITS, fresh_environment
from pipelines.cluster import connection
from pipelines.run import graph, prediction
from pipelines.run.loading import load_run
from pipelines.workflow import driver

_CHANGED = "generate.sampler.num_steps=3"
_RUN = """
import sys
from pipelines.run import prediction
prediction._SMALL_SECONDS = 1e9  # whatever else this machine does
from pipelines.cli.main import main
main()
print("Ray was imported" if "ray" in sys.modules else "Ray was not imported")
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((_CHANGED,), True),
        ((), False),
        (("generate.num_samples=9000000",), False),
        (("train.num_steps=21",), False),
        ((_CHANGED, "cluster.address=127.0.0.1:6379"), False),
        ((_CHANGED, "generate.execution.gpus_per_worker=1"), False),
        ((_CHANGED, "generate.execution.num_workers=all"), False),
    ],
    ids=str,
)
def test_only_a_small_run_on_this_machine_does_without(
    digits_run, overrides: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "is_connected", lambda: False)
    monkeypatch.setattr(prediction, "_SMALL_SECONDS", 1000.0)  # whatever else this machine did when the run was measured
    run = load_run(DIGITS, (*digits_run.overrides, f"workspace={digits_run.workspace}", *overrides))
    planned = [*driver.plan(graph.build(run), digits_run.store)]
    assert prediction.does_without_ray(run, planned, digits_run.store) == expected
    assert not prediction.does_without_ray(run, planned, digits_run.store, num_alike=10**6), "many small ones are not small"


def _enat(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _RUN, *map(str, arguments)]
    return subprocess.run(command, env=fresh_environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_a_changed_sampler_is_computed_and_scored_without_ray(digits_run, tmp_path: Path) -> None:
    shutil.copytree(digits_run.workspace / "store", tmp_path / "store", copy_function=os.link)
    done = _enat("run", DIGITS, *digits_run.overrides, f"workspace={tmp_path}", _CHANGED, "tracking.enabled=false")
    assert (done.returncode, done.stderr) == (0, "")
    made = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("✓") and "made in" in line]
    assert made == [*(f"{stage}{of}" for of in ("", "@untrained") for stage in ("generate", "memorization", "evaluate")), "report"]
    assert done.stdout.splitlines()[-1] == "Ray was not imported"


@pytest.mark.slow
def test_a_registered_model_is_sampled_and_scored_again_without_ray(digits_run, tmp_path: Path) -> None:
    shutil.copytree(digits_run.workspace / "store", tmp_path / "store", copy_function=os.link)
    shutil.copyfile(digits_run.workspace / "mlflow.db", tmp_path / "mlflow.db")
    done = _enat("reevaluate", "--fresh", f"workspace={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "computed again, nothing moved" in done.stdout
    assert done.stdout.splitlines()[-1] == "Ray was not imported"
