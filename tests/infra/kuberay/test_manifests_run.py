"""Runs every command in the files of infra/, on one machine and one cluster, in the order in which people run them.

Addresses, ports and folders of containers are replaced, and the configuration is smaller; see workstation.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from manifests import INFRA, compose, of_kind, unit
from workstation import COMMANDS, SECRETS, Workstation, workstation

from services.ray_nodes import ray_nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

OF_OTHERS = {  # programs of images that are not ours, and why they do not run here
    "compose object-store": "MinIO: replaced by an S3 server of the tests",
    "compose object-store healthcheck": "MinIO",
    "compose database healthcheck": "PostgreSQL: replaced by sqlite",
}
HOOKS = [place for place in COMMANDS if place.endswith(" preStop")]
PROBES = [place for place, words in COMMANDS.items() if words[0] == "GET"]
KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
JOBS = ("imagenet256-token-map", "imagenet256-train", "imagenet256-evaluate")
# Overrides that make configs/imagenet256.yaml small, without a GPU. Its model is registered like any other.
LESS = {
    "tokenizer": {"preset": "vqgan-small", "codebook_size": 32},
    "token_map": {"shard_size": 6, "execution": {"num_workers": 1, "gpus_per_worker": 0, "worker_batch_size": 6}},
    "train": {
        "model": {"preset": "enat-s", "encoder_layers": 2, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2},
        "num_steps": 8,
        "batch_size": 16,
        "num_groups": 4,
        "warmup_steps": 2,
        "precision": "fp32",
        "execution": {"num_workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1, "checkpoint_every": 4, "keep_every": 4},
    },
    "reference": {"extractor": "classifier", "num_epochs": 1, "execution": {"num_workers": 1, "gpus_per_worker": 0}},
    "generate": {
        "num_samples": 16,
        "shard_size": 8,
        "sampler": {"num_steps": 3},
        "precision": "fp32",
        "execution": {"num_workers": 1, "gpus_per_worker": 0, "compile": False},
    },
    "evaluate": {"execution": {"num_workers": 1, "gpus_per_worker": 0}},
}
JOB = """
import os, ray
ray.init(logging_level="ERROR")
@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id(), os.environ["AWS_REGION"]
print("found", ray.get(where.remote())[0] != ray.get_runtime_context().get_node_id(), ray.get(where.remote())[1])
"""


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workstation]:
    with workstation(tmp_path_factory.mktemp("logs")) as started:
        yield started


# Services of compose -------------------------------------------------------------------------------------------------------


def test_the_services_start_and_are_healthy(station: Workstation) -> None:
    import boto3

    assert station.is_well("mlflow", "Dockerfile mlflow HEALTHCHECK")
    for service in ("ray-head", "ray-worker"):
        assert station.is_well(service, f"compose {service} healthcheck")
    assert boto3.client("s3", endpoint_url=station.s3, **KEYS).get_bucket_versioning(Bucket="enat")["Status"] == "Enabled"
    nodes = station.read("/api/v0/nodes?detail=true")["data"]["result"]["result"]
    assert sorted(node["resources_total"].get("CPU", 0) for node in nodes) == [0, 2]


def test_a_node_for_gpus_joins_and_leaves(station: Workstation) -> None:
    service = "ray-worker-gpu"
    node = station.start_node(service)
    assert station.is_well(service, f"compose {service} healthcheck")

    def alive() -> int:
        nodes = station.read("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    assert alive() == 3
    station.stop(node, 10)
    deadline = time.monotonic() + 60
    while alive() != 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not station.is_well(service, f"compose {service} healthcheck")


def test_probes_of_pods_find_the_nodes_healthy(station: Workstation) -> None:
    for place in PROBES:
        _, port, path = station.words(place, station.agents["ray-head" if "head" in place else "ray-worker"])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            assert answer.status == 200, place


def test_a_pod_that_is_to_end_announces_it_to_ray(station: Workstation) -> None:
    """In a cluster of one node, because on one machine a command cannot tell which node is its own. See test_cluster_training."""
    scripts = {place: station.words(place) for place in HOOKS}
    (words,) = {tuple(words) for words in scripts.values()}
    *shell, script = words
    with ray_nodes(1) as nodes:
        environment = {
            **nodes.environment,
            "RAY_ADDRESS": nodes.address,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [*shell, script.partition(" && sleep")[0]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pods_of_kubernetes_start_nodes_as_compose_does() -> None:
    """The operator builds commands from these parameters. The head of compose, which runs above, has the same ones."""
    (cluster,) = of_kind("RayCluster")
    options = compose()["services"]["ray-head"]["command"]
    assert {f"--{name}={value}" for name, value in cluster["spec"]["headGroupSpec"]["rayStartParams"].items()} <= {*options}
    assert all(not group["rayStartParams"] for group in cluster["spec"]["workerGroupSpecs"])


def test_only_health_checks_work_without_the_token(station: Workstation) -> None:
    for token, expected in ((None, 401), ("wrong-wrong-wrong", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            station.read("/api/jobs/", token)
        assert refused.value.code == expected
    assert isinstance(station.read("/api/jobs/"), list)


def test_the_image_of_the_nodes_shows_its_help(station: Workstation) -> None:
    shown = station.run("Dockerfile enat CMD", station.of_image("base-cpu"))
    assert shown.returncode == 0 and "reevaluate" in shown.stdout


# The tracking server -------------------------------------------------------------------------------------------------------


def _status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def client(station: Workstation, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An MLflow client with the admin's name and password in the environment, as on nodes."""
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, SECRETS[name])
    return MlflowClient(station.mlflow)


def test_the_tracking_server_requires_a_password_and_an_allowed_host(station: Workstation, client: Any, monkeypatch: Any) -> None:
    from mlflow.exceptions import MlflowException

    listing = f"{station.mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert _status(f"{station.mlflow}/health") == 200
    assert _status(listing) == 401
    assert _status(listing, Host="evil.example") == 403
    assert client.get_experiment_by_name("Default") is not None
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password1234")  # MLflow's default
    with pytest.raises(MlflowException, match="401"):
        client.get_experiment_by_name("Default")


def test_runs_store_their_files_in_the_bucket(station: Workstation, client: Any, tmp_path: Path) -> None:
    import boto3

    file = tmp_path / "card.md"
    file.write_text("a card")
    experiment = client.create_experiment("of-the-tests")
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "loss", 0.5)
    client.log_artifact(run, str(file))
    assert client.get_run(run).data.metrics == {"loss": 0.5}
    assert [found.path for found in client.list_artifacts(run)] == ["card.md"]
    assert Path(client.download_artifacts(run, "card.md", str(tmp_path / "again" / ".."))).read_text() == "a card"
    listed = boto3.client("s3", endpoint_url=station.s3, **KEYS).list_objects_v2(Bucket="enat", Prefix="mlflow/")
    assert any(found["Key"].endswith(f"{run}/artifacts/card.md") for found in listed["Contents"])
    assert (station.folder / "mlflow" / "auth.db").is_file()  # the place that mlflow-auth.ini sets


# Jobs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(station: Workstation) -> None:
    """The inputs of the jobs: a dozen pictures in two classes, a tokenizer's weights, and the small configuration."""
    import boto3
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from PIL import Image

    from enat.tokenizer import VQGAN, VQGANConfig

    bucket = boto3.client("s3", endpoint_url=station.s3, **KEYS)
    bucket.create_bucket(Bucket="datasets")
    generator = np.random.default_rng(0)
    for number in range(12):
        picture = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 32))
        picture.save(encoded := io.BytesIO(), "PNG")
        bucket.put_object(Bucket="datasets", Key=f"imagenet/train/n0{number % 2}/{number}.png", Body=encoded.getvalue())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqgan = VQGAN(VQGANConfig.preset("vqgan-small", codebook_size=32)).state_dict()
    torch.save({name.replace("codebook.", "quantize.embedding."): value for name, value in vqgan.items()}, saved := io.BytesIO())
    bucket.put_object(Bucket="datasets", Key="weights/vqgan_jax_strongaug.ckpt", Body=saved.getvalue())
    config = OmegaConf.merge(OmegaConf.load(INFRA.parent / "configs" / "imagenet256.yaml"), LESS)
    station.config.write_text(OmegaConf.to_yaml(config))


def _submitted(station: Workstation, name: str) -> subprocess.CompletedProcess[str]:
    """Run the shell command that KubeRay's operator builds for a RayJob in mode K8sJobMode (job.go)."""
    (spec,) = [job["spec"] for job in of_kind("RayJob") if job["metadata"]["name"] == name]
    assert spec["submissionMode"] == "K8sJobMode"
    at, metadata = f"--address {station.url}", json.dumps(json.dumps(spec["metadata"]))
    shell, option, entrypoint = station.words(f"RayJob {name}")
    command = f"""
        if ! ray job status {at} {name} >/dev/null 2>&1 ; then
        ray job submit {at} --no-wait --metadata-json {metadata} --submission-id {name} -- {entrypoint} ; fi ;
        ray job logs {at} --follow {name}
    """
    return station.call([shell, option, command], station.submitter)


@pytest.fixture(scope="module")
def jobs(station: Workstation, material: None) -> dict[str, subprocess.CompletedProcess[str]]:
    """All three jobs, one after another."""
    return {name: _submitted(station, name) for name in JOBS}


def test_jobs_of_kubernetes_run_and_reuse_the_artifacts_of_earlier_jobs(
    station: Workstation, jobs: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    assert {f"RayJob {name}" for name in jobs} == {place for place in COMMANDS if place.startswith("RayJob")}
    for name, done in jobs.items():
        status = {job["submission_id"]: job["status"] for job in station.read("/api/jobs/")}[name]
        assert (done.returncode, status) == (0, "SUCCEEDED"), done.stdout[-4000:] + done.stderr[-2000:]
    of_stage = {
        name: {line.split()[1]: line.endswith("reused") for line in done.stdout.splitlines() if line.startswith("✓")}
        for name, done in jobs.items()
    }
    tokenized, trained, evaluated = (of_stage[name] for name in JOBS)
    assert not any(tokenized.values()) and not trained["train"] and not evaluated["evaluate"]
    assert trained["token_map"] and evaluated["token_map"] and evaluated["train"]


def test_enat_jobs_lists_jobs_by_the_metadata_of_their_manifests(station: Workstation, jobs: dict[str, Any]) -> None:
    enat = station.call(["enat", "jobs", "ls", "--json", "--address", station.url], station.submitter)
    assert enat.returncode == 0, enat.stderr
    listed = {job["id"]: (job["name"], job["run"], job["status"]) for job in json.loads(enat.stdout)["jobs"]}
    assert {*jobs} <= {*listed} and all(listed[name] == (name, name, "SUCCEEDED") for name in jobs)


def test_a_restarted_submitter_reads_the_same_log(station: Workstation, jobs: dict[str, Any]) -> None:
    name = JOBS[0]
    again = _submitted(station, name)
    assert again.returncode == 0 and "✓ token_map" in again.stdout
    assert len([job for job in station.read("/api/jobs/") if job["submission_id"] == name]) == 1


def _submit(station: Workstation) -> list[str]:
    """The command of the cron job without the submitted part."""
    words = station.words("enat-reevaluate: submit")
    return words[: words.index("--") + 1]


def test_a_driver_runs_on_the_head_and_its_tasks_on_the_worker(station: Workstation, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = station.call([*_submit(station), sys.executable, str(script)], station.submitter)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"found True {compose()['services']['ray-worker']['environment']['AWS_REGION']}" in done.stdout


def test_a_job_that_ends_with_drift_fails_the_pod_that_submitted_it(station: Workstation) -> None:
    done = station.call([*_submit(station), "bash", "-c", "exit 3"], station.submitter)
    assert done.returncode == 1, done.stdout + done.stderr
    (job,) = [job for job in station.read("/api/jobs/") if "exit 3" in job["entrypoint"]]
    assert job["status"] == "FAILED" and job["driver_exit_code"] == 3 and "exit code 3" in job["message"]


# Schedules -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_model(jobs: dict[str, Any], client: Any) -> str:
    """The name of the only model, whose evaluation is dated 40 days back."""
    (model,) = client.search_registered_models()
    (version,) = client.search_model_versions(f"name='{model.name}'")
    client.set_model_version_tag(model.name, version.version, "enat.evaluated", (datetime.now(UTC) - timedelta(40)).isoformat())
    return model.name


def _was_measured_again(client: Any, model: str) -> bool:
    """Its scores are of today, and were compared with the old ones without a drift."""
    (version,) = client.search_model_versions(f"name='{model}'")
    age = datetime.now(UTC) - datetime.fromisoformat(version.tags["enat.evaluated"])
    return age < timedelta(hours=1) and "enat.drift" not in version.tags


def test_the_cron_job_evaluates_models_that_are_due_and_then_none(station: Workstation, client: Any, old_model: str) -> None:
    place = "enat-reevaluate: submit"
    first, second = (station.run(place, station.submitter) for _ in range(2))
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-2000:]
    assert re.search(rf"{old_model} version 1: .*40\s+d", first.stdout, re.DOTALL), first.stdout[-4000:]  # lines are wrapped
    assert _was_measured_again(client, old_model)
    assert f"{old_model} version 1" in second.stdout and "40 d" not in second.stdout


@pytest.fixture(scope="module")
def machine(station: Workstation, jobs: dict[str, Any]) -> dict[str, str]:
    """/var/lib/enat with a copy of the store, and /etc/enat/enat.env made from its example. Returns the variables of that file."""
    import boto3

    bucket = boto3.client("s3", endpoint_url=station.s3, **KEYS)
    for page in bucket.get_paginator("list_objects_v2").paginate(Bucket="enat", Prefix="store/"):
        for found in page["Contents"]:
            path = station.folder / "state" / found["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            bucket.download_file("enat", found["Key"], str(path))
    cluster = station.variables("ray-head")
    example = (INFRA / "single-machine" / "enat.env.example").read_text()
    names = re.findall(r"^(\w+)=", example, flags=re.MULTILINE)
    filled_in = re.sub(r"^(\w+)=.*$", lambda match: f"{match[1]}={cluster[match[1]]}", example, flags=re.MULTILINE)
    (station.folder / "etc" / "enat.env").write_text(filled_in)
    return {name: cluster[name] for name in names}


def test_the_unit_s_command_evaluates_models_that_are_due(
    station: Workstation, client: Any, machine: dict[str, str], old_model: str
) -> None:
    """Only with systemd's variables and those of the unit, but as the user of these tests."""
    service = unit("enat-reevaluate.service")["Service"]
    own = dict(word.split("=", 1) for word in shlex.split(station.here(service["Environment"])))
    assert station.here(service["EnvironmentFile"]) == str(station.folder / "etc" / "enat.env")
    done = subprocess.run(
        station.words("enat-reevaluate.service ExecStart"), env={"PATH": "/usr/bin:/bin", **machine, **own},
        cwd=station.here(service["WorkingDirectory"]), umask=int(service["UMask"], 8),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(rf"{old_model} version 1: .*40 d", done.stdout)
    assert _was_measured_again(client, old_model)


def test_the_cron_line_finds_nothing_due_and_never_runs_twice_at_the_same_time(
    station: Workstation, machine: dict[str, str]
) -> None:
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    command = station.words("enat-reevaluate.cron")
    env = {"HOME": str(station.folder / "state"), "LOGNAME": "enat", "SHELL": command[0], "PATH": "/usr/bin:/bin"}
    lock = station.folder / "state" / "reevaluate.lock"
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        deadline = time.monotonic() + 60
        while not lock.exists() or subprocess.run(["flock", "-n", lock, "true"], check=False).returncode == 0:
            assert first.poll() is None and time.monotonic() < deadline
        begun = time.monotonic()
        second = station.call(command, env)
        seconds = time.monotonic() - begun
        assert first.poll() is None, "the first must still be running"
        output = first.communicate(timeout=280)[0]
    assert (second.returncode, second.stdout + second.stderr) == (0, "") and seconds < 5
    assert first.returncode == 0, output
    assert re.search(r"enat-.* version 1", output) and "40 d" not in output


# Which test runs what --------------------------------------------------------------------------------------------------------

RUN_BY = (
    {
        "compose bucket": test_the_services_start_and_are_healthy,
        "compose ray-head": test_the_services_start_and_are_healthy,
        "compose ray-head healthcheck": test_the_services_start_and_are_healthy,
        "compose ray-worker": test_the_services_start_and_are_healthy,
        "compose ray-worker healthcheck": test_the_services_start_and_are_healthy,
        "compose ray-worker-gpu": test_a_node_for_gpus_joins_and_leaves,
        "compose ray-worker-gpu healthcheck": test_a_node_for_gpus_joins_and_leaves,
        "Dockerfile mlflow CMD": test_the_services_start_and_are_healthy,
        "Dockerfile mlflow HEALTHCHECK": test_the_services_start_and_are_healthy,
        "Dockerfile enat CMD": test_the_image_of_the_nodes_shows_its_help,
        "RayJob imagenet256-token-map": test_jobs_of_kubernetes_run_and_reuse_the_artifacts_of_earlier_jobs,
        "RayJob imagenet256-train": test_jobs_of_kubernetes_run_and_reuse_the_artifacts_of_earlier_jobs,
        "RayJob imagenet256-evaluate": test_jobs_of_kubernetes_run_and_reuse_the_artifacts_of_earlier_jobs,
        "enat-reevaluate: submit": test_the_cron_job_evaluates_models_that_are_due_and_then_none,
        "enat-reevaluate.service ExecStart": test_the_unit_s_command_evaluates_models_that_are_due,
        "enat-reevaluate.cron": test_the_cron_line_finds_nothing_due_and_never_runs_twice_at_the_same_time,
    }
    | dict.fromkeys(PROBES, test_probes_of_pods_find_the_nodes_healthy)
    | dict.fromkeys(HOOKS, test_a_pod_that_is_to_end_announces_it_to_ray)
)


@pytest.fixture(autouse=True)
def _runs_its_commands(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    own = {place for place, test in RUN_BY.items() if test is request.function and parameters.get("place", place) == place}
    taken = request.getfixturevalue("station").taken if own else set()
    yield
    assert own <= taken
