"""The SkyPilot task: fields that SkyPilot documents, and commands that Ray and `enat` accept."""

from __future__ import annotations

import re
import shlex
import subprocess
from copy import deepcopy
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import INFRA, REPOSITORY
from what_runs import parse

TEXT = (INFRA / "skypilot" / "enat.yaml").read_text()
TASK: dict[str, Any] = yaml.safe_load(TEXT)
_STRINGS = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
# From SkyPilot's reference of its YAML (0.10), as far as the task uses it.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]*$"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "envs": _STRINGS,
        "secrets": _STRINGS,
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "infra": {"type": "string", "pattern": r"^[a-z0-9]+(/[\w*.-]+){0,2}$"},
                "accelerators": {"type": "string", "pattern": r"^[A-Za-z0-9-]+(:\d+)?$"},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer", "minimum": 50},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                    },
                },
            },
        },
    },
}
# Variables that SkyPilot sets on each node.
OF_SKYPILOT = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}


def test_only_fields_that_skypilot_documents() -> None:
    jsonschema.validate(TASK, SCHEMA)
    for place, value in ((("resources", "use_spots"), True), (("num_nodes",), 0), (("resources", "job_recovery", "strategy"), "X")):
        wrong = deepcopy(TASK)
        inner = wrong
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)
    assert TASK["resources"]["use_spot"] and TASK["envs"]["ENAT_STORE"].startswith("s3://")
    assert all(value is None for value in TASK["secrets"].values()), "a secret is given when the task is started"


def test_its_scripts_are_accepted() -> None:
    for script in (TASK["setup"], TASK["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", TASK["run"]))
    assert used <= OF_SKYPILOT | TASK["envs"].keys() | {"PWD", "PATH"}
    assert "make setup" in TASK["setup"] and re.search("^setup:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    for path in re.findall(r"python (\S+\.py)", TASK["run"]):
        assert (REPOSITORY / path).is_file()


def test_ray_and_enat_accept_its_commands() -> None:
    from ray.scripts.scripts import start

    variables = {"head": "10.0.0.1:6379", "own": "10.0.0.1", "SKYPILOT_NUM_GPUS_PER_NODE:-0": "8", "PWD": "/work"}
    variables |= TASK["envs"]
    run = re.sub(r"\$\{?([\w:-]+)\}?", lambda match: variables.get(match[1], match[0]), TASK["run"])
    starts = [shlex.split(line.split(" || ")[0].rstrip("& "), comments=True) for line in run.splitlines() if "ray start" in line]
    assert len(starts) == 2
    parsed = [start.make_context("start", words[2:]).params for words in starts]
    assert [each["head"] for each in parsed] == [False, True] and all(each["block"] and each["num_gpus"] == 8 for each in parsed)
    (line,) = [line for line in run.splitlines() if line.startswith("enat run")]
    context = parse(shlex.split(line)[1:])
    assert context is not None and "store=s3://enat/store" in context.params["overrides"]
