"""compose.yaml: what it opens, what it asks for, and the commands that it runs."""

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
from manifests import INFRA, SECRET, compose, filled

SERVICES: dict[str, Any] = compose()["services"]
ONCE = {"bucket"}  # services that do something and end
OURS = {name for name, service in SERVICES.items() if service["image"].startswith("enat")}


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_it_is_what_the_compose_specification_allows() -> None:
    pytest.importorskip("check_jsonschema")
    import jsonschema

    schema = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.validators.validator_for(json.loads(schema.read_text()))(json.loads(schema.read_text()))
    assert list(validator.iter_errors(compose())) == []
    wrong = compose()
    wrong["services"]["mlflow"]["imagee"] = wrong["services"]["mlflow"].pop("image")
    assert any("imagee" in error.message for error in validator.iter_errors(wrong))


def test_the_parts_of_a_workstation_are_there() -> None:
    assert set(SERVICES) == {"object-store", "bucket", "database", "mlflow", "ray-head", "ray-worker", "ray-worker-gpu"}
    assert SERVICES["ray-worker-gpu"]["profiles"] == ["gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert SERVICES[name].get("network_mode") is None
    if name in {"database", "ray-worker", "bucket"}:
        assert "ports" not in SERVICES[name]


@pytest.mark.parametrize("name", SERVICES)
def test_services_can_do_no_more_than_they_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert set(service.get("cap_add", [])) <= ({"DAC_OVERRIDE"} if name == "object-store" else set())
    assert service["read_only"] is True and "privileged" not in service and "pid" not in service
    assert not any("docker.sock" in volume for volume in _strings(service.get("volumes", [])))
    if service["image"].startswith("enat:"):
        assert service["user"] == "10001:10001"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    assert re.search(r":(v?\d|RELEASE\.\d)", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_the_environment_and_are_refused_when_missing(name: str) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        if SECRET.search(variable) or "password" in str(value).lower():
            assert re.search(r"\$\{\w+:\?[^}]+\}", str(value)), variable
    for text in _strings(SERVICES[name]):
        assert re.search(r"\$\{\w+\}|\$\{\w+-", text) is None  # neither empty by accident, nor a default for a secret


def test_what_must_be_set_is_in_the_example_and_empty_there() -> None:
    required = {variable for text in _strings(SERVICES) for variable in re.findall(r"\$\{(\w+):\?", text)}
    example = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), flags=re.MULTILINE))
    assert len(required) == 8
    assert {name for name in required if example.get(name) == ""} == required


def test_a_client_on_the_host_finds_what_is_published() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), flags=re.MULTILINE))
    published = {port.rpartition(":")[0] for service in SERVICES.values() for port in service.get("ports", [])}
    assert {example["AWS_ENDPOINT_URL"], example["MLFLOW_TRACKING_URI"]} <= {f"http://{port}" for port in published}
    assert "127.0.0.1:8265" in published


@pytest.mark.parametrize("name", SERVICES)
def test_services_wait_for_what_they_need_to_be_well(name: str) -> None:
    service = SERVICES[name]
    if name not in ONCE:
        is_image_s = name == "mlflow"  # the Dockerfile's own HEALTHCHECK
        assert is_image_s or service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
    for other, condition in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert condition["condition"] == ("service_completed_successfully" if other in ONCE else "service_healthy")


def test_volumes_and_networks_are_declared() -> None:
    declared = compose()
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0] if ":" in filled(volume) and not volume.startswith("${") else ""
            assert not source or source.startswith((".", "/")) or source in declared["volumes"], (name, volume)
            assert not source.startswith(".") or (INFRA / source).exists()
        assert set(service.get("networks", [])) <= {*declared["networks"], "default"}
    assert declared["networks"]["database"]["internal"] is True


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("ray")])
def test_nodes_ask_for_the_token(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


# Commands ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("ray")])
def test_ray_takes_the_options(name: str) -> None:
    from ray.scripts.scripts import start

    program, command, *options = [filled(word) for word in SERVICES[name]["command"]]
    assert (program, command) == ("ray", "start")
    parsed = start.make_context("start", options).params
    assert parsed["block"] and parsed["head"] == (name == "ray-head")
    if not parsed["head"]:
        assert parsed["address"] == "ray-head:6379"
    with pytest.raises(click.UsageError):
        start.make_context("start", [*options, "--no-such-option"])


@pytest.mark.faults
def test_the_tracking_server_takes_its_settings() -> None:
    from manifests import stages
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


def test_the_image_of_the_tracking_server_holds_the_driver_of_its_database() -> None:
    """SQLAlchemy asks for it by the URL's scheme, and for another one where the scheme names none."""
    from sqlalchemy import make_url

    url = make_url(filled(re.sub(r"\$\{\w+:\?[^}]*\}", "secret", SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])))
    locked = re.findall(r"^([\w-]+)==", (INFRA / "mlflow.lock").read_text(), flags=re.MULTILINE)
    assert url.get_backend_name() == "postgresql" and url.host == "database"
    assert {"psycopg2": "psycopg2-binary"}[url.get_driver_name()] in locked
    assert make_url("postgresql://database").get_driver_name() != url.get_driver_name(), "it need not be named"


def _gigabytes(text: str) -> float:
    match = re.fullmatch(r"(\d+)gb?", filled(text))
    assert match is not None, text
    return float(match[1])


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("ray")])
def test_ray_s_object_store_fits_in_shared_memory(name: str) -> None:
    """Without room there it lies on a disk, and everything is slow."""
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    service = SERVICES[name]
    assert _gigabytes(service["shm_size"]) >= DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * _gigabytes(service["mem_limit"])


@pytest.mark.parametrize(
    "name", [name for name, service in SERVICES.items() if "python" in service.get("healthcheck", {}).get("test", [])]
)
def test_health_checks_are_programs(name: str) -> None:
    *_, option, program = SERVICES[name]["healthcheck"]["test"]
    assert option == "-c"
    compile(program, name, "exec")
    assert "http://127.0.0.1:" in program


def test_the_store_is_addressed_by_path_as_names_of_containers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket's name before the host's would be a host that nobody knows."""
    from botocore.awsrequest import AWSResponse

    from pipelines.storage.s3_client import S3Config, client_of

    environment = SERVICES["ray-head"]["environment"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = client_of(S3Config(endpoint_url=environment["AWS_ENDPOINT_URL"], region=environment["AWS_REGION"]))
    asked: list[str] = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        asked.append(request.url)
        return AWSResponse(request.url, 404, {}, _Empty())

    client.meta.events.register("before-send.s3", answer)
    with pytest.raises(client.exceptions.ClientError):
        client.head_object(Bucket="enat", Key="store/manifest.json")
    assert asked == ["http://object-store:9000/enat/store/manifest.json"]


class _Empty:
    def stream(self, *_: Any, **__: Any) -> list[bytes]:
        return []

    def read(self, *_: Any) -> bytes:
        return b""


def test_the_bucket_is_made_by_the_command(s3_server: str, s3_environment: dict[str, str]) -> None:
    """As the container runs it, against a server over HTTP; twice, as `docker compose up` does."""
    import boto3

    program, script, *arguments = SERVICES["bucket"]["command"]
    (source, target, _) = SERVICES["bucket"]["volumes"][0].split(":")
    assert program == "python" and script.startswith(target)
    path = INFRA / source / Path(script).relative_to(target)
    for expected in ("enat is made", "enat is there"):
        done = subprocess.run(
            [sys.executable, path, *arguments], env=s3_environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [expected, "versions are kept"]
    client = boto3.client(
        "s3", endpoint_url=s3_server, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    assert client.get_bucket_versioning(Bucket="enat")["Status"] == "Enabled"
    destination = SERVICES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
    assert destination.startswith(f"s3://{arguments[0]}/")
