"""What is sent to a cluster and what is refused, without a cluster: ids, arguments, credentials, resources, addresses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.cluster.capacity import Capacity, ResourceRequest, judge
from pipelines.cluster.resources import Workers
from pipelines.jobs import places, submission
from pipelines.jobs.progress import StageProgress, stages_in_progress
from pipelines.jobs.submission import Submission, resource_requests
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.storage.s3 import S3Folder
from pipelines.training.config import TrainExecution
from pipelines.workflow import driver, provenance

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
CLUSTER_STORE = ("store=s3://bucket/store",)


@pytest.fixture(scope="module")
def prepare() -> Callable[..., Submission]:
    """A submission of the digits with the code of this checkout, packed once."""
    packed = provenance.pack(DIGITS)

    def make(*overrides: str, config: Path = DIGITS, store: tuple[str, ...] = CLUSTER_STORE, **options: Any) -> Submission:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(submission, "pack_code", lambda _, schema: packed)
            return submission.prepare(config, (*store, *overrides), **options)

    return make


def commit_all(root: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "all"], cwd=root, check=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository whose code is sent in place of this one's."""
    root = tmp_path / "checkout"
    for name, text in {"enat/model.py": "width = 1\n", "configs/more.yaml": "name: more\n"}.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    commit_all(root)
    monkeypatch.setattr(submission, "pack_code", lambda config, schema: provenance.pack(config, root, schema=schema))
    return root


# Submissions ---------------------------------------------------------------------------------------------------------------


def test_equal_submissions_have_equal_ids(prepare: Callable[..., Submission]) -> None:
    first = prepare("train.num_steps=10")
    assert prepare("train.num_steps=10").run == first.run and first.run.startswith("enat-digits-")
    assert prepare("seed=0", "train.num_steps=10").run == first.run, "the resolved config counts, not how it is written"
    others = {prepare("train.num_steps=11").run, prepare().run}
    others |= {prepare("train.num_steps=10", image=image).run for image in ("enat:1", "enat:2")}
    assert len(others | {first.run}) == 5


def test_job_runs_the_config_with_its_overrides_and_records_its_code(prepare: Callable[..., Submission]) -> None:
    prepared = prepare("targets=[dataset]", "dataset.name=it's; rm -rf $HOME")
    words = shlex.split(prepared.entrypoint)
    assert words[:5] == ["python", "-m", "pipelines", "run", "configs/digits.yaml"]
    assert words[5:] == [*CLUSTER_STORE, "targets=[dataset]", "dataset.name=it's; rm -rf $HOME", "cluster.address=auto"]
    state = provenance.pack(DIGITS).state
    assert prepared.metadata["enat.commit"] == (state.commit or "unknown")
    assert prepared.metadata["enat.dirty"] == ("true" if state.diff_digest else "false")
    assert prepared.metadata["enat.diff_sha256"] == (state.diff_digest or "")
    assert prepared.metadata["enat.run"] == prepared.run and all(isinstance(value, str) for value in prepared.metadata.values())
    assert prepare(image="enat:1").metadata["enat.image"] == "enat:1" and prepare(image="enat:1").package is None


@pytest.mark.faults
def test_job_with_an_image_writes_its_config_and_runs_it(prepare: Callable[..., Submission], tmp_path: Path) -> None:
    """Runs the shell command, as an image with the code would."""
    prepared = prepare(
        "targets=[dataset]", f"workspace={tmp_path}", "tracking.enabled=false", store=(f"store={tmp_path}/store",), image="enat:1"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", prepared.entrypoint], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{prepared.run}.yaml").read_text() == DIGITS.read_text()
    assert any((tmp_path / "store" / "dataset").glob("*/manifest.json"))


@pytest.mark.slow
def test_config_is_sent_merged_with_its_bases(prepare: Callable[..., Submission], checkout: Path, tmp_path: Path) -> None:
    config, sent = tmp_path / "mine.yaml", tmp_path / "sent.yaml"
    config.write_text(f"{{base: {DIGITS}, name: mine, train: {{num_steps: 7}}}}")
    package = provenance.pack(config, checkout)
    for text in (prepare(config=config, image="enat:1").config_text, package.files[package.config].decode()):
        sent.write_text(text)
        run = load_run(sent)
        assert run == load_run(config) and (run.name, run.train.num_steps) == ("mine", 7)


@pytest.mark.slow
def test_places_that_the_cluster_cannot_see_are_refused(
    prepare: Callable[..., Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in ((), ("store=runs/store",), ("workspace=/elsewhere",)):
        with pytest.raises(ValueError, match="is a folder of this machine, which the cluster would not see; give store=s3://"):
            prepare(store=store)
    for override, named in (
        ("dataset={kind: images, path: photographs}", "dataset.path is photographs, a path of this machine"),
        ("reference.dataset={kind: images, path: photographs}", "reference.dataset.path is photographs"),
        ("tokenizer.weights=weights/vqgan.ckpt", "tokenizer.weights is weights/vqgan.ckpt"),
        ("variants={other: {train: {weights: enat.safetensors}}}", "variant other: train.weights is enat.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
            prepare(override)
    for place in ("/shared/photographs", "s3://datasets/photographs"):
        override = f"dataset={{kind: images, path: {place}}}"
        assert override in prepare(override).arguments
    assert prepare(store=("store=/shared/store",)).arguments == ("store=/shared/store", "cluster.address=auto")
    monkeypatch.chdir(tmp_path)
    arguments = prepare(store=(), allow_local_store=True).arguments
    assert {f"store={tmp_path}/runs/store", f"workspace={tmp_path}/runs"} <= set(arguments)


def _named(place: str) -> RunConfig:
    return load_run(DIGITS, ["dataset.kind=image_folder", f"dataset.path={place}"], is_dataset_here=False)


def test_a_dataset_that_only_this_machine_has_causes_a_warning(tmp_path: Path) -> None:
    (warning,) = places.check(_named(str(tmp_path)), is_this_machine=False)
    assert warning == f"dataset.path is {tmp_path}, which exists on this machine; the run fails unless all nodes share that path"
    assert places.check(_named(str(tmp_path)), is_this_machine=True) == []
    assert places.check(_named("/only/on/the/cluster"), is_this_machine=False) == []


@pytest.mark.slow
def test_a_dataset_in_a_bucket_without_objects_is_refused(make_bucket: Callable[..., S3Folder]) -> None:
    bucket = make_bucket("sets")
    for name in ("train/a/1.jpg", "train-other/1.jpg", "whole.tar", "part-0001.tar"):
        bucket.put_if_absent(name, b"bytes")
    for place in ("", "/", "/train", "/train/", "/whole.tar", "/part-{0001..0002}.tar", "/part-*.tar"):
        assert places.check(_named(bucket.uri + place), is_this_machine=False) == [], place
    for place in ("/trai", "/validation", "/train/b", "/whole", "/shard-*.tar"):
        expected = f"dataset.path is {bucket.uri}{place}, where the bucket has no objects. Fix the path, or upload"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            places.check(_named(bucket.uri + place), is_this_machine=False)
    with pytest.raises(ValueError, match=r"^dataset\.path: .*no-such-bucket"):
        places.check(_named("s3://no-such-bucket-anywhere/train"), is_this_machine=False)


@pytest.mark.slow
def test_a_bucket_that_this_machine_cannot_reach_causes_a_warning() -> None:
    run = load_run(
        DIGITS,
        ["dataset.kind=image_folder", "dataset.path=s3://bucket/train", "s3={endpoint_url: http://127.0.0.1:1, anonymous: true}"],
        is_dataset_here=False,
    )
    (warning,) = places.check(run, is_this_machine=False)
    assert warning.startswith("dataset.path could not be checked from this machine (")


def test_stages_in_progress_are_read_from_the_log() -> None:
    log = """▸ dataset
✓ dataset                abc  made in 1.0 s
✓ tokenizer              abc  reused
▸ token_map@b
▸ train
  train 12 of 100,000 steps  loss 0.5, 10 images/s
  ghost 1 of 2 steps
a line that a library prints
  train 1,200 of 100,000 steps  loss 0.4, 10 images/s
"""
    assert [each.describe() for each in stages_in_progress(log)] == ["token_map@b", "train 1,200 of 100,000 steps"]
    assert stages_in_progress(log + "✗ token_map@b abc\n✓ train  abc  made in 9 s\n") == []
    assert stages_in_progress("▸ a\x1b[31mb\n▸ \n✓\n") == [StageProgress("a")]


def test_a_job_says_who_submitted_it(prepare: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    assert prepare().metadata["enat.user"] == "ada"


def test_image_named_by_a_tag_causes_a_warning(prepare: Callable[..., Submission]) -> None:
    warning = prepare(image="enat:1").warning
    assert warning is not None and warning.startswith("the image enat:1 is named by a tag, and other code") and "\n" not in warning
    assert prepare(image="enat@sha256:" + "0" * 64).warning is None
    assert "tag" not in (prepare().warning or "")


@pytest.mark.slow
def test_unknown_targets_are_refused_as_by_the_run_itself(prepare: Callable[..., Submission]) -> None:
    for target in ("tran", "reconstruction", "captions"):
        with pytest.raises(ValueError, match=f"^targets names '{target}'; the stages of this run are") as refused:
            prepare(f"targets=[dataset, {target}]")
        with pytest.raises(ValueError, match=f"^targets names '{target}'") as by_run:
            graph.build(load_run(DIGITS, [f"targets=[{target}]"]))
        stages = [set(str(each.value).partition("are ")[2].split(", ")) for each in (refused, by_run)]
        assert stages[0] == stages[1]
    prepare("targets=[reconstruction, captions]", "reconstruction={}", "captions.encoder=hf://a/b")


@pytest.mark.slow
def test_config_is_checked_except_for_a_dataset_out_of_reach(prepare: Callable[..., Submission]) -> None:
    out_of_reach = ("dataset.kind=image_folder", "dataset.path=/only/on/the/cluster")
    assert prepare(*out_of_reach).package is not None
    with pytest.raises(ValueError, match="reuse"):
        prepare(*out_of_reach, "generate.sampler.reuse=true", "train.model.reuse=false")
    with pytest.raises(ValueError, match=r"cluster\.address is head:6379, but a job runs on the cluster it is sent to"):
        prepare("cluster.address=head:6379")
    assert prepare("cluster.address=auto").run == prepare().run


# Credentials ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_credentials_in_addresses_are_refused(prepare: Callable[..., Submission]) -> None:
    for override in (
        "tracking.uri=http://user:hunter2@mlflow:5000",
        "tracking.uri=postgresql://mlflow:hunter2/with/slash@db/mlflow",
        "dataset.path=https://bucket/images.tar?X-Amz-Credential=A&X-Amz-Signature=hunter2",
        "train.weights=s3://hunter2@bucket/model",
    ):
        with pytest.raises(ValueError, match=f"^{override.partition('=')[0]} holds a credential in an address") as refused:
            prepare(override)
        assert "hunter2" not in str(refused.value)
    for value in ("s3://bucket/prefix", "hf://owner/name@revision", "https://host:8443/path", "/data/a@b", "a@b.org"):
        assert f"dataset.name={value}" in prepare(f"dataset.name={value}").arguments


def test_credentials_in_a_config_are_refused_even_if_nothing_reads_them(
    prepare: Callable[..., Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is sent as it is, even if overrides replace its values, and so are its bases."""
    replaced, value = "tracking.uri=http://mlflow:5000", "tracking: {uri: 'http://user:hunter2@mlflow:5000'}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    config, child = tmp_path / "bad.yaml", tmp_path / "child.yaml"
    child.write_text("{base: bad.yaml, tracking: {uri: null}}")
    for line, found, path, overrides, options in (
        (value, "a credential in an address", config, (replaced,), {}),
        (value, "a credential in an address", config, (), {"image": "enat:1"}),
        (value, "a credential in an address", child, (), {"image": "enat:1"}),
        (f"# was {value}", "a credential in an address", config, (), {}),
        (f"# was {value}", "a credential in an address", config, (replaced,), {"image": "enat:1"}),
        ("# wJalrXUtnFEMI", "the value of AWS_SECRET_ACCESS_KEY", config, (), {"image": "enat:1"}),
    ):
        config.write_text(f"{DIGITS.read_text()}{line}\n")
        number = len(config.read_text().splitlines())
        with pytest.raises(ValueError, match=rf"^{config}, line {number}, holds {found}") as refused:
            prepare(*overrides, config=path, **options)
        assert not re.search("hunter2|wJalrXUtnFEMI", str(refused.value))


def test_credentials_in_code_other_configs_and_changes_are_not_sent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = checkout / "configs" / "more.yaml"
    other.write_text("name: more\ntracking: {uri: 'http://user:hunter2@mlflow:5000'}\n")
    with pytest.raises(ValueError, match=r"^configs/more\.yaml, line 2, holds a credential in an address"):
        submission.prepare(DIGITS, CLUSTER_STORE)
    commit_all(checkout)
    other.write_text("name: more\n")
    with pytest.raises(ValueError, match=r"^configs/more\.yaml, as it was committed or as it is now, holds a credential"):
        submission.prepare(DIGITS, CLUSTER_STORE)
    commit_all(checkout)
    assert submission.prepare(DIGITS, CLUSTER_STORE).package is not None
    monkeypatch.setenv("HF_TOKEN", "hf_wJalrXUtnFEMI")
    (checkout / "enat" / "model.py").write_text("token = 'hf_wJalrXUtnFEMI'\n")
    with pytest.raises(ValueError, match=r"(enat/model\.py|changes\.diff) holds the value of HF_TOKEN"):
        submission.prepare(DIGITS, CLUSTER_STORE)


@pytest.mark.slow
def test_values_of_secret_variables_are_refused_anywhere(
    prepare: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wJalrXUtnFEMI")
            with pytest.raises(ValueError, match=f"^dataset.name holds the value of {name}, .*; give the cluster the credential"):
                prepare("dataset.name=my-wJalrXUtnFEMI")
            assert "wJalrXUtnFEMI" not in str(dataclasses.asdict(prepare("train.num_steps=3")))


# Resources of a cluster ----------------------------------------------------------------------------------------------------


def _request(num_workers: int, cpus: float = 1, gpus: float = 0, min_workers: int | None = None) -> ResourceRequest:
    workers = TrainExecution(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus, min_workers=min_workers)
    return ResourceRequest(node="train", workers=workers)


def test_workers_fit_node_by_node_with_all_their_resources() -> None:
    small = Capacity(({"CPU": 6.0},) * 4)  # 24 CPUs, and no room for a worker with eight
    assert judge(_request(3, cpus=8), small).room == 0 and judge(_request(4, cpus=6), small).fits
    problem = judge(_request(3, cpus=8), small).problem or ""
    assert "nodes have room for 0; a worker needs all of its own on one node" in problem
    assert not judge(_request(5, cpus=6), small).fits and not judge(_request(1), Capacity(())).fits
    mixed = Capacity(({"CPU": 88.0, "GPU": 8.0}, {"CPU": 16.0}))
    assert judge(_request(8, cpus=8, gpus=1), mixed).fits and judge(_request(11, cpus=8), mixed).fits
    too_many = judge(_request(9, cpus=8, gpus=1), mixed)
    assert too_many.room == 8
    assert "asks for 9 GPUs (9 workers), but the cluster has 8; lower num_workers or gpus_per_worker" in (too_many.problem or "")
    elastic = Capacity(({"CPU": 2.0},))
    assert judge(_request(8, min_workers=2), elastic).fits and not judge(_request(8, min_workers=3), elastic).fits


@given(st.lists(st.integers(0, 12), max_size=5), st.integers(1, 4), st.integers(1, 5))
def test_room_is_what_placing_one_worker_after_another_finds(nodes: list[int], each: int, parts: int) -> None:
    """cpus_per_worker is a fraction, each / parts, or a whole number."""
    parts = parts if each < parts else 1
    placed, free = 0, [node * parts for node in nodes]
    while any(room >= each for room in free):
        free[next(index for index, room in enumerate(free) if room >= each)] -= each
        placed += 1
    workers = Workers(num_workers=1, cpus_per_worker=each / parts)
    assert Capacity(tuple({"CPU": float(node)} for node in nodes)).room_for(workers) == placed


def test_requests_are_those_of_the_stages_of_the_run(prepare: Callable[..., Submission], tiny_nodes: Callable[..., Any]) -> None:
    nodes = graph.build(load_run(DIGITS))
    of_graph = {(node.stage.name, node.stage.workers(node.config)) for node in nodes} - {(name, None) for name in graph.stages()}
    assert {(each.node.partition("@")[0], each.workers) for each in resource_requests(prepare().config)} == of_graph
    assert not {"dataset", "report"} & {name for name, _ in of_graph}, "these request no workers"
    untrained = prepare("targets=[train]", "train.num_steps=0").config
    assert "train" not in {each.node for each in resource_requests(untrained)}
    assert [each.node for each in resource_requests(prepare("targets=[token_map]").config)] == ["tokenizer", "token_map"]
    assert resource_requests(prepare("targets=[dataset]").config) == []
    for node in tiny_nodes():
        assert {id.partition("@")[0] for id in node.inputs.values()} <= graph.needed_by([node.stage.name]), node.id


def test_stages_that_the_store_has_need_no_room(prepare: Callable[..., Submission], tmp_path: Path) -> None:
    store, capacity = open_store(str(tmp_path / "store")), Capacity(({"CPU": 4.0},))
    run = prepare("targets=[token_map]", "tokenizer.execution.gpus_per_worker=1", store=(f"store={store.uri}",)).config
    with pytest.raises(ValueError, match=r"^tokenizer\.execution asks for 1 GPUs \(1 workers\), but the cluster has 0") as refused:
        submission.check_room(run, capacity)
    assert "could not be checked" not in str(refused.value)
    nodes, times = graph.build(run), dict.fromkeys(("seconds", "worker_seconds", "device_seconds"), 0)
    for node in nodes[:2]:  # dataset and tokenizer
        planned = {each.node.id: each for each in driver.plan(nodes, store)}
        made = {"created": "2026-01-02T03:04:05+00:00", "code": "test", **times}
        fields = {"stage_version": 1, "config": {}, "inputs": {}, "files": (), "provenance": made}
        store.commit(Manifest(stage=node.stage.name, key=str(planned[node.id].key), **fields))
    assert [item.is_reused for item in driver.plan(nodes, store)] == [True, True, False]
    submission.check_room(run, capacity)
    run = prepare("dataset.kind=image_folder", "dataset.path=/only/on/the/cluster", "generate.execution.num_workers=9").config
    unchecked = r"^generate\.execution asks .*the store could not be checked for finished stages \(.*/only/on"
    with pytest.raises(ValueError, match=unchecked):
        submission.check_room(run, capacity)


def test_a_cluster_that_adds_nodes_gets_jobs_that_do_not_fit_yet(prepare: Callable[..., Submission], tmp_path: Path) -> None:
    started: list[Any] = []
    start = lambda *given: started.append(given) or True  # noqa: E731
    cluster = SimpleNamespace(jobs=list, capacity=lambda: Capacity(()), start=start, job=lambda id: id)
    store = (f"store={tmp_path}/store",)
    with pytest.raises(ValueError, match="give --wait-for-nodes"):
        submission.submit(cluster, prepare("targets=[tokenizer]", store=store))  # type: ignore[arg-type]
    waiting = prepare("targets=[tokenizer]", store=store, has_autoscaler=True)
    assert submission.submit(cluster, waiting).outcome == "submitted"  # type: ignore[arg-type]
    ((id, _, environment, _),) = started
    assert id == waiting.run and environment["env_vars"]["ENAT_CLUSTER_GROWS"] == "1"


# Addresses without a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def web_server() -> Iterator[Callable[[bytes], str]]:
    """Start servers that give one answer to every request; returns the URL of each."""
    servers: list[HTTPServer] = []

    def start(answer: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Do not print requests."""

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# In a process of its own: Ray reads the token once per process, and that of this process belongs to the cluster of other tests.
_CONNECT = """
import json, sys
from pipelines.cluster import connection
from pipelines.jobs import client
connection.prepare_environment()
errors = []
for address in sys.argv[1:]:
    try:
        client.Cluster(address)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_addresses_without_a_cluster_are_refused(web_server: Callable[[bytes], str]) -> None:
    site, older = web_server(b"<html>a web site</html>"), web_server(b'{"ray_version": "2.44.0"}')
    malformed = ("auto", "head:6379", "ray://head:10001", "http://user:hunter2@head:8265", "ftp://head")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_AUTH_TOKEN"] = "of-these-tests-" + "0" * 20
    command = [sys.executable, "-c", _CONNECT, site, older, "http://127.0.0.1:1/", *malformed]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    of_site, of_older, of_nothing, *of_malformed = json.loads(done.stdout)
    assert of_site.startswith(f"{site} is not Ray's Jobs API")
    assert of_older.startswith(f"the cluster at {older} runs Ray 2.44.0, but this code needs 2.60")
    assert of_nothing.startswith("no Ray cluster with a Jobs API at http://127.0.0.1:1 (nothing listens there)")
    assert len(of_malformed) == len(malformed)
    assert all("is not an address of Ray's Jobs API; write http://HOST:8265" in error for error in of_malformed)
    assert not any("hunter2" in error for error in of_malformed)
