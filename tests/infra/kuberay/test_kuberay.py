"""KubeRay's manifests: they have the shape that Kubernetes and KubeRay expect, and no more rights than necessary."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import INFRA, REPOSITORY, containers, documents, of_kind, pod_templates, resources

from pipelines.jobs import client as jobs

TEMPLATES = dict(pod_templates())
CONTAINERS = dict(containers())
(CLUSTER,) = of_kind("RayCluster")
(CRON,) = of_kind("CronJob")
JOBS = of_kind("RayJob")
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
NAME = CLUSTER["metadata"]["name"]
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


# Against published schemas -------------------------------------------------------------------------------------------------


def _problem(document: dict[str, Any]) -> str | None:
    """The first error that Kubernetes' own schema finds."""
    validator = pytest.importorskip("kubernetes_validate")
    try:
        validator.validate(document, KUBERNETES, strict=True)
    except validator.ValidationError as error:
        return str(error)
    return None


def _pod(spec: dict[str, Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **(metadata or {})}, "spec": spec}


def test_the_schemas_of_kubernetes_allow_them() -> None:
    """KubeRay's own kinds have no schema here; their pods are checked instead, and the autoscaler's container with the head's."""
    plain = [document for _, document in resources() if not document["apiVersion"].startswith("ray.io/")]
    pods = []
    for name, template in TEMPLATES.items():
        spec = template["spec"]
        if name == f"{NAME} head":
            options = CLUSTER["spec"]["autoscalerOptions"]
            fields = {key: options[key] for key in ("imagePullPolicy", "securityContext", "resources", "volumeMounts")}
            spec = spec | {"containers": [*spec["containers"], {"name": "autoscaler", "image": "any:1.0", **fields}]}
        pods.append(_pod(spec, template.get("metadata")))
    assert len(plain) > 10 and len(pods) == 3 + len(JOBS) + 1
    problems = [(document["kind"], document["metadata"], _problem(document)) for document in plain + pods]
    assert not [problem for problem in problems if problem[-1]]
    assert "imagee" in (_problem(_pod({"containers": [{"name": "a", "imagee": "b"}]})) or "")


@pytest.mark.parametrize("folder", ["kuberay", "kuberay/jobs"])
def test_kustomize_builds_them(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", INFRA / folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    images = re.findall(r"image: (\S+)", done.stdout)
    assert images and all(re.fullmatch(r"enat:\d+\.\d+\.\d+-(cpu|cuda)", image) for image in images)
    made = [document for document in yaml.safe_load_all(done.stdout) if document["kind"] != "Namespace"]
    assert all(document["metadata"].get("namespace") == "enat" for document in made)


def test_only_fields_that_kuberay_has() -> None:
    spec = CLUSTER["spec"]
    assert CLUSTER["apiVersion"] == "ray.io/v1" and set(spec) <= _CLUSTER and spec["rayVersion"] == version("ray")
    assert set(spec["autoscalerOptions"]) <= _AUTOSCALER and set(spec["headGroupSpec"]) <= _HEAD
    assert all(set(group) <= _WORKERS for group in GROUPS.values())
    for job in JOBS:
        assert job["apiVersion"] == "ray.io/v1" and set(job["spec"]) <= _JOB
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", job["metadata"]["name"])  # KubeRay: a DNS label of 47 characters at most
        assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode"}  # other modes do not support a clusterSelector


# Cluster and jobs ----------------------------------------------------------------------------------------------------------


def test_both_pools_start_at_zero_and_the_gpu_pool_fits_the_config() -> None:
    from pipelines.cluster.capacity import with_count
    from pipelines.cluster.hardware import parse_cluster
    from pipelines.run.config import RunConfig
    from pipelines.workflow.config import load_config

    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True and set(GROUPS) == {"decode", "gpu"}
    assert all(group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"] for group in GROUPS.values())
    (gpu,), (decode,) = (GROUPS[name]["template"]["spec"]["containers"] for name in ("gpu", "decode"))
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == gpu["resources"]["requests"]["nvidia.com/gpu"] == "8"
    assert not any("gpu" in name for name in decode["resources"]["limits"])
    assert gpu["image"] == "enat-cuda" and decode["image"] == "enat-cpu"
    run = load_config(RunConfig, REPOSITORY / "configs" / "imagenet256.yaml", [])
    settings = documents(INFRA / "kuberay" / "settings.yaml")[0]["data"]
    largest = parse_cluster(settings["ENAT_CLUSTER_SIZE"]).capacity
    node = {"GPU": float(gpu["resources"]["limits"]["nvidia.com/gpu"]), "CPU": float(gpu["resources"]["limits"]["cpu"])}
    assert [*largest.nodes] == [node] * GROUPS["gpu"]["maxReplicas"]
    for section in (run.train, run.token_map):
        assert section.execution.num_workers == "all" and with_count(section, largest).execution.count == largest.total("GPU")


def test_ray_accepts_the_parameters_of_its_start_and_the_command_that_submits() -> None:
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts.scripts import start

    for group in [CLUSTER["spec"]["headGroupSpec"], *GROUPS.values()]:
        given = group["rayStartParams"]
        parsed = start.make_context("start", [f"--{name}={value}" for name, value in given.items()]).params
        assert {name.replace("-", "_") for name in given} <= parsed.keys()
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (container,) = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[:3] == ["ray", "job", "submit"]
    parsed = submit.make_context("submit", words[3:]).params
    assert parsed["address"] == f"http://{NAME}-head-svc:8265" and not parsed["no_wait"]
    assert parsed["entrypoint"][:2] == ("enat", "reevaluate")
    assert json.loads(parsed["metadata_json"]).keys() == {jobs.RUN, "enat.name"}, "`enat jobs` lists jobs with these keys"


def test_a_worker_that_is_to_end_drains_its_node_within_its_grace_period() -> None:
    from ray.scripts.scripts import drain_node

    for group in GROUPS.values():
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
        command, wait = script.split(" && ")
        assert shell == ["sh", "-c"] and command.startswith("ray drain-node ")
        words = shlex.split(command.replace("$RAY_ADDRESS", "host:6379"))
        parsed = drain_node.make_context("drain-node", words[2:]).params
        assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION" and parsed["node_id"] is None, "its own node"
        seconds = int(wait.removeprefix("sleep "))
        assert seconds < parsed["deadline_remaining_seconds"] < spec["terminationGracePeriodSeconds"]


def test_jobs_run_on_the_cluster() -> None:
    assert [job["metadata"]["name"] for job in JOBS] == ["imagenet256-evaluate", "imagenet256-token-map", "imagenet256-train"]
    for job in JOBS:
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": NAME}
        assert job["metadata"]["labels"]["app.kubernetes.io/name"] == job["metadata"]["name"]
        assert job["spec"]["metadata"] == dict.fromkeys((jobs.RUN, "enat.name"), job["metadata"]["name"])


def _built(folder: str) -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", INFRA / folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_jobs_name_no_queue_unless_kueue_is_chosen() -> None:
    for folder in ("kuberay", "kuberay/jobs"):
        assert "kueue" not in json.dumps(_built(folder))


def test_kueue_gets_jobs_that_it_admits() -> None:
    """By its documentation of RayJobs: a cluster of the job's own, which ends with the job and has no autoscaler; at most seven
    groups of workers. Queue and priorities are those of queues.yaml."""
    queues = documents(INFRA / "kueue" / "queues.yaml")
    assert all(queue["apiVersion"] == "kueue.x-k8s.io/v1beta1" for queue in queues)
    named = {(queue["kind"], queue["metadata"]["name"]): queue for queue in queues}
    built = [document for document in _built("kueue") if document["kind"] == "RayJob"]
    assert [job["metadata"]["name"] for job in built] == [job["metadata"]["name"] for job in JOBS]
    (group,) = named["ClusterQueue", "enat"]["spec"]["resourceGroups"]
    for job in built:
        labels, spec = job["metadata"]["labels"], job["spec"]
        local = named["LocalQueue", labels["kueue.x-k8s.io/queue-name"]]
        assert local["metadata"]["namespace"] == job["metadata"]["namespace"] == "enat"
        assert ("ClusterQueue", local["spec"]["clusterQueue"]) in named
        assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in named
        assert labels["app.kubernetes.io/name"] == job["metadata"]["name"], "jobs are created one at a time by this label"
        assert "clusterSelector" not in spec and spec["shutdownAfterJobFinishes"] is True
        cluster = spec["rayClusterSpec"]
        assert set(cluster) <= _CLUSTER and cluster["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in cluster
        groups = cluster["workerGroupSpecs"]
        assert len(groups) <= 7 and all(each["replicas"] == each["minReplicas"] == each["maxReplicas"] > 0 for each in groups)
        gpus = {each["groupName"]: each["replicas"] for each in groups}["gpu"]
        assert gpus == GROUPS["gpu"]["maxReplicas"], "ENAT_CLUSTER_SIZE counts on them"
        pods = [template["template"]["spec"] for template in (cluster["headGroupSpec"], *groups)]
        assert not [problem for pod in pods if (problem := _problem(_pod(pod)))]
        assert all(re.fullmatch(r"enat:\d+\.\d+\.\d+-(cpu|cuda)", each["image"]) for pod in pods for each in pod["containers"])
        counts = [(cluster["headGroupSpec"], 1), *((each, each["replicas"]) for each in groups)]
        needed = sum(
            count * float(container["resources"]["requests"].get("nvidia.com/gpu", 0))
            for each, count in counts
            for container in each["template"]["spec"]["containers"]
        )
        (quota,) = [each["nominalQuota"] for each in group["flavors"][0]["resources"] if each["name"] == "nvidia.com/gpu"]
        assert needed == float(quota)
    priority = {
        job["metadata"]["name"]: named["WorkloadPriorityClass", job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"]]
        for job in built
    }
    assert priority["imagenet256-evaluate"]["value"] > priority["imagenet256-train"]["value"]


def test_two_reevaluations_never_run_at_the_same_time() -> None:
    spec = CRON["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Etc/UTC"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0


# Rights --------------------------------------------------------------------------------------------------------------------


def _gibibytes(text: str) -> float:
    assert text.endswith("Gi")
    return float(text.removesuffix("Gi"))


def test_pods_meet_the_restricted_standard() -> None:
    for name, template in TEMPLATES.items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False and spec["serviceAccountName"].startswith("enat-"), name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert all(set(volume) - {"name"} <= {"emptyDir", "projected"} for volume in spec["volumes"]), name
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume), name


def test_containers_are_restricted_and_bounded() -> None:
    autoscaler = CLUSTER["spec"]["autoscalerOptions"]
    for name, container in [*CONTAINERS.items(), ("autoscaler", autoscaler)]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, name
        assert context["runAsNonRoot"] is True and context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context, (
            name
        )
        assert all({"cpu", "memory"} <= set(container["resources"][kind]) for kind in ("requests", "limits")), name
    for name, container in CONTAINERS.items():
        assert container["image"] in {"enat-cpu", "enat-cuda"}, name  # kustomize adds the version
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/home/enat"}, name  # its root is read-only


def test_caches_and_scratch_fit_into_a_pod_s_share_of_the_disk() -> None:
    """Otherwise the node evicts the pod; with the head, the driver and the cluster's state are lost."""
    (settings,) = of_kind("ConfigMap")
    for name in (f"{NAME} head", f"{NAME} decode", f"{NAME} gpu"):
        spec = TEMPLATES[name]["spec"]
        (ours,) = [container for container in spec["containers"] if container["name"].startswith("ray-")]
        own = {variable["name"]: variable["value"] for variable in ours.get("env", [])}  # takes precedence over envFrom
        size = {volume["name"]: _gibibytes(volume["emptyDir"]["sizeLimit"]) for volume in spec["volumes"] if "emptyDir" in volume}
        cache = float(own.get("ENAT_CACHE_GB", settings["data"]["ENAT_CACHE_GB"]))
        scratch = sum(value for volume, value in size.items() if volume != "cache")
        assert cache + scratch <= _gibibytes(ours["resources"]["limits"]["ephemeral-storage"]), name
        assert 1.2 * cache <= size["cache"], name  # temporary files are beside the cache


def test_nodes_are_probed_without_a_token() -> None:
    from ray.dashboard import http_server_agent

    nodes = {name: container for name, container in CONTAINERS.items() if "ray-" in name}
    assert len(nodes) == 3
    for name, container in nodes.items():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        expected = ("/api/gcs_healthz", 8265) if "head" in name else ("/api/local_raylet_healthz", 52365)
        checks = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
        assert [(check["path"], ports[check["port"]]) for check in checks] == [expected] * 3, name
    assert "/api/local_raylet_healthz" in http_server_agent.PUBLIC_EXACT_PATHS
    head = Path(http_server_agent.__file__).with_name("http_server_head.py").read_text()
    assert '"/api/gcs_healthz",  # GCS health check' in head  # among the paths that need no token


def test_only_the_autoscaler_may_use_the_api_of_kubernetes() -> None:
    (role,), (binding,) = of_kind("Role"), of_kind("RoleBinding")
    assert not of_kind("ClusterRole") and not of_kind("ClusterRoleBinding")
    rules = [(rule["apiGroups"], rule["resources"], set(rule["verbs"]), rule.get("resourceNames")) for rule in role["rules"]]
    assert rules == [([""], ["pods"], {"get", "list", "watch"}, None), (["ray.io"], ["rayclusters"], {"get", "patch"}, [NAME])]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["enat-autoscaler"]
    head = TEMPLATES[f"{NAME} head"]["spec"]
    assert head["serviceAccountName"] == "enat-autoscaler"
    mounted = {mount["name"] for container in head["containers"] for mount in container["volumeMounts"]}
    assert "kubernetes-token" not in mounted  # the container that runs users' drivers has no token
    accounts = {account["metadata"]["name"] for account in of_kind("ServiceAccount")}
    assert {template["spec"]["serviceAccountName"] for template in TEMPLATES.values()} <= accounts
    assert all(account["automountServiceAccountToken"] is False for account in of_kind("ServiceAccount"))


def test_the_autoscaler_finds_its_token_where_it_looks() -> None:
    from ray.autoscaler._private.kuberay import node_provider

    (mount,) = [mount for mount in CLUSTER["spec"]["autoscalerOptions"]["volumeMounts"] if mount["name"] == "kubernetes-token"]
    (volume,) = [volume for volume in TEMPLATES[f"{NAME} head"]["spec"]["volumes"] if volume["name"] == "kubernetes-token"]
    paths = set()
    for source in volume["projected"]["sources"]:
        (what,) = source.values()
        paths |= {f"{mount['mountPath']}/{item['path']}" for item in what.get("items", [what])}
    assert {node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH} <= paths


def test_no_manifest_contains_a_secret_and_workers_cannot_commit() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    (container,) = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": NAME, "key": "auth_token"}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"

    templates = of_kind("Secret")
    assert all(set(secret["stringData"].values()) == {""} for secret in templates)
    assert "secret.template.yaml" not in documents(INFRA / "kuberay" / "kustomization.yaml")[0]["resources"]
    assert "kuberay/secret.yaml" in (INFRA / ".gitignore").read_text().splitlines()
    used = {
        name: {source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source}
        for name, container in CONTAINERS.items()
    }
    assert set().union(*used.values()) == {secret["metadata"]["name"] for secret in templates}
    assert used[f"{NAME} head: ray-head"] == {"enat-driver", "enat-tracking"}
    assert used[f"{NAME} decode: ray-worker"] == used[f"{NAME} gpu: ray-worker"] == {"enat-worker", "enat-tracking"}


# Network -------------------------------------------------------------------------------------------------------------------


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "Exists" for each in expressions)
    has_keys = all(each["key"] in labels for each in expressions)
    return has_keys and all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _allows(direction: str, pod: dict[str, str], other: dict[str, str], port: int) -> bool:
    """Within the namespace, by the rules of NetworkPolicy: policies are additive, and a selected pod is closed to all else."""
    key = {"Ingress": "from", "Egress": "to"}[direction]
    specs = [policy["spec"] for policy in of_kind("NetworkPolicy")]
    policies = [spec for spec in specs if direction in spec["policyTypes"] and _matches(spec["podSelector"], pod)]
    for rule in (rule for policy in policies for rule in policy.get(direction.lower(), [])):
        peers, ports = rule.get(key), rule.get("ports")
        is_peer = peers is None or any("namespaceSelector" not in peer and _matches(peer["podSelector"], other) for peer in peers)
        if is_peer and (ports is None or port in {entry["port"] for entry in ports}):
            return True
    return not policies


def _may_reach(source: dict[str, str], target: dict[str, str], port: int) -> bool:
    return _allows("Egress", source, target, port) and _allows("Ingress", target, source, port)


def test_pods_reach_what_they_need_and_no_more() -> None:
    head = {"ray.io/cluster": "enat", "ray.io/node-type": "head"}
    worker = {"ray.io/cluster": "enat", "ray.io/node-type": "worker"}
    templates = [template for name, template in TEMPLATES.items() if "head" not in name and "metadata" in template]
    assert len(templates) == len(JOBS) + 1
    assert _may_reach(worker, head, 6379) and _may_reach(head, worker, 20000) and _may_reach(worker, worker, 30000)
    for submitter in (template["metadata"]["labels"] for template in templates):
        assert _may_reach(submitter, head, 8265)
        assert not _may_reach(submitter, head, 6379) and not _may_reach(submitter, worker, 8265)
    own = {"ray.io/cluster": "imagenet256-train-x7k2p", "ray.io/node-type": "head"}  # of a job that Kueue admitted
    assert _may_reach(own | {"ray.io/node-type": "worker"}, own, 6379)
    assert not _may_reach({"app": "another"}, head, 8265) and not _may_reach({}, worker, 10001)


def test_draining_a_node_waits_for_the_head() -> None:
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1 and "maxUnavailable" not in budget["spec"]  # which needs a scale of the owner
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": NAME, "ray.io/node-type": "head"}
