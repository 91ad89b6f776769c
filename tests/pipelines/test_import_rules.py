"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import importlinter.configuration
import pytest
from importlinter.application import use_cases

REPOSITORY = Path(__file__).parents[2]


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_import_contracts_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Not through importlinter.cli, which would switch off the loggers of this process."""
    importlinter.configuration.configure()
    is_kept = use_cases.lint_imports(config_filename=str(REPOSITORY / "pyproject.toml"), cache_dir=None)
    printed = capsys.readouterr().out
    assert is_kept, printed
    assert "0 broken" in printed


# Each of these takes a few tenths of a second to import, or more.
HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "plotly",
    "deepspeed",
    "boto3",
    "transformers",
    "torch_fidelity",
)
LIBRARIES = (*HEAVY, "numpy", "pyarrow", "omegaconf", "PIL", "safetensors", "jinja2")


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import pipelines.cli.main", (*LIBRARIES, "rich")),
        ("from pipelines.cli.main import commands; commands.main(['--help'], standalone_mode=False)", (*LIBRARIES, "rich")),
        (
            "from pipelines.cli.main import commands; "
            f"commands.main(['plan', {str(REPOSITORY / 'configs/digits.yaml')!r}], standalone_mode=False)",
            (*HEAVY, "jinja2"),
        ),
        ("import pipelines.artifacts.open", (*LIBRARIES, "click")),
        ("import pipelines.tracking.run, pipelines.cluster.connection, pipelines.workflow.config", (*HEAVY, "numpy", "pyarrow")),
        ("import enat.config, enat.cost, enat.sampler_config", HEAVY),
    ],
)
def test_light_modules_import_nothing_heavy(code: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    process = _python(f"{code}; import sys; print([name for name in {unwanted!r} if name in sys.modules])", tmp_path)
    assert process.stdout.splitlines()[-1:] == ["[]"], (process.stdout, process.stderr)


@pytest.mark.slow
def test_imports_have_no_side_effects(tmp_path: Path) -> None:
    code = """
import importlib, os, pkgutil, threading
from pipelines.cluster import connection
connection.prepare_environment()
import enat, pipelines
for package in (enat, pipelines):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import ray
assert not ray.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
"""
    process = _python(code, tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
