"""systemd's units and the cron line: what they run, when, as which user, and that they never run twice at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from manifests import INFRA, cron_line, of_kind, unit

SERVICE = unit("enat-reevaluate.service")["Service"]
TIMER = unit("enat-reevaluate.timer")["Timer"]


def test_the_unit_has_its_own_user_can_write_only_its_folders_and_contains_no_secret() -> None:
    assert SERVICE["User"] == "enat" and SERVICE["Type"] == "oneshot"
    assert SERVICE["ProtectSystem"] == "strict" and SERVICE["NoNewPrivileges"] == "yes" and SERVICE["CapabilityBoundingSet"] == ""
    assert SERVICE["StateDirectory"] == "enat" and SERVICE["CacheDirectory"] == "enat"
    folders = [word.partition("=")[2] for word in SERVICE["ExecStart"].split() if word.startswith(("store=", "workspace="))]
    assert len(folders) == 2 and all(folder.startswith("/var/lib/enat") for folder in folders)  # the StateDirectory
    assert "SuccessExitStatus" not in SERVICE  # drift fails the unit
    assert SERVICE["EnvironmentFile"] == "/etc/enat/enat.env"
    assert "/etc/enat/enat.env" in (INFRA / "single-machine" / "enat.env.example").read_text()


def test_all_three_schedules_are_the_same() -> None:
    fields, user, _ = cron_line()
    (kubernetes,) = of_kind("CronJob")
    assert " ".join(fields) == kubernetes["spec"]["schedule"] == "0 3 * * 1"
    assert TIMER["OnCalendar"] == "Mon *-*-* 03:00:00 UTC" and TIMER["Persistent"] == "true"
    assert user == "enat"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    program = tmp_path / "enat"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = [tmp_path / "enat-reevaluate.service", tmp_path / "enat-reevaluate.timer"]
    for path in units:
        text = (INFRA / "single-machine" / path.name).read_text()
        path.write_text(text.replace("/opt/enat/.venv/bin/enat", str(program)))
    done = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr
    calendar = subprocess.run([analyze, "calendar", TIMER["OnCalendar"]], capture_output=True, text=True, timeout=60, check=False)
    assert calendar.returncode == 0 and "Next elapse: Mon" in calendar.stdout


def test_the_cron_line_runs_and_never_twice_at_the_same_time(tmp_path: Path) -> None:
    """The line itself, with other folders, and with a program in place of `enat` that writes down its arguments."""
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    state, etc, opt = (tmp_path / name for name in ("state", "etc", "opt"))
    program = opt / ".venv" / "bin" / "enat"
    for folder in (state, etc, program.parent):
        folder.mkdir(parents=True)
    (etc / "enat.env").write_text("MLFLOW_TRACKING_URI=http://tracking:5000\n")
    program.write_text('#!/bin/sh\necho "$MLFLOW_TRACKING_URI $*" >> ran\nwhile [ ! -e go ]; do sleep 0.05; done\n')
    program.chmod(0o755)
    command = cron_line()[2]
    for real, ours in (("/var/lib/enat", state), ("/etc/enat", etc), ("/opt/enat", opt)):
        command = command.replace(real, str(ours))

    def run() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["/bin/bash", "-c", command], env={"PATH": os.environ["PATH"]})

    first = run()
    try:
        deadline = time.monotonic() + 60
        while not (state / "ran").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run().wait(timeout=60) == 0  # finds the lock taken
    finally:
        (state / "go").touch()
    assert first.wait(timeout=60) == 0
    (line,) = (state / "ran").read_text().splitlines()
    assert line == f"http://tracking:5000 reevaluate --alias newest --older-than 30d store={state}/store workspace={state}"
    assert " ".join(line.split()[1:]).replace(str(state), "/var/lib/enat") == SERVICE["ExecStart"].partition(" ")[2]
