"""The commands of the guide that take minutes, one after the other in one folder, as a reader runs them after the demo.

They run as written, with values for a short training and few samples appended, against a bucket and a tracking server that the test
starts. What needs ImageNet, published weights, a hub or a cluster that takes jobs is left out, with its reason in
test_guide_commands.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_guide_commands import LONG, with_keys

from material.digits_run import ENAT, REPOSITORY, TINY_DIGITS, fresh_environment
from services.mlflow_server import mlflow_server

_SAMPLES = "enat sample train/3f2a -n 40 --no-gif --no-steps -o other"  # own-samples.md evaluates them
_SHORT_SEARCH = ("search.num_trials=4", "search.batch_size=2", "search.num_rungs=1", "search.heldout_replicates=2")
_ORDER = ("--fresh", "^enat run .*(store=|train.num_steps)", "^enat run(?!.*preset)", "^enat search", "^enat run", "")
_SECONDS = 900  # of one command, on a machine with other work


def _rank(command: str) -> int:
    """First the models of the demo alone, then runs, then what reads them."""
    return next(number for number, pattern in enumerate(_ORDER) if re.search(pattern, command))


def _shortened(command: str) -> list[str]:
    arguments = shlex.split(command)[1:]
    if arguments[0] in {"run", "search", "evaluate", "reevaluate"}:
        arguments += TINY_DIGITS
    return [*arguments, *_SHORT_SEARCH] if arguments[0] == "search" else arguments


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_the_runs_of_the_guide_succeed(digits_run, make_bucket: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(digits_run.workspace, tmp_path / "runs")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "server").mkdir()
    bucket, failures = make_bucket("enat"), []
    with mlflow_server(tmp_path / "server") as server:
        for command in (_SAMPLES, *sorted(LONG, key=_rank)):
            here = with_keys(command, digits_run).replace("enat-s-digits@", "enat-2.0m-4e1d-digits@")
            here = here.replace("s3://bucket/enat", bucket.uri).replace("http://HOST:5000", server)
            ended = subprocess.run(
                [str(ENAT), *_shortened(here)],
                cwd=tmp_path,
                env=fresh_environment(),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            if ended.returncode:
                failures.append(f"{command}: exit code {ended.returncode}\n{ended.stdout[-1500:]}\n{ended.stderr[-1500:]}")
    assert not failures, "\n\n".join(failures)
