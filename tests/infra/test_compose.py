"""compose.yaml: the ports it opens, the settings it requires, and the commands it runs."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from manifests import INFRA, SECRET, compose, filled, stages

SERVICES: dict[str, Any] = compose()["services"]
ONCE = {"bucket"}  # services that do something and exit
RAY = [name for name in SERVICES if name.startswith("ray")]
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), flags=re.MULTILINE))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_the_compose_specification_allows_it() -> None:
    pytest.importorskip("check_jsonschema")
    import jsonschema

    schema = json.loads((importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert list(validator.iter_errors(compose())) == []
    wrong = compose()
    wrong["services"]["mlflow"]["imagee"] = wrong["services"]["mlflow"].pop("image")
    assert any("imagee" in error.message for error in validator.iter_errors(wrong))


def test_a_workstation_has_all_services_with_pinned_images() -> None:
    assert set(SERVICES) == {"object-store", "bucket", "database", "mlflow", "ray-head", "ray-worker", "ray-worker-gpu"}
    assert SERVICES["ray-worker-gpu"]["profiles"] == ["gpu"]
    assert all(re.search(r":(v?\d|RELEASE\.\d)", service["image"]) for service in SERVICES.values())


def test_services_have_no_more_rights_than_they_need() -> None:
    for name, service in SERVICES.items():
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", [])), name
        assert name not in {"database", "ray-worker", "bucket"} or "ports" not in service
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert set(service.get("cap_add", [])) <= ({"DAC_OVERRIDE"} if name == "object-store" else set()), name
        assert service["read_only"] is True and not {"privileged", "pid", "network_mode"} & set(service), name
        assert not any("docker.sock" in volume for volume in _strings(service.get("volumes", []))), name
        assert not service["image"].startswith("enat:") or service["user"] == "10001:10001", name


def test_secrets_come_from_the_environment_and_are_required() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) or "password" in str(value).lower():
                assert re.search(r"\$\{\w+:\?[^}]+\}", str(value)), variable
        # A variable is neither empty by accident, nor has a secret a default.
        assert not [text for text in _strings(service) if re.search(r"\$\{\w+\}|\$\{\w+-", text)]
    required = {variable for text in _strings(SERVICES) for variable in re.findall(r"\$\{(\w+):\?", text)}
    assert len(required) == 8
    assert {name for name in required if EXAMPLE.get(name) == ""} == required


def test_a_client_on_the_host_finds_the_published_ports() -> None:
    published = {port.rpartition(":")[0] for service in SERVICES.values() for port in service.get("ports", [])}
    assert {EXAMPLE["AWS_ENDPOINT_URL"], EXAMPLE["MLFLOW_TRACKING_URI"]} <= {f"http://{port}" for port in published}
    assert "127.0.0.1:8265" in published


def test_services_have_health_checks_and_wait_for_each_other() -> None:
    for name, service in SERVICES.items():
        if name not in ONCE:
            assert name == "mlflow" or service["healthcheck"]["test"][0] == "CMD"  # mlflow: the HEALTHCHECK of its image
            assert service["restart"] == "unless-stopped"
        for other, condition in service.get("depends_on", {}).items():
            assert condition["condition"] == ("service_completed_successfully" if other in ONCE else "service_healthy")
            assert other in SERVICES
        test = service.get("healthcheck", {}).get("test", [])
        if "python" in test:
            *_, option, program = test
            compile(program, name, "exec")
            assert option == "-c" and "http://127.0.0.1:" in program


def test_volumes_and_networks_are_declared() -> None:
    declared = compose()
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0] if ":" in filled(volume) and not volume.startswith("${") else ""
            assert not source or source.startswith((".", "/")) or source in declared["volumes"], (name, volume)
            assert not source.startswith(".") or (INFRA / source).exists()
        assert set(service.get("networks", [])) <= {*declared["networks"], "default"}
    assert declared["networks"]["database"]["internal"] is True


# Commands ------------------------------------------------------------------------------------------------------------------


def test_ray_accepts_the_options_and_nodes_require_the_token() -> None:
    from ray.scripts.scripts import start

    for name in RAY:
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        program, command, *options = [filled(word) for word in SERVICES[name]["command"]]
        assert (program, command) == ("ray", "start")
        parsed = start.make_context("start", options).params
        assert parsed["block"] and parsed["head"] == (name == "ray-head")
        assert parsed["head"] or parsed["address"] == "ray-head:6379"
        with pytest.raises(click.UsageError):
            start.make_context("start", [*options, "--no-such-option"])


@pytest.mark.faults
def test_the_tracking_server_accepts_its_settings() -> None:
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    (command,) = [json.loads(rest) for instruction, rest in stages()["mlflow"] if instruction == "CMD"]
    assert command[:2] == ["mlflow", "server"]
    assert server.make_context("server", command[2:]).params["app_name"] == "basic-auth"
    options = {option.envvar for option in server.params if isinstance(option, click.Option)}
    environment = SERVICES["mlflow"]["environment"]
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_WORKERS"):
        assert name in environment and name in options
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    client = SERVICES["ray-head"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert all(is_allowed_host_header(hosts, host) for host in (client, "127.0.0.1:5000", "localhost:5000"))
    assert not is_allowed_host_header(hosts, "evil.example:5000")


def test_the_image_of_the_tracking_server_contains_the_driver_of_its_database() -> None:
    """SQLAlchemy takes the driver from the URL's scheme; if the scheme names none, its default is another driver."""
    from sqlalchemy import make_url

    url = make_url(filled(re.sub(r"\$\{\w+:\?[^}]*\}", "secret", SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])))
    locked = re.findall(r"^([\w-]+)==", (INFRA / "mlflow.lock").read_text(), flags=re.MULTILINE)
    assert url.get_backend_name() == "postgresql" and url.host == "database"
    assert {"psycopg2": "psycopg2-binary"}[url.get_driver_name()] in locked
    assert make_url("postgresql://database").get_driver_name() != url.get_driver_name(), "the URL need not name it"


def test_ray_s_object_store_fits_in_shared_memory() -> None:
    """Otherwise it is on a disk, and everything is slow."""
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    for name in RAY:
        shared, memory = (filled(SERVICES[name][key]) for key in ("shm_size", "mem_limit"))
        assert re.fullmatch(r"\d+gb?", shared) and re.fullmatch(r"\d+gb?", memory)
        assert int(shared.strip("gb")) >= DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * int(memory.strip("gb")), name


def test_the_store_is_addressed_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bucket's name before the name of a container, no host would be found."""
    from pipelines.storage.s3_client import S3Config, client_of

    environment = SERVICES["ray-head"]["environment"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = client_of(S3Config(endpoint_url=environment["AWS_ENDPOINT_URL"], region=environment["AWS_REGION"]))
    url = client.generate_presigned_url("head_object", {"Bucket": "enat", "Key": "store/manifest.json"})
    assert url.startswith("http://object-store:9000/enat/store/manifest.json?")


def test_the_command_creates_the_bucket(s3_server: str, s3_environment: dict[str, str]) -> None:
    """As the container runs it, against a server over HTTP; twice, as `docker compose up` does."""
    import boto3

    program, script, *arguments = SERVICES["bucket"]["command"]
    (source, target, _) = SERVICES["bucket"]["volumes"][0].split(":")
    assert program == "python" and script.startswith(target)
    path = INFRA / source / Path(script).relative_to(target)
    for expected in ("enat was created", "enat exists"):
        done = subprocess.run(
            [sys.executable, path, *arguments], env=s3_environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [expected, "versioning is enabled"]
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    assert boto3.client("s3", endpoint_url=s3_server, **keys).get_bucket_versioning(Bucket="enat")["Status"] == "Enabled"
    assert SERVICES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].startswith(f"s3://{arguments[0]}/")
