"""A server on this machine that huggingface_hub takes for the hub: it makes repositories, takes commits, and serves their files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from services.json_replies import JsonHandler

TOKEN = "hf_of_this_test"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """repositories: files by name, by repository.   made: requests to create one.   commits: how many were taken."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        self.commits = 0


class _Handler(JsonHandler):
    server: Hub

    def do_POST(self) -> None:  # noqa: N802 (http.server calls it)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self.reply(200, {"warnings": [], "errors": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(content)
            self.server.made.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            self.reply(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(content)["files"]
            ]
            self.reply(200, {"files": files, "commitOid": COMMIT})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.server.commits += 1
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    taken = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[match[1]][entry["value"]["path"]] = taken
            url = f"{self.server.url}/{match[1]}/commit/{COMMIT}"
            self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.reply(404, {"error": path})

    def do_GET(self) -> None:  # noqa: N802 (http.server calls it)
        path = unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            files = self.server.repositories.get(match[1])
            if files is None:
                self.reply(404, {}, X_Error_Code="RepoNotFound")
            else:
                self.reply(200, {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            found = self.server.repositories[match[1]].items()
            self.reply(
                200, [{"type": "file", "path": name, "size": len(content), "oid": _etag(content)} for name, content in found]
            )
        elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)) and match[2] in self.server.repositories.get(
            match[1], {}
        ):
            content = self.server.repositories[match[1]][match[2]]
            self.reply(200, content, ETag=f'"{_etag(content)}"', X_Repo_Commit=COMMIT)
        else:
            self.reply(404, {}, X_Error_Code="EntryNotFound")

    def do_HEAD(self) -> None:  # noqa: N802 (http.server calls it)
        self.do_GET()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The library read its variables when it was imported."""
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
