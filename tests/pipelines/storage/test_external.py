"""Files that others made: from a path, a bucket or the hub to a local path, or one sentence why not.

huggingface_hub itself fetches from a server on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from pipelines.storage.external import content_digest, folder_digest, local_file, local_folder
from pipelines.storage.s3 import S3Folder

KEY = "tokenizer.weights"
WEIGHTS = b"weights, as far as this module is concerned"
FOLDER = {"config.json": b"{}", "model.safetensors": b"weights", "text/merges.txt": b"a b"}
REST = {"model.bin": b"a pickle", "README.md": b"about"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _gets(endpoint) -> int:
    """Requests for the content of objects: not for lists, not for heads."""
    return sum(method == "GET" and "list-type" not in target for method, target, _ in endpoint.requests)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A path --------------------------------------------------------------------------------------------------------------------


def test_local_paths_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pth").write_bytes(WEIGHTS)
    assert local_file(str(tmp_path / "a.pth"), KEY) == local_file("~/a.pth", KEY) == tmp_path / "a.pth"
    assert local_folder(str(tmp_path), KEY) == local_folder("~", KEY) == tmp_path
    assert content_digest("~/a.pth", KEY) == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_wrong_path_is_named_with_the_key_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for find in (local_file, content_digest):
        for path in (tmp_path / "no.pth", tmp_path):
            with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {path} is not a file; correct the path"):
                find(str(path), KEY)
        with pytest.raises(ValueError, match=r"^tokenizer\.weights: .* cannot be read \(File name too long\)$"):
            find("x" * 300, KEY)
    for path in (tmp_path / "no", tmp_path / "file"):
        with pytest.raises(ValueError, match=rf"^captions\.encoder: {path} is not a directory; correct the path$"):
            local_folder(str(path), "captions.encoder")
    with pytest.raises(ValueError, match=r"openai/clip is not a directory; a repository of the hub is written hf://openai/clip$"):
        local_folder("openai/clip", KEY)


def test_an_imported_file_is_named_by_its_digest_and_need_not_exist() -> None:
    assert content_digest(f"sha256:{'ab' * 32}", KEY) == "ab" * 32
    with pytest.raises(ValueError, match=r"^tokenizer\.weights is sha256:abab\w+, .* enat import"):
        local_file(f"sha256:{'ab' * 32}", KEY)
    for reference in ("sha256:ab", f"sha256:{'AB' * 32}"):
        with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {reference} is not a file"):
            local_file(reference, KEY)


def test_a_folder_is_identified_by_weights_and_text_files(tmp_path: Path) -> None:
    def write(root: Path, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return folder_digest(root)

    digest = write(tmp_path / "a", FOLDER)
    assert digest == write(tmp_path / "b", dict(reversed((FOLDER | REST).items()))) == folder_digest(tmp_path / "a")
    moved = {name.replace("text/", ""): content for name, content in FOLDER.items()}
    for name, other in (("c", {**FOLDER, "config.json": b"{ }"}), ("d", {**FOLDER, "more.txt": b""}), ("e", moved)):
        assert write(tmp_path / name, other) != digest


# A bucket ------------------------------------------------------------------------------------------------------------------


def test_an_object_is_fetched_once_as_long_as_it_does_not_change(make_bucket: Callable[..., S3Folder], s3_endpoint, cache) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS, "a.pth.old": b"another one"})
    path = local_file(f"{bucket.uri}/a.pth", KEY, bucket.config)
    assert path.read_bytes() == WEIGHTS and path.name == "a.pth" and path.is_relative_to(cache)
    before = _gets(s3_endpoint)
    assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config) == path and _gets(s3_endpoint) == before
    s3_endpoint.fill(bucket, {"a.pth": b"newer"})
    assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config).read_bytes() == b"newer"
    assert content_digest(f"{bucket.uri}/a.pth", KEY, bucket.config) == hashlib.sha256(b"newer").hexdigest()
    assert path.read_bytes() == WEIGHTS, "a reader of the older one is not disturbed"


def test_weights_without_pickle_and_text_of_a_folder_are_fetched(make_bucket: Callable[..., S3Folder], s3_endpoint) -> None:
    bucket = make_bucket("clip")
    s3_endpoint.fill(bucket, FOLDER | REST)
    folder = local_folder(bucket.uri, KEY, bucket.config)
    assert _contents(folder) == FOLDER
    before = _gets(s3_endpoint)
    assert local_folder(bucket.uri, KEY, bucket.config) == folder and _gets(s3_endpoint) == before


def test_damaged_copies_of_fetched_weights_are_fetched_again(make_bucket: Callable[..., S3Folder], s3_endpoint, cache) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS})
    path = local_file(f"{bucket.uri}/a.pth", KEY, bucket.config)
    record = path.parent.parent / "sha256.json"
    for damage in (path, record):
        content = bytearray(damage.read_bytes())
        content[len(content) // 2] ^= 4
        damage.write_bytes(content)
        assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config).read_bytes() == WEIGHTS
        assert content_digest(f"{bucket.uri}/a.pth", KEY, bucket.config) == hashlib.sha256(WEIGHTS).hexdigest()


def test_weights_that_are_damaged_on_their_way_are_not_kept(
    make_bucket: Callable[..., S3Folder], s3_endpoint, cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS})
    with monkeypatch.context() as patch:
        patch.setattr(S3Folder, "download", lambda self, name, path: path.write_bytes(b"x" + WEIGHTS[1:]))
        with pytest.raises(ValueError, match=r"a\.pth was damaged on its way; run again"):
            local_file(f"{bucket.uri}/a.pth", KEY, bucket.config)
    assert local_file(f"{bucket.uri}/a.pth", KEY, bucket.config).read_bytes() == WEIGHTS


def test_an_interrupted_download_leaves_nothing(
    make_bucket: Callable[..., S3Folder], s3_endpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket("clip")
    s3_endpoint.fill(bucket, FOLDER)
    chunks = S3Folder.chunks

    def interrupted(self: S3Folder, name: str) -> Iterator[bytes]:
        if name == "model.safetensors":
            raise KeyboardInterrupt
        return chunks(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(S3Folder, "chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            local_folder(bucket.uri, KEY, bucket.config)
    assert list((cache / "downloads").iterdir()) == []
    assert (local_folder(bucket.uri, KEY, bucket.config) / "model.safetensors").read_bytes() == b"weights"


def test_a_file_that_the_bucket_lacks_is_named(make_bucket: Callable[..., S3Folder], s3_endpoint) -> None:
    bucket = make_bucket("weights")
    s3_endpoint.fill(bucket, {"a.pth": WEIGHTS})
    for name in ("b.pth", "a"):
        with pytest.raises(ValueError, match=rf"^tokenizer\.weights: {bucket.uri}/{name} does not exist; correct the URI$"):
            local_file(f"{bucket.uri}/{name}", KEY, bucket.config)
    with pytest.raises(
        ValueError, match=rf"^captions\.encoder: {bucket.uri} has no files that end in \.safetensors, \.json, \.txt$"
    ):
        local_folder(bucket.uri, "captions.encoder", bucket.config)
    with pytest.raises(ValueError, match=r"^tokenizer\.weights: .*s3://no-such-bucket"):
        local_file("s3://no-such-bucket/a.pth", KEY, bucket.config)


# The hub -------------------------------------------------------------------------------------------------------------------

REPOSITORY = "someone/tiny-clip"
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40}
FILES = {
    "config.json": b'{"model_type": "clip_text_model"}',
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": b"safe" * 1000,
    "onnx/model.safetensors": b"deeper",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "weights of v2.pth": b"with a space",
}


def content(name: str, commit: str) -> bytes:
    """Every commit has other bytes."""
    return FILES[name] + commit[:1].encode()


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks for: which commit a revision is, the commit's files, and each by HEAD and GET."""

    files = tuple(FILES)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        assert isinstance(self.server, Hub)
        self.server.asked.append((self.command, path))
        if path.split("/", 2)[1] in ("gated", "api") and "/gated/" in path:
            self.reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        elif "/broken/" in path:
            self.reply(500, b"{}")
        elif REPOSITORY not in path:
            self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        elif match := re.fullmatch(f"/api/models/{REPOSITORY}/(revision|tree)/(.+)", path):
            self.reply_about(match[1], match[2])
        elif match := re.fullmatch(f"/{REPOSITORY}/resolve/({'|'.join([*COMMITS, *COMMITS.values()])})/(.+)", path):
            self.reply_file(COMMITS.get(match[1], match[1]), match[2])
        else:
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound")

    do_HEAD = do_GET  # noqa: N815

    def reply_about(self, kind: str, revision: str) -> None:
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            return
        if kind == "tree":
            answer: Any = [
                {"type": "file", "path": name, "size": len(content(name, commit)), "oid": etag(name, commit)} for name in Hub.files
            ]
        else:
            siblings = [{"rfilename": name} for name in Hub.files]
            answer = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def reply_file(self, commit: str, name: str) -> None:
        if name not in FILES:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound")
            return
        self.reply(200, content(name, commit), ETag=f'"{etag(name, commit)}"', X_Repo_Commit=commit)


def etag(name: str, commit: str) -> str:
    return hashlib.sha1(content(name, commit), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server that huggingface_hub takes for the hub, and an empty cache. The library read its variables when it was imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        # Between attempts it would sleep, 22 seconds in all.
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches the network off as HF_HUB_OFFLINE=1 does."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_other_references_are_refused() -> None:
    wrong = ("", "owner", "owner/", "owner/name/", "owner/name@", "owner/name@a@b", "/owner/name")
    for reference in (*(f"hf://{place}" for place in wrong), "http://huggingface.co/x.pth", "https://a/clip"):
        for find in (local_folder, *([local_file] if not reference.startswith("https") else [])):
            with pytest.raises(ValueError, match=r"^tokenizer\.weights: .* is neither a local path nor a place on the hub, hf://"):
                find(reference, KEY)
    with pytest.raises(ValueError, match="names a file; a whole repository is needed: hf://owner/name"):
        local_folder("hf://owner/name/model.safetensors", KEY)
    with pytest.raises(ValueError, match="names a whole repository; a file is needed: hf://owner/name/path"):
        local_file("hf://owner/name@main", KEY)


def test_weights_and_text_of_a_revision_are_fetched_once(hub: Hub, offline: Callable[[], None]) -> None:
    wanted = ("config.json", "merges.txt", "model.safetensors", "onnx/model.safetensors")
    for suffix, commit in (("", "main"), ("@v1", "v1"), ("@refs/pr/1", "refs/pr/1"), ("@" + "b" * 40, "v1")):
        folder = local_folder(f"hf://{REPOSITORY}{suffix}", KEY)
        assert _contents(folder) == {name: content(name, COMMITS[commit]) for name in wanted}
    assert not any(path.endswith((".bin", ".py")) for _, path in hub.asked)
    hub.asked.clear()
    assert local_folder(f"hf://{REPOSITORY}@v1", KEY) == folder
    assert not any("/resolve/" in path for command, path in hub.asked if command == "GET")
    offline()
    hub.asked.clear()
    assert local_folder(f"hf://{REPOSITORY}@v1", KEY) == folder and hub.asked == []
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match="the local cache does not hold it"):
        local_folder(f"hf://{REPOSITORY}@v1", KEY)


def test_a_file_of_a_revision_is_fetched(hub: Hub, offline: Callable[[], None]) -> None:
    places = (
        ("model.safetensors", "", "main"),
        ("onnx/model.safetensors", "@v1", "v1"),
        ("weights of v2.pth", "@refs/pr/1", "refs/pr/1"),
    )
    paths = [local_file(f"hf://{REPOSITORY}/{name}{suffix}", KEY) for name, suffix, _ in places]
    assert [path.read_bytes() for path in paths] == [content(name, COMMITS[commit]) for name, _, commit in places]
    offline()
    assert [local_file(f"hf://{REPOSITORY}/{name}{suffix}", KEY) for name, suffix, _ in places] == paths


def test_the_reason_of_a_failed_fetch_is_one_sentence(
    hub: Hub, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(reference: str, message: str) -> None:
        of_file = re.sub(r"(@\w+)?$", r"/model.safetensors\1", reference, count=1)
        for asked, find in ((reference, local_folder), (of_file, local_file)):
            with pytest.raises(ValueError, match=message) as caught:
                find(asked, KEY)
            assert str(caught.value).startswith(f"{KEY}: {asked} cannot be fetched: ") and "\n" not in str(caught.value)

    not_reached = "the hub cannot be reached, and the local cache does not hold it"
    for reference, message in (
        ("hf://someone/unknown", "the repository does not exist"),
        (f"hf://{REPOSITORY}@v2", "the repository has no such revision"),
        ("hf://gated/clip", "its owner grants access on request"),
        ("hf://broken/clip", not_reached),
        ("hf://-owner/name", "cannot be fetched: "),
        (f"hf://{'o' * 100}/name", "cannot be fetched: "),
    ):
        check(reference, message)
    with pytest.raises(ValueError, match="the repository has no such file"):
        local_file(f"hf://{REPOSITORY}/missing.safetensors", KEY)
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "files", ("modeling.py",))
        with pytest.raises(ValueError, match=r"has no files that end in \.safetensors, \.json, \.txt"):
            local_folder(f"hf://{REPOSITORY}@v1", KEY)
    from huggingface_hub import constants

    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
        check(f"hf://{REPOSITORY}", not_reached)
    offline()
    hub.asked.clear()
    check(f"hf://{REPOSITORY}", not_reached)
    assert hub.asked == []
