"""Folders and files of the hub, fetched by huggingface_hub itself from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.storage.external import HubReference, fetch_file, fetch_folder, parse_reference

REPOSITORY = "someone/tiny-clip"
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40}
FILES = {
    "config.json": b'{"model_type": "clip_text_model"}',
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": b"safe" * 1000,
    "onnx/model.safetensors": b"deeper",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
}


def content(name: str, commit: str) -> bytes:
    """Every commit has other bytes."""
    return FILES[name] + commit[:1].encode()


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks for: which commit a revision is, the commit's files, and each by HEAD and GET."""

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
        path = self.path.partition("?")[0].replace("%2F", "/")
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
        answer: Any = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit, "siblings": [{"rfilename": name} for name in FILES]}
        if kind == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(content(name, commit)), "oid": etag(name, commit)} for name in FILES
            ]
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
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches the network off as HF_HUB_OFFLINE=1 does."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# References ----------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_reference() -> None:
    for reference, expected in (
        ("hf://openai/clip-vit-large-patch14", HubReference("openai/clip-vit-large-patch14", None, None)),
        ("hf://openai/clip@main", HubReference("openai/clip", None, "main")),
        ("hf://o.w_n-er/n.a_m-e@refs/pr/7", HubReference("o.w_n-er/n.a_m-e", None, "refs/pr/7")),
        ("hf://owner/name/weights/model v2.safetensors", HubReference("owner/name", "weights/model v2.safetensors", None)),
        ("hf://owner/name/a/b.pth@0123abc", HubReference("owner/name", "a/b.pth", "0123abc")),
    ):
        assert parse_reference(reference) == expected


def test_other_references_are_refused() -> None:
    wrong = (
        "hf://",
        "hf://owner",
        "hf://owner/",
        "hf://owner/name/",
        "hf://owner/name@",
        "hf://owner/name@a@b",
        "hf:///owner/name",
    )
    for reference in (*wrong, "gs://bucket/name", "https://huggingface.co/openai/clip"):
        for fetch in (fetch_folder, fetch_file):
            with pytest.raises(ValueError, match=r"a place on the hub.*hf://owner/name"):
                fetch(reference)


def test_a_folder_and_a_file_cannot_be_taken_for_one_another() -> None:
    with pytest.raises(ValueError, match="names a file; a whole repository is needed: hf://owner/name"):
        fetch_folder("hf://owner/name/model.safetensors")
    with pytest.raises(ValueError, match="names a whole repository; a file is needed: hf://owner/name/path"):
        fetch_file("hf://owner/name@main")


def test_what_looks_like_a_repository_is_told_how_to_write_it() -> None:
    with pytest.raises(ValueError, match=r"^openai/clip is not a directory; a repository of the hub is written hf://openai/clip$"):
        fetch_folder("openai/clip")


def test_local_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    assert fetch_folder(str(tmp_path)) == fetch_folder("~") == tmp_path
    assert fetch_file(str(tmp_path / "file")) == fetch_file("~/file") == tmp_path / "file"
    for fetch, wrong in ((fetch_folder, tmp_path / "file"), (fetch_file, tmp_path), (fetch_folder, tmp_path / "none")):
        with pytest.raises(ValueError, match=r"is not a (directory|file); correct the path"):
            fetch(str(wrong))


# Fetching ------------------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_has_the_weights_and_texts_of_its_revision_and_no_code(hub: Hub) -> None:
    wanted = ("config.json", "merges.txt", "model.safetensors", "onnx/model.safetensors")
    for suffix, commit in (("", "main"), ("@v1", "v1"), ("@refs/pr/1", "refs/pr/1"), ("@" + "b" * 40, "v1")):
        assert files_of(fetch_folder(f"hf://{REPOSITORY}{suffix}")) == {name: content(name, COMMITS[commit]) for name in wanted}
    assert not any(path.endswith((".bin", ".py")) for _, path in hub.asked)


def test_a_folder_by_patterns(hub: Hub) -> None:
    assert list(files_of(fetch_folder(f"hf://{REPOSITORY}", ["config.json", "*.md"]))) == ["config.json"]


def test_a_folder_that_was_fetched_is_not_fetched_again(hub: Hub, offline: Any) -> None:
    folder = fetch_folder(f"hf://{REPOSITORY}")
    hub.asked.clear()
    assert fetch_folder(f"hf://{REPOSITORY}") == folder
    assert not any("/resolve/" in path for command, path in hub.asked if command == "GET")
    offline()
    hub.asked.clear()
    assert fetch_folder(f"hf://{REPOSITORY}") == folder
    assert hub.asked == []


def test_a_file_of_its_revision(hub: Hub, offline: Any) -> None:
    places = (
        ("model.safetensors", "", "main"),
        ("onnx/model.safetensors", "@v1", "v1"),
        ("model.safetensors", "@refs/pr/1", "refs/pr/1"),
    )
    paths = [fetch_file(f"hf://{REPOSITORY}/{name}{suffix}") for name, suffix, _ in places]
    assert [path.read_bytes() for path in paths] == [content(name, COMMITS[commit]) for name, _, commit in places]
    offline()
    assert [fetch_file(f"hf://{REPOSITORY}/{name}{suffix}") for name, suffix, _ in places] == paths


# What cannot be fetched ----------------------------------------------------------------------------------------------------


def test_the_reason_why_a_place_cannot_be_fetched_is_one_sentence(hub: Hub) -> None:
    for reference, message in (
        ("hf://someone/unknown", "the repository does not exist"),
        (f"hf://{REPOSITORY}@v2", "the repository has no such revision"),
        ("hf://gated/clip", "its owner grants access on request"),
        ("hf://broken/clip", "the hub cannot be reached, and the local cache does not hold it"),
        ("hf://-owner/name", "cannot be fetched: "),
        (f"hf://{'o' * 100}/name", "cannot be fetched: "),
    ):
        of_file = re.sub(r"(@\w+)?$", r"/model.safetensors\1", reference, count=1)
        for asked, fetch in ((reference, fetch_folder), (of_file, fetch_file)):
            with pytest.raises(ValueError, match=message) as caught:
                fetch(asked)
            assert str(caught.value).startswith(f"{asked} cannot be fetched: ") and "\n" not in str(caught.value)


def test_a_file_that_the_repository_does_not_have(hub: Hub) -> None:
    with pytest.raises(ValueError, match="the repository has no such file"):
        fetch_file(f"hf://{REPOSITORY}/missing.safetensors")


def test_patterns_that_nothing_fits(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"has no files that match \*\.gguf, \*\.md"):
        fetch_folder(f"hf://{REPOSITORY}", ["*.gguf", "*.md"])


def test_offline_without_a_cached_copy(hub: Hub, offline: Any) -> None:
    offline()
    for fetch, path in ((fetch_folder, ""), (fetch_file, "/model.safetensors")):
        with pytest.raises(ValueError, match="the hub cannot be reached, and the local cache does not hold it"):
            fetch(f"hf://{REPOSITORY}{path}")
    assert hub.asked == []


def test_a_folder_of_which_a_file_is_gone_from_the_cache_is_not_taken_for_whole(hub: Hub, offline: Any) -> None:
    (fetch_folder(f"hf://{REPOSITORY}") / "merges.txt").unlink()
    offline()
    with pytest.raises(ValueError, match="the local cache does not hold it"):
        fetch_folder(f"hf://{REPOSITORY}")


def test_no_server_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    for fetch, path in ((fetch_folder, ""), (fetch_file, "/model.safetensors")):
        with pytest.raises(ValueError, match="the hub cannot be reached"):
            fetch(f"hf://{REPOSITORY}{path}")
