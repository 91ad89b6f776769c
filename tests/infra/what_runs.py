"""The commands in the files of infra/, by place: containers, health checks, probes, jobs, units, cron."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click
from manifests import INFRA, compose, containers, cron_line, of_kind, pod_templates, stages, unit

from pipelines.cli.main import commands

Words = list[str]


def what_runs() -> dict[str, Words]:
    """Place -> words of the command. An HTTP probe is ["GET", port, path]."""
    found = [*_of_the_dockerfile(), *_of_compose(), *_of_pods(), *_of_one_machine()]
    found += [(f"RayJob {job['metadata']['name']}", ["bash", "-c", job["spec"]["entrypoint"]]) for job in of_kind("RayJob")]
    assert len({place for place, _ in found}) == len(found)
    return dict(found)


def _of_the_dockerfile() -> Iterator[tuple[str, Words]]:
    for stage, instructions in stages().items():
        for instruction, rest in instructions:
            if instruction in {"CMD", "ENTRYPOINT"}:
                yield f"Dockerfile {stage} {instruction}", json.loads(rest)
            elif instruction == "HEALTHCHECK" and rest != "NONE":
                yield f"Dockerfile {stage} {instruction}", json.loads(rest.partition(" CMD ")[2])


def _of_compose() -> Iterator[tuple[str, Words]]:
    for name, service in compose()["services"].items():
        for key in ("command", "entrypoint"):
            if key in service:
                yield f"compose {name}" if key == "command" else f"compose {name} {key}", service[key]
        check = service.get("healthcheck", {})
        if not check.get("disable") and "test" in check:
            kind, *words = check["test"]
            assert kind == "CMD"
            yield f"compose {name} healthcheck", words
        for hook in ("post_start", "pre_stop"):
            for number, step in enumerate(service.get(hook, [])):
                yield f"compose {name} {hook} {number}", step["command"]


def _of_pods() -> Iterator[tuple[str, Words]]:
    inits = [
        (f"{name}: {container['name']}", container)
        for name, template in pod_templates()
        for container in template["spec"].get("initContainers", [])
    ]
    for name, container in [*containers(), *inits]:
        if words := [*container.get("command", []), *container.get("args", [])]:
            yield name, words
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container:
                yield f"{name} {kind}", _handler(container[kind], container)
        for hook, handler in container.get("lifecycle", {}).items():
            yield f"{name} {hook}", _handler(handler, container)


def _handler(handler: dict[str, Any], container: dict[str, Any]) -> Words:
    if "exec" in handler:
        return handler["exec"]["command"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    asked = handler["httpGet"]
    return ["GET", str(ports.get(asked["port"], asked["port"])), asked["path"]]


def _of_one_machine() -> Iterator[tuple[str, Words]]:
    folder = INFRA / "single-machine"
    for path in sorted(folder.glob("*.service")):
        for key, value in unit(path.name)["Service"].items():
            if key.startswith("Exec"):
                yield f"{path.name} {key}", shlex.split(value)
    assert [path.name for path in folder.glob("*.cron")] == ["enat-reevaluate.cron"]
    text = (folder / "enat-reevaluate.cron").read_text()
    (shell,) = re.findall(r"^SHELL=(\S+)$", text, flags=re.MULTILINE)
    yield "enat-reevaluate.cron", [shell, "-c", cron_line()[2]]


def parse(words: Sequence[str]) -> click.Context | None:
    """Parse as `enat` does, without running anything. Returns None for --help. Raises click.UsageError."""
    command: click.Command = commands
    context = click.Context(commands, info_name="enat")
    rest = list(words)
    while isinstance(command, click.Group):
        if rest[:1] == ["--help"]:
            return None
        name = rest.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name}")
        command = found
        context = click.Context(command, info_name=name, parent=context)
    return None if "--help" in rest else command.make_context(command.name, rest, parent=context.parent)
