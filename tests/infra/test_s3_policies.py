"""Bucket policies against the requests of the store. Each role does its work over HTTP and every request is recorded. A role's
policy must allow its own requests, and deny those that are not part of its work."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import pytest
from manifests import INFRA

from pipelines.artifacts import garbage
from pipelines.artifacts.lease import Leases
from pipelines.artifacts.manifest import USED, WORK, Manifest
from pipelines.artifacts.open import open_store
from pipelines.artifacts.store import ArtifactStore
from pipelines.run import kept_log
from pipelines.run.kept_log import KeptLog
from pipelines.storage.s3_client import S3Config, client_of

S3 = INFRA / "s3"
ROLES = ["reader", "stage-writer", "committer", "collector"]
BUCKET, PREFIX = "policies", "store"
TOKEN_MAP, TRAIN, OTHER = "a" * 64, "b" * 64, "c" * 64  # keys


# Requests and policies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """`action`: the name in IAM. `key`: of the object, or the prefix of a listing."""

    action: str
    key: str
    is_conditional: bool = False

    @property
    def resource(self) -> str:
        return f"arn:aws:s3:::{BUCKET}" if self.action == "s3:ListBucket" else f"arn:aws:s3:::{BUCKET}/{self.key}"


def _requests(prepared: Any) -> list[Request]:
    """The actions that one HTTP request needs, by AWS's table of operations and actions."""
    url = urlsplit(prepared.url)
    query = parse_qs(url.query, keep_blank_values=True)
    key = unquote(url.path).removeprefix(f"/{BUCKET}").lstrip("/")
    is_conditional = "If-None-Match" in prepared.headers
    match prepared.method:
        case "GET" if "list-type" in query:
            return [Request("s3:ListBucket", query["prefix"][0])]
        case "GET" | "HEAD":
            return [Request("s3:GetObject", key)]
        case "PUT":
            return [Request("s3:PutObject", key, is_conditional or "partNumber" in query)]
        case "POST" if "delete" in query:
            body = prepared.body if isinstance(prepared.body, bytes | str) else prepared.body.read()
            tree = ElementTree.fromstring(body)
            return [Request("s3:DeleteObject", element.text or "") for element in tree.iter() if element.tag.endswith("Key")]
        case "POST":  # starts or completes a multipart upload
            return [Request("s3:PutObject", key, is_conditional or "uploads" in query)]
        case "DELETE" if "uploadId" in query:
            return [Request("s3:AbortMultipartUpload", key)]
    raise AssertionError(f"{prepared.method} {prepared.url}")


def _policy(name: str, bucket: str = BUCKET, prefix: str = PREFIX) -> dict[str, Any]:
    return json.loads((S3 / f"{name}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", prefix))


def _is_allowed(policy: dict[str, Any], request: Request) -> bool:
    """As moto reads policies. moto ignores conditions, so the condition on a listing's prefix is checked here."""
    from moto.iam.access_control import IAMPolicy, PermissionResult

    statements = []
    for statement in policy["Statement"]:
        condition = statement.get("Condition")
        if condition is not None:
            assert statement["Action"] == ["s3:ListBucket"] and set(condition) == {"StringLike"}
            if not any(fnmatchcase(request.key, pattern) for pattern in condition["StringLike"]["s3:prefix"]):
                continue
        statements.append({key: value for key, value in statement.items() if key != "Condition"})
    judged = IAMPolicy(json.dumps({"Statement": statements})).is_action_permitted(request.action, request.resource)
    return judged == PermissionResult.PERMITTED


# The store at work ---------------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    store: ArtifactStore
    requests: list[Request]
    root: Path

    def file(self, name: str, content: bytes) -> Path:
        path = self.root / name.replace("/", "-")
        path.write_bytes(content)
        return path


@pytest.fixture
def recorded(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = S3Config(endpoint_url=s3_server, region="us-east-1", path_style=True)
    client = client_of(config)
    client.create_bucket(Bucket=BUCKET)
    found: list[Request] = []

    def record(request: Any, **_: Any) -> None:
        found.extend(_requests(request))

    client.meta.events.register("before-send.s3", record)
    yield Recorded(open_store(f"s3://{BUCKET}/{PREFIX}", config), found, tmp_path)
    client.meta.events.unregister("before-send.s3", record)
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


def _work_of_a_worker(recorded: Recorded) -> None:
    """Tasks and ranks write files, part records and checkpoints, remove checkpoints, and read existing files."""
    store = recorded.store
    for content in (b"bytes", b"other bytes"):  # the second gets a name with its digest
        store.put_file("token_map", TOKEN_MAP, "part-00000.parquet", recorded.file("part", content))
    record = store.put_file("train", TRAIN, f"{WORK}/step-00000100-a/rank-00000.safetensors", recorded.file("rank", b"1"))
    store.put_part("train", TRAIN, "checkpoint-00000100-a-00000-of-00001", {"step": 100})
    assert store.read_parts("train", TRAIN)
    store.fetch_file("train", TRAIN, record)
    store.discard_part("train", TRAIN, "checkpoint-00000100-a-00000-of-00001")
    store.discard_files("train", TRAIN, [record])
    assert store.read_manifest("dataset", OTHER) is None
    large = recorded.file("large", b"x" * (6 << 20))  # a multipart upload
    assert store.folder.put_if_absent(f"train/{TRAIN}/large.safetensors", large, part_size=5 << 20)
    changed = recorded.file("changed", b"x" * (6 << 20))
    with pytest.raises(ValueError, match="changed while it was written"):  # an aborted upload
        store.folder.put_if_absent(f"train/{TRAIN}/changed.safetensors", changed, "0" * 64, part_size=5 << 20)


def _work_of_a_driver(recorded: Recorded) -> Manifest:
    """The rest of a run: check that the store is writable, commit, clean up."""
    store = recorded.store
    store.check_writable()
    log = recorded.file("digits.log", b"a line")
    log_to_keep = KeptLog()
    kept_log.keep(log_to_keep, store, log)
    assert log_to_keep.place is not None and f"/{PREFIX}/.logs/digits-" in log_to_keep.place
    store.record_use("token_map", TOKEN_MAP)
    store.record_use("token_map", TOKEN_MAP)  # replaces the first
    with Leases(store) as leases:
        assert leases.take("token_map", TOKEN_MAP) is None
        leases.renew()
    record = store.put_file("token_map", TOKEN_MAP, "index.json", recorded.file("index", b"{}"))
    manifest = Manifest(stage="token_map", key=TOKEN_MAP, stage_version=1, config={}, inputs={}, files=(record,))
    store.put_file("token_map", TOKEN_MAP, f"{WORK}/state", recorded.file("state", b"2"))
    store.put_part("token_map", TOKEN_MAP, "00000", {"rows": 1})
    committed = store.commit(manifest)
    assert store.commit(manifest) == committed
    store.discard_work(committed)
    return committed


def _work_of_a_reader(recorded: Recorded, manifest: Manifest) -> None:
    store = recorded.store
    assert list(store.manifests()) == [manifest]
    assert store.read_manifest("token_map", OTHER) is None
    assert store.read_parts("token_map", TOKEN_MAP) == {}
    assert store.fetch(manifest, "index.json").read_bytes() == b"{}"


def _work_of_a_collector(recorded: Recorded, manifest: Manifest) -> None:
    """Remove everything. One manifest is written again, as it is if a run records its use during the collection."""
    store = recorded.store
    store.delete_manifest(manifest.stage, manifest.key)
    store.commit(manifest)
    planned = garbage.plan(store, limit=time.time() + 3600)
    outcome = garbage.collect(store, planned)
    assert outcome.removed and not outcome.spared


def _asked(recorded: Recorded, work: Callable[[], Any]) -> list[Request]:
    start = len(recorded.requests)
    work()
    return recorded.requests[start:]


def test_roles_may_do_their_work_and_no_more(recorded: Recorded) -> None:
    by_worker = _asked(recorded, lambda: _work_of_a_worker(recorded))
    by_driver = _asked(recorded, lambda: _work_of_a_driver(recorded))
    manifest = recorded.store.read_manifest("token_map", TOKEN_MAP)
    assert manifest is not None
    by_reader = _asked(recorded, lambda: _work_of_a_reader(recorded, manifest))
    by_collector = _asked(recorded, lambda: _work_of_a_collector(recorded, manifest))

    assert {request.action for request in by_worker} == {
        "s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload",
    }  # fmt: skip
    assert {request.action for request in by_reader} == {"s3:ListBucket", "s3:GetObject"}
    work = {
        "reader": by_reader,
        "stage-writer": by_reader + by_worker,
        "committer": by_reader + by_worker + by_driver,
        "collector": by_reader + by_collector,
    }
    for role in ROLES:
        refused = [request for request in work[role] if not _is_allowed(_policy(role), request)]
        assert not refused, (role, refused)
    # No role may do the work of the next one.
    changing = [request for request in recorded.requests if request.action not in {"s3:ListBucket", "s3:GetObject"}]
    assert changing and not any(_is_allowed(_policy("reader"), request) for request in changing)
    files = [request for request in changing if request.action == "s3:PutObject" and not request.key.endswith("/manifest.json")]
    assert files and not any(_is_allowed(_policy("collector"), request) for request in files)
    kept = {
        request.key.rpartition("/")[2].split("-")[0] for request in by_driver if not _is_allowed(_policy("stage-writer"), request)
    }
    assert kept == {"manifest.json", ".probe"}
    assert any(not _is_allowed(_policy("committer"), request) for request in by_collector)
    # The store writes without a condition only where bucket-policy.json makes an exception.
    (exceptions,) = [statement["NotResource"] for statement in _policy("bucket-policy")["Statement"] if "NotResource" in statement]
    overwriting = {request for request in recorded.requests if request.action == "s3:PutObject" and not request.is_conditional}
    assert overwriting and all(any(fnmatchcase(request.resource, pattern) for pattern in exceptions) for request in overwriting)


def test_roles_have_no_rights_beyond_their_prefix_and_cannot_remove_committed_objects() -> None:
    outside = [
        Request("s3:GetObject", "mlflow/1/artifacts/model"),
        Request("s3:PutObject", "elsewhere/file"),
        Request("s3:DeleteObject", f"{PREFIX}-other/a"),
        Request("s3:ListBucket", "elsewhere/"),
        Request("s3:ListBucket", ""),
        Request("s3:PutBucketPolicy", ""),
    ]
    files = ("manifest.json", "part-00000.parquet", "model.safetensors")
    removing = [Request("s3:DeleteObject", f"{PREFIX}/train/{TRAIN}/{name}") for name in files]
    for role in ROLES:
        refused = outside + (removing if role != "collector" else [])
        assert not [(role, request) for request in refused if _is_allowed(_policy(role), request)]
    tracking = _policy("tracking")
    assert _is_allowed(tracking, Request("s3:PutObject", "mlflow/1/artifacts/model/README.md"))
    assert not _is_allowed(tracking, Request("s3:GetObject", f"{PREFIX}/train/k/model.safetensors"))
    datasets = json.loads((S3 / "dataset-reader.json").read_text().replace("DATASETS", BUCKET))
    reading = [Request("s3:GetObject", "imagenet/train/a.jpg"), Request("s3:ListBucket", "")]
    assert all(_is_allowed(datasets, request) for request in reading)
    assert not _is_allowed(datasets, Request("s3:PutObject", "imagenet/train/a.jpg"))


# Files ---------------------------------------------------------------------------------------------------------------------


def test_policies_are_well_formed() -> None:
    """Actions are those of AWS's description of its API, as botocore ships it. IAM calls ListObjectsV2 s3:ListBucket."""
    description = next(iter(sorted((files("botocore") / "data" / "s3").iterdir(), key=str))) / "service-2.json.gz"
    known = {f"s3:{name}" for name in json.loads(gzip.decompress(description.read_bytes()))["operations"]} | {"s3:ListBucket"}
    policies = [path for path in sorted(S3.glob("*.json")) if path.stem != "lifecycle"]
    assert {*ROLES, "tracking", "dataset-reader", "bucket-policy"} == {path.stem for path in policies}
    for path in policies:
        document = json.loads(path.read_text())
        assert document["Version"] == "2012-10-17"
        for statement in document["Statement"]:
            place = (path.name, statement["Sid"])
            assert statement["Effect"] in {"Allow", "Deny"} and statement["Sid"].isalnum(), place
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert all(action in known or (action == "s3:*" and statement["Effect"] == "Deny") for action in actions), place
            if statement["Effect"] == "Allow":
                assert "Principal" not in statement and "NotResource" not in statement, place
                buckets = [resource.removeprefix("arn:aws:s3:::") for resource in statement["Resource"]]
                assert not {"*", *statement["Resource"]} & set(buckets), place


def test_the_bucket_refuses_overwriting_and_plain_http() -> None:
    """Conditions as in AWS's user guide, "Enforce conditional writes": multipart uploads are exempt until they are completed."""
    encrypted, write_once = _policy("bucket-policy")["Statement"]
    assert encrypted["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} and encrypted["Effect"] == "Deny"
    assert write_once["Effect"] == "Deny" and write_once["Action"] == "s3:PutObject"
    assert write_once["Condition"] == {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}
    # MLflow writes without a condition; in an artifact only the record of its last use and its lease are replaced.
    replaced = ("mlflow/*", f"*/{USED}", f"*/{WORK}/lease.json")
    assert write_once["NotResource"] == [f"arn:aws:s3:::{BUCKET}/{each}" for each in replaced]


def test_a_bucket_accepts_all_settings(s3_server: str, s3_environment: dict[str, str]) -> None:
    import boto3

    words = ["settings", "--versioning", "--lifecycle", S3 / "lifecycle.json", "--policy", S3 / "bucket-policy.json"]
    done = subprocess.run(
        [sys.executable, S3 / "create_bucket.py", *words],
        env=s3_environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    client = boto3.client(
        "s3", endpoint_url=s3_server, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    rules = {rule["ID"]: rule for rule in client.get_bucket_lifecycle_configuration(Bucket="settings")["Rules"]}
    assert rules["unfinished-uploads"]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert rules["deleted-objects"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    assert not any("Days" in rule.get("Expiration", {}) for rule in rules.values())  # existing objects never expire
    assert "arn:aws:s3:::settings/*" in client.get_bucket_policy(Bucket="settings")["Policy"]


def test_a_bucket_that_cannot_be_created_is_reported(s3_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, S3 / "create_bucket.py", "any"],
        env=s3_environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("any cannot be set up: ") and "Traceback" not in done.stderr
