"""The development container: its file is JSON with documented properties, and what it runs exists."""

from __future__ import annotations

import json
import re
import shlex

from manifests import REPOSITORY, dockerfile_text
from what_runs import parse

FILE = REPOSITORY / ".devcontainer" / "devcontainer.json"
# Properties of containers.dev's reference that are used here.
PROPERTIES = {
    "name", "image", "hostRequirements", "containerEnv", "postCreateCommand", "postAttachCommand", "runArgs", "forwardPorts",
    "portsAttributes", "customizations",
}  # fmt: skip


def test_the_development_container_runs_what_exists() -> None:
    container = json.loads(FILE.read_text())
    assert container.keys() == PROPERTIES
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    make, target = shlex.split(container["postCreateCommand"])
    assert make == "make" and target in targets
    program, *words = shlex.split(container["postAttachCommand"])
    assert program == ".venv/bin/enat" and parse(words) is not None and (REPOSITORY / words[1]).is_file()
    assert {str(port) for port in container["forwardPorts"]} == container["portsAttributes"].keys()


def test_it_has_the_python_of_the_images() -> None:
    """`make setup` needs Python with venv; the images of the Dockerfile have another base, but the same version."""
    tag = json.loads(FILE.read_text())["image"].rpartition(":")[2]
    (version,) = re.findall(r"PYTHON_IMAGE=python:(\d+\.\d+)", dockerfile_text())
    assert re.fullmatch(rf"\d+-{re.escape(version)}-bookworm", tag)
