"""Shared by the tests of infra/: its files, parsed, and the commands and variables that they contain."""

from __future__ import annotations

import configparser
import json
import pickle
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
IN_IMAGE = "/opt/enat"  # the repository in the image
PAGES = [INFRA / "README.md", REPOSITORY / "README.md", *sorted((REPOSITORY / "pipelines" / "guide").glob("*.md"))]
KUBERAY = sorted([*(INFRA / "kuberay").glob("*.yaml"), *(INFRA / "kuberay" / "jobs").glob("*.yaml")])
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|USERNAME|ROOT_USER")
_NOT_SECRET = {"automountServiceAccountToken"}


@cache
def _parsed(path: Path) -> bytes:
    return pickle.dumps([document for document in yaml.load_all(path.read_text(), yaml.CSafeLoader) if document])


def documents(path: Path) -> list[dict[str, Any]]:
    """A copy for each caller, which may change it."""
    found: list[dict[str, Any]] = pickle.loads(_parsed(path))
    return found


def resources() -> list[tuple[Path, dict[str, Any]]]:
    """All of KubeRay's manifests, without the kustomizations."""
    found = [(path, document) for path in KUBERAY for document in documents(path)]
    return [(path, document) for path, document in found if document["kind"] != "Kustomization"]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for _, document in resources() if document["kind"] == kind]


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the template of every pod that a manifest describes."""
    for _, document in resources():
        name, spec = document["metadata"]["name"], document.get("spec", {})
        match document["kind"]:
            case "RayCluster":
                yield f"{name} head", spec["headGroupSpec"]["template"]
                for group in spec["workerGroupSpecs"]:
                    yield f"{name} {group['groupName']}", group["template"]
            case "RayJob":
                yield f"{name} submitter", spec["submitterPodTemplate"]
            case "CronJob":
                yield name, spec["jobTemplate"]["spec"]["template"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, template in pod_templates():
        for container in template["spec"]["containers"]:
            yield f"{name}: {container['name']}", container


def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def filled(text: str) -> str:
    """Replace ${NAME:-default} by its default, as compose does."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def unit(name: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read(INFRA / "single-machine" / name)
    return parsed


def cron_line() -> tuple[list[str], str, str]:
    """The five fields of the schedule, the user, and the command."""
    lines = (INFRA / "single-machine" / "enat-reevaluate.cron").read_text().splitlines()
    (line,) = [line for line in lines if re.match(r"[\d*]", line)]
    *fields, user, command = line.split(maxsplit=6)
    return fields, user, command


def enat_commands() -> list[tuple[str, list[str]]]:
    """The place and the arguments of every `enat ...` that a manifest, a unit or a page runs."""
    found = [(f"RayJob {job['metadata']['name']}", shlex.split(job["spec"]["entrypoint"])) for job in of_kind("RayJob")]
    for name, container in containers():
        words = [*container.get("command", []), *container.get("args", [])]
        if "enat" in words:
            found.append((name, words[words.index("enat") :]))
    found.append(("systemd", shlex.split(unit("enat-reevaluate.service")["Service"]["ExecStart"])))
    command = cron_line()[2]
    found.append(("cron", shlex.split(command[command.index(f"{IN_IMAGE}/.venv/bin/enat") :])))
    for name, service in compose()["services"].items():
        if service.get("command", [""])[0] == "enat":
            found.append((f"compose {name}", service["command"]))
    found += [("Dockerfile", json.loads(rest)) for instruction, rest in stages()["enat"] if instruction == "CMD"]
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|| -- ", line):
                    words = shlex.split(part, comments=True)
                    if words and words[0] == "enat":
                        found.append((page.name, words))
    return [(place, words[1:]) for place, words in found]


def dockerfile_text() -> str:
    return (INFRA / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(FROM, "python:3 AS base"), ... of the Dockerfile, with continued lines joined and without comments."""
    lines = [line for line in dockerfile_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name -> instructions of the stage. Instructions before the first FROM are under ""."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    current = ""
    for instruction, rest in instructions():
        if instruction == "FROM":
            current = rest.rpartition(" AS ")[2]
            found[current] = [(instruction, rest)]
        else:
            found[current].append((instruction, rest))
    return found


def environment() -> dict[str, set[str]]:
    """Variable name -> the manifests that set it."""
    found: dict[str, set[str]] = {}

    def note(place: str, names: Any) -> None:
        for name in names:
            found.setdefault(name, set()).add(place)

    for name, service in compose()["services"].items():
        note(f"compose {name}", service.get("environment", {}))
    for name, container in containers():
        note(name, [variable["name"] for variable in container.get("env", [])])
    for document in of_kind("ConfigMap"):
        note(document["metadata"]["name"], document["data"])
    for document in of_kind("Secret"):
        note(document["metadata"]["name"], document["stringData"])
    for path in (INFRA / ".env.example", INFRA / "single-machine" / "enat.env.example"):
        note(path.name, re.findall(r"^(\w+)=", path.read_text(), flags=re.MULTILINE))
    note("systemd", re.findall(r"(\w+)=", unit("enat-reevaluate.service")["Service"]["Environment"]))
    for instruction, rest in instructions():
        if instruction == "ENV":
            note("Dockerfile", re.findall(r"(?:^|\s)(\w+)=", rest))
    return found


def secret_values(path: Path) -> list[str]:
    """Lines of a file that give a secret a literal value: not empty, not a variable, and not a reference."""
    lines = []
    for line in path.read_text().splitlines():
        match = re.match(r"""\s*(?:-\s*)?["']?(\w+)["']?\s*[:=]\s*(.*?)\s*(#.*)?$""", line)
        if match and SECRET.search(match[1].upper()) and match[1] not in _NOT_SECRET:
            value = match[2].strip("\"'")
            if value not in {"", "null"} and not value.startswith(("${", "$(", "{", "&", "*")):
                lines.append(line.strip())
    return lines
