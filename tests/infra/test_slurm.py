"""The batch script of infra/slurm, with programs in place of Slurm's: two steps are two Ray nodes of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from manifests import INFRA, REPOSITORY

SCRIPT = INFRA / "slurm" / "enat.sbatch"
DIGITS = REPOSITORY / "configs" / "digits.yaml"
# Options of `sbatch` in its manual (25.05) that the script uses.
OPTIONS = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "requeue", "open-mode", "output",
    "signal",
}  # fmt: skip
SCONTROL = """#!/bin/bash
echo "$*" >> "$FAKE_LOG"
case "$1 $2" in
  "show hostnames") [[ $3 == "node[1-2]" ]] && printf 'node1\\nnode2\\n' ;;
  "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=$3 State=ALLOCATED" ;;
  "requeue "*) ;;
  *) exit 1 ;;
esac
"""
# Each node has its own number, as if both steps were on one node with two tasks: it chooses their ports and folders.
SRUN = """#!/bin/bash
echo "srun $*" >> "$FAKE_LOG"
while [[ $1 == --* ]]; do
  [[ $1 == --nodelist=node2 ]] && export SLURM_LOCALID=1
  shift
done
export SLURM_CPUS_ON_NODE=1 SLURM_LOCALID=${SLURM_LOCALID:-0}
exec "$@"
"""
RAY = """#!/bin/bash
exec "$REAL_RAY" "$@" --object-store-memory=80000000 --node-ip-address=127.0.0.1
"""
QUICK = ("tokenizer.recipe.num_steps=4", "tokenizer.execution.cpus_per_worker=1", "train.scores=null", "variants.untrained=null")


@dataclass
class Slurm:
    """folder: of the fakes, their log, and the run.   environment: of a job's batch shell."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "ray": RAY}.items():
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        around = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "SLURM_", "ENAT_"))}
        (self.folder / "tmp").mkdir()
        # The script puts the repository's environment first on the path; here the fake ray has to come before it.
        (self.folder / "repository" / ".venv").mkdir(parents=True)
        (self.folder / "repository" / ".venv" / "bin").symlink_to(self.folder / "bin")
        for name in ("infra", "configs"):
            (self.folder / "repository" / name).symlink_to(REPOSITORY / name)
        self.environment = around | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{around['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(self.folder / "tmp"),
            "FAKE_LOG": str(self.folder / "calls"),
            "REAL_RAY": str(Path(sys.executable).with_name("ray")),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_SUBMIT_DIR": str(self.folder / "repository"),
            "ENAT_PORTS": str(_twelve_ports()),
            "ENAT_NODES_SECONDS": "200",
            "ENAT_PROGRESS_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *overrides: str, config: Path = DIGITS, **variables: str) -> subprocess.Popen[bytes]:
        places = (f"store={self.folder}/store", f"workspace={self.folder}/runs", "tracking.enabled=false")
        with (self.folder / "out").open("ab") as out:
            return subprocess.Popen(
                ["bash", str(SCRIPT), str(config), *places, *overrides],
                env=self.environment | variables, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def remains(self) -> list[str]:
        """Processes of the job that still run."""
        return [process.info["name"] for process in psutil.process_iter(["name"]) if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("FAKE_LOG") == self.environment["FAKE_LOG"] and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def end(self) -> None:
        for process in psutil.process_iter():
            if self._is_ours(process):
                process.kill()


def _twelve_ports() -> int:
    """The first of twelve neighbouring ports that nobody uses now."""
    import socket

    for first in (port for port in range(21000, 32000, 12)):
        try:
            for port in range(first, first + 12):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="e-"))  # names of sockets are limited in length
    made = Slurm(folder)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], slurm: Slurm, seconds: float = 600) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(slurm.output[-4000:])


def _nothing_remains(slurm: Slurm) -> None:
    deadline = time.monotonic() + 30
    while remains := slurm.remains():
        assert time.monotonic() < deadline, remains
        time.sleep(0.2)
    assert [*(slurm.folder / "tmp").glob("enat-4711*")] == []


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_on_two_nodes_of_an_allocation(slurm: Slurm) -> None:
    process = slurm.start(*QUICK, "targets=[token_map]")
    assert _wait(process, slurm) == 0, slurm.output[-4000:]
    assert re.search(r"^Ray runs at 127\.0\.0\.1:\d+ on 2 nodes$", slurm.output, flags=re.MULTILINE)
    assert len([*(slurm.folder / "store" / "token_map").glob("*/manifest.json")]) == 1
    nodes = [(re.findall(r"--(?:nodes|nodelist)=(\S+)", call), "--head" in call) for call in slurm.calls if call.startswith("srun")]
    assert nodes == [(["1", "node1"], True), (["1", "node2"], False)]
    assert not [call for call in slurm.calls if call.startswith("requeue")]
    _nothing_remains(slurm)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_an_interrupted_run_is_queued_again_and_resumes(slurm: Slurm) -> None:
    """SIGTERM reaches the batch shell only, as with --signal=B:TERM@120. The second start is that of the queue."""
    training = (*QUICK, "targets=[train]", "train.num_steps=150", "train.execution={num_workers: 2, checkpoint_every: 1000}")
    process = slurm.start(*training)
    deadline = time.monotonic() + 600
    while not re.search(r"^  train [1-9]", slurm.output if (slurm.folder / "out").exists() else "", flags=re.MULTILINE):
        assert process.poll() is None and time.monotonic() < deadline, slurm.output[-4000:]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert _wait(process, slurm) == 130, slurm.output[-4000:]
    (step,) = re.findall(r"training stopped at step (\d+), which is saved", slurm.output)
    assert 1 <= int(step) < 150 and slurm.calls[-1] == "requeue 4711"
    assert "interrupted; job 4711 is queued again, and continues from its store" in slurm.output
    _nothing_remains(slurm)
    again = slurm.start(*training, SLURM_RESTART_COUNT="1")
    assert _wait(again, slurm) == 0, slurm.output[-4000:]
    assert f"training resumes from step {step} with 2 workers" in slurm.output
    (history,) = (slurm.folder / "store").glob("train/*/history.json")
    assert json.loads(history.read_text())[-1]["step"] == 150
    assert len([call for call in slurm.calls if call.startswith("requeue")]) == 1
    _nothing_remains(slurm)


@pytest.mark.slow
@pytest.mark.parametrize(("index", "code"), [pytest.param("1", 2, marks=pytest.mark.faults), ("7", 2)])
def test_a_run_that_is_refused_ends_with_its_exit_code_and_is_not_queued_again(slurm: Slurm, index: str, code: int) -> None:
    """Line 1 names a key that does not exist; there is no line 7."""
    sweep = slurm.folder / "sweep.txt"
    sweep.write_text("# two runs\ntrain.learning_rate=1e-3\n'train.no_such_key=1'\n")
    process = slurm.start(SLURM_ARRAY_TASK_ID=index, ENAT_SWEEP=str(sweep))
    assert _wait(process, slurm) == code, slurm.output
    reason = {"1": "no_such_key", "7": f"{sweep} has 2 lines, and none for index 7; use --array=0-1"}[index]
    assert reason in slurm.output and "requeue 4711" not in ("\n".join(slurm.calls) if (slurm.folder / "calls").exists() else "")
    _nothing_remains(slurm)


def _sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, INFRA / "slurm" / "sweep.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_each_index_of_an_array_is_a_variant_or_a_line(tmp_path: Path) -> None:
    from pipelines.run.loading import load_run

    sizes = REPOSITORY / "configs" / "imagenet256-sizes.yaml"
    whole = load_run(sizes, is_dataset_here=False)
    assert len(whole.variants) == 3
    for index, name in enumerate(whole.variants):
        overrides = _sweep(sizes, index).stdout.split("\0")[:-1]
        alone = load_run(sizes, overrides, is_dataset_here=False)
        assert alone.train == whole.variant_runs[name].train and alone.name == f"{whole.name}-{name}" and not alone.variants
    samplers = _sweep(REPOSITORY / "configs" / "digits-samplers.yaml", 0).stdout.split("\0")
    assert "name=digits-samplers-random" in samplers, "a variant of the base that is dropped is none of the array"
    lines = tmp_path / "sweep.txt"
    lines.write_text("# only a comment\n")
    assert "has no lines" in _sweep(sizes, 0, lines).stderr
    lines.write_text("# rates\nname=a train.learning_rate=1e-3\n\nname=b 'dataset={kind: digits}'\n")
    assert _sweep(sizes, 1, lines).stdout.split("\0") == ["name=b", "dataset={kind: digits}", ""]
    missing = _sweep(DIGITS, 5)
    assert missing.returncode == 2 and "has 1 variants, and none for index 5; set ENAT_SWEEP" in missing.stderr


def test_the_script_is_a_batch_script_that_shells_accept() -> None:
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert options.keys() == OPTIONS and text.startswith("#!/usr/bin/env bash\n")
    assert options["signal"] == "B:TERM@120" and options["open-mode"] == "append" and options["ntasks-per-node"] == "1"
    assert text.index("#SBATCH --signal") < text.index("set -euo pipefail"), "options after the first command are not read"
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    if (shellcheck := shutil.which("shellcheck")) is not None:
        done = subprocess.run([shellcheck, "--severity=warning", SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
