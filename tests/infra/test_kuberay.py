"""KubeRay's manifests: of the shape that Kubernetes and KubeRay expect, with no more rights than needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import INFRA, containers, documents, of_kind, pod_templates, resources

from pipelines.jobs import client as jobs

TEMPLATES = dict(pod_templates())
CONTAINERS = dict(containers())
(CLUSTER,) = of_kind("RayCluster")
(CRON,) = of_kind("CronJob")
JOBS = of_kind("RayJob")
KUBERNETES = "1.34"

# Fields of KubeRay's ray.io/v1 that are used here, from its API reference (1.6).
_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
_AUTOSCALER = {
    "version", "upscalingMode", "idleTimeoutSeconds", "image", "imagePullPolicy", "securityContext", "resources", "env", "envFrom",
    "volumeMounts",
}  # fmt: skip
_HEAD = {"serviceType", "headService", "rayStartParams", "template", "labels", "resources"}
_WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "idleTimeoutSeconds"}
_JOB = {
    "clusterSelector", "submissionMode", "entrypoint", "submitterConfig", "submitterPodTemplate", "runtimeEnvYAML", "metadata",
    "activeDeadlineSeconds", "entrypointNumCpus", "entrypointResources",
}  # fmt: skip


def _problem(document: dict[str, Any]) -> str | None:
    """What Kubernetes' own schema finds wrong with it first."""
    validator = pytest.importorskip("kubernetes_validate")
    try:
        validator.validate(document, KUBERNETES, strict=True)
    except validator.ValidationError as error:
        return str(error)
    return None


# Against published schemas -------------------------------------------------------------------------------------------------

PLAIN = [document for _, document in resources() if not document["apiVersion"].startswith("ray.io/")]


@pytest.mark.parametrize("document", PLAIN, ids=lambda document: f"{document['kind']} {document['metadata']['name']}")
def test_kubernetes_schemas_hold(document: dict[str, Any]) -> None:
    assert _problem(document) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_hold_to_the_schema_of_kubernetes(name: str) -> None:
    """Of what KubeRay gives no schema of its own: pods, and the autoscaler's container."""
    spec = TEMPLATES[name]["spec"]
    if name == "enat head":
        options = CLUSTER["spec"]["autoscalerOptions"]
        fields = {key: options[key] for key in ("imagePullPolicy", "securityContext", "resources", "volumeMounts")}
        spec = spec | {"containers": [*spec["containers"], {"name": "autoscaler", "image": "any:1.0", **fields}]}
    metadata = {"name": "a", **TEMPLATES[name].get("metadata", {})}
    assert _problem({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}) is None


def test_the_schemas_refuse_what_is_wrong() -> None:
    spec = {"containers": [{"name": "a", "imagee": "b"}]}
    assert "imagee" in (_problem({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}) or "")


@pytest.mark.parametrize("folder", ["kuberay", "kuberay/jobs"])
def test_kustomize_puts_them_together(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", INFRA / folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    images = re.findall(r"image: (\S+)", done.stdout)
    assert images and all(re.fullmatch(r"enat:\d+\.\d+\.\d+-(cpu|cuda)", image) for image in images)
    made = [document for document in yaml.safe_load_all(done.stdout) if document["kind"] != "Namespace"]
    assert all(document["metadata"].get("namespace") == "enat" for document in made)


# Shape ---------------------------------------------------------------------------------------------------------------------


def test_only_fields_that_kuberay_has() -> None:
    spec = CLUSTER["spec"]
    assert CLUSTER["apiVersion"] == "ray.io/v1" and set(spec) <= _CLUSTER
    assert set(spec["autoscalerOptions"]) <= _AUTOSCALER and set(spec["headGroupSpec"]) <= _HEAD
    assert all(set(group) <= _WORKERS for group in spec["workerGroupSpecs"])
    for job in JOBS:
        assert job["apiVersion"] == "ray.io/v1" and set(job["spec"]) <= _JOB
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", job["metadata"]["name"])  # KubeRay: a DNS label of 47 characters at most
        assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode"}  # others do not go with a clusterSelector


def test_the_cluster_runs_the_ray_that_is_installed() -> None:
    assert CLUSTER["spec"]["rayVersion"] == version("ray")


def test_both_pools_grow_from_nothing() -> None:
    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (gpu,) = groups["gpu"]["template"]["spec"]["containers"]
    (decode,) = groups["decode"]["template"]["spec"]["containers"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == gpu["resources"]["requests"]["nvidia.com/gpu"] == "8"
    assert not any("gpu" in name for name in decode["resources"]["limits"])
    assert gpu["image"] == "enat-cuda" and decode["image"] == "enat-cpu"
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_gpu_pool_fits_what_the_config_asks_for() -> None:
    from manifests import REPOSITORY

    from pipelines.run.config import RunConfig
    from pipelines.workflow.config import load_config

    run = load_config(RunConfig, REPOSITORY / "configs" / "imagenet256.yaml", [])
    groups = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
    node = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = (int(node[name]) * groups["gpu"]["maxReplicas"] for name in ("nvidia.com/gpu", "cpu"))
    for execution in (run.train.execution, run.token_map.execution):
        assert execution.num_workers * execution.gpus_per_worker <= gpus
        assert execution.num_workers * execution.cpus_per_worker <= cpus


def test_ray_takes_the_parameters_of_its_start() -> None:
    from ray.scripts.scripts import start

    groups = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
    for group in groups:
        given = group["rayStartParams"]
        parsed = start.make_context("start", [f"--{name}={value}" for name, value in given.items()]).params
        assert {name.replace("-", "_") for name in given} <= parsed.keys()


def test_ray_takes_the_command_that_submits() -> None:
    from ray.dashboard.modules.job.cli import submit

    (container,) = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[:3] == ["ray", "job", "submit"]
    parsed = submit.make_context("submit", words[3:]).params
    assert parsed["address"] == f"http://{CLUSTER['metadata']['name']}-head-svc:8265" and not parsed["no_wait"]
    assert parsed["entrypoint"][:2] == ("enat", "reevaluate")
    assert json.loads(parsed["metadata_json"]).keys() == {jobs.RUN, "enat.name"}, "`enat jobs` shows what has these"


def test_jobs_run_on_the_cluster() -> None:
    assert [job["metadata"]["name"] for job in JOBS] == ["imagenet256-evaluate", "imagenet256-token-map", "imagenet256-train"]
    for job in JOBS:
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
        assert job["metadata"]["labels"]["app.kubernetes.io/name"] == job["metadata"]["name"]
        assert job["spec"]["metadata"] == dict.fromkeys((jobs.RUN, "enat.name"), job["metadata"]["name"])


def test_reevaluation_is_never_run_twice_at_once() -> None:
    spec = CRON["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Etc/UTC"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    fields = spec["schedule"].split()
    assert len(fields) == 5 and all(re.fullmatch(r"\*|\d{1,2}", field) for field in fields)
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
    assert all(field == "*" or low <= int(field) <= high for field, (low, high) in zip(fields, limits, strict=True))


# Rights --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_are_of_the_restricted_standard(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False and spec["serviceAccountName"].startswith("enat-")
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all(set(volume) - {"name"} <= {"emptyDir", "projected"} for volume in spec["volumes"])
    assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)


@pytest.mark.parametrize("name", ["enat head", "enat decode", "enat gpu"])
def test_caches_and_scratch_fit_into_a_pod_s_share_of_the_disk(name: str) -> None:
    """Beyond it a node evicts the pod: for the head, with the driver and the cluster's state."""
    spec = TEMPLATES[name]["spec"]
    (settings,) = of_kind("ConfigMap")
    (ours,) = [container for container in spec["containers"] if container["name"].startswith("ray-")]
    own = {variable["name"]: variable["value"] for variable in ours.get("env", [])}  # goes before what envFrom gives
    size = {volume["name"]: _gibibytes(volume["emptyDir"]["sizeLimit"]) for volume in spec["volumes"] if "emptyDir" in volume}
    cache = float(own.get("ENAT_CACHE_GB", settings["data"]["ENAT_CACHE_GB"]))
    scratch = sum(value for volume, value in size.items() if volume != "cache")
    assert cache + scratch <= _gibibytes(ours["resources"]["limits"]["ephemeral-storage"])
    assert 1.2 * cache <= size["cache"]  # files of the moment lie beside


def _gibibytes(text: str) -> float:
    assert text.endswith("Gi")
    return float(text.removesuffix("Gi"))


def _is_restricted(context: dict[str, Any]) -> bool:
    return (
        context["allowPrivilegeEscalation"] is False
        and context["readOnlyRootFilesystem"] is True
        and context["runAsNonRoot"] is True
        and context["capabilities"] == {"drop": ["ALL"]}
        and "privileged" not in context
    )


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_restricted_and_bounded(name: str) -> None:
    container = CONTAINERS[name]
    assert _is_restricted(container["securityContext"])
    assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and {"cpu", "memory"} <= set(
        container["resources"]["limits"]
    )
    assert container["image"] in {"enat-cpu", "enat-cuda"}  # kustomize puts a version in; nothing else may
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/home/enat"}  # its root cannot be written


def test_so_is_the_autoscaler() -> None:
    options = CLUSTER["spec"]["autoscalerOptions"]
    assert _is_restricted(options["securityContext"]) and options["resources"]["limits"]


@pytest.mark.parametrize("name", [name for name in CONTAINERS if "ray-" in name])
def test_nodes_are_probed_without_a_token(name: str) -> None:
    from ray.dashboard import http_server_agent

    container = CONTAINERS[name]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check = container[probe]["httpGet"]
        assert (check["path"], ports[check["port"]]) == (
            ("/api/gcs_healthz", 8265) if "head" in name else ("/api/local_raylet_healthz", 52365)
        )
    assert "/api/local_raylet_healthz" in http_server_agent.PUBLIC_EXACT_PATHS
    head = Path(http_server_agent.__file__).with_name("http_server_head.py").read_text()
    assert '"/api/gcs_healthz",  # GCS health check' in head  # among the paths that need no token


def test_only_the_autoscaler_may_ask_kubernetes() -> None:
    (role,), (binding,) = of_kind("Role"), of_kind("RoleBinding")
    assert not of_kind("ClusterRole") and not of_kind("ClusterRoleBinding")
    verbs = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert verbs == {("", "pods"): {"get", "list", "watch"}, ("ray.io", "rayclusters"): {"get", "patch"}}
    assert [rule.get("resourceNames") for rule in role["rules"]] == [None, [CLUSTER["metadata"]["name"]]]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["enat-autoscaler"]
    head = TEMPLATES["enat head"]["spec"]
    assert head["serviceAccountName"] == "enat-autoscaler"
    mounted = {mount["name"] for container in head["containers"] for mount in container["volumeMounts"]}
    assert "kubernetes-token" not in mounted  # the container that runs people's drivers has none
    accounts = {account["metadata"]["name"] for account in of_kind("ServiceAccount")}
    assert {template["spec"]["serviceAccountName"] for template in TEMPLATES.values()} <= accounts
    assert all(account["automountServiceAccountToken"] is False for account in of_kind("ServiceAccount"))


def test_the_autoscaler_finds_its_token_where_it_looks() -> None:
    from ray.autoscaler._private.kuberay import node_provider

    options = CLUSTER["spec"]["autoscalerOptions"]
    (mount,) = [mount for mount in options["volumeMounts"] if mount["name"] == "kubernetes-token"]
    (volume,) = [volume for volume in TEMPLATES["enat head"]["spec"]["volumes"] if volume["name"] == "kubernetes-token"]
    paths = set()
    for source in volume["projected"]["sources"]:
        (what,) = source.values()
        paths |= {f"{mount['mountPath']}/{item['path']}" for item in what.get("items", [what])}
    assert {node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH} <= paths


def test_ray_asks_for_a_token_that_no_manifest_holds() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    (container,) = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": CLUSTER["metadata"]["name"], "key": "auth_token"}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"


def test_secrets_are_templates_and_are_the_ones_that_are_used() -> None:
    templates = of_kind("Secret")
    assert all(set(secret["stringData"].values()) == {""} for secret in templates)
    assert "secret.template.yaml" not in documents(INFRA / "kuberay" / "kustomization.yaml")[0]["resources"]
    used = {
        source["secretRef"]["name"]
        for container in CONTAINERS.values()
        for source in container.get("envFrom", [])
        if "secretRef" in source
    }
    assert used == {secret["metadata"]["name"] for secret in templates}
    assert "kuberay/secret.yaml" in (INFRA / ".gitignore").read_text().splitlines()


def test_drivers_commit_and_workers_cannot() -> None:
    def secrets(name: str) -> set[str]:
        return {source["secretRef"]["name"] for source in CONTAINERS[name]["envFrom"] if "secretRef" in source}

    assert secrets("enat head: ray-head") == {"enat-driver", "enat-tracking"}
    for group in ("decode", "gpu"):
        assert secrets(f"enat {group}: ray-worker") == {"enat-worker", "enat-tracking"}


# Network -------------------------------------------------------------------------------------------------------------------


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _may_reach(source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Within the namespace, by NetworkPolicy's rules: policies add up, and one that selects a pod closes the rest."""

    def allows(direction: str, pod: dict[str, str], other: dict[str, str]) -> bool:
        key = {"Ingress": "from", "Egress": "to"}[direction]
        policies = [
            p["spec"]
            for p in of_kind("NetworkPolicy")
            if direction in p["spec"]["policyTypes"] and _matches(p["spec"]["podSelector"], pod)
        ]
        if not policies:
            return True
        for rule in (rule for policy in policies for rule in policy.get(direction.lower(), [])):
            peers, ports = rule.get(key), rule.get("ports")
            is_peer = peers is None or any(
                "namespaceSelector" not in peer and _matches(peer["podSelector"], other) for peer in peers
            )
            if is_peer and (ports is None or port in {entry["port"] for entry in ports}):
                return True
        return False

    return allows("Egress", source, target) and allows("Ingress", target, source)


def test_pods_reach_what_they_need_and_no_more() -> None:
    head = {"ray.io/cluster": "enat", "ray.io/node-type": "head"}
    worker = {"ray.io/cluster": "enat", "ray.io/node-type": "worker"}
    submitters = [
        template["metadata"]["labels"] for name, template in TEMPLATES.items() if "head" not in name and "metadata" in template
    ]
    assert len(submitters) == len(JOBS) + 1
    assert _may_reach(worker, head, 6379) and _may_reach(head, worker, 20000) and _may_reach(worker, worker, 30000)
    for submitter in submitters:
        assert _may_reach(submitter, head, 8265)
        assert not _may_reach(submitter, head, 6379) and not _may_reach(submitter, worker, 8265)
    assert not _may_reach({"app": "another"}, head, 8265) and not _may_reach({}, worker, 10001)


def test_the_head_is_not_drained_away() -> None:
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1 and "maxUnavailable" not in budget["spec"]  # which needs a scale of the owner
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": CLUSTER["metadata"]["name"], "ray.io/node-type": "head"}
