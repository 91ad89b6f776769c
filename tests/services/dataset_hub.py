"""A server on this machine that huggingface_hub takes for the hub, with repositories of datasets: listings, and files by ranges."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

from services.json_replies import JsonHandler

_LFS_BYTES = 2000  # larger files are in LFS, whose digest is a sha256
_PAGE = 7  # entries of one answer; the hub has 1,000
TOKEN = "hf_token_of_this_test"


@dataclass
class Repository:
    """commits: files by name, by commit.   branches: commits by name.   token: that a reader must have; None for everybody."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of all of these files, to which the branch moves."""
        names = hashlib.sha1(repr([len(self.commits), sorted(files)]).encode(), usedforsecurity=False).hexdigest()
        self.commits[names] = dict(files)
        self.branches[branch] = names
        return names


class DatasetHub(ThreadingHTTPServer):
    """asked: path, Range and Authorization of each request.   damage: changes the body of a file before it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.damage = lambda name, body: body

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave before the end."""

    def ranges(self) -> list[str]:
        """The ranges of files that were read."""
        return [span for path, span, _ in self.asked if span is not None and "/resolve/" in path]


class _Handler(JsonHandler):
    server: DatasetHub

    def do_GET(self) -> None:  # noqa: N802 (http.server calls it)
        path, _, query = self.path.partition("?")
        self.server.asked.append((unquote(path), self.headers.get("Range"), self.headers.get("Authorization")))
        match = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None or not self._may_read(repository):
            self.reply(404, {}, X_Error_Code="RepoNotFound")
            return
        revision = unquote(match[3] or "main")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self.reply(404, {}, X_Error_Code="RevisionNotFound")
            return
        files, name = repository.commits[commit], unquote(match[4] or "")
        if match[2] == "resolve":
            self._file(files, name)
        elif match[2] == "tree":
            self._tree(files, name, {key: values[0] for key, values in parse_qs(query).items()}, path)
        else:
            self.reply(200, {"id": match[1], "sha": commit, "siblings": [{"rfilename": each} for each in files]})

    do_HEAD = do_GET  # noqa: N815

    def _may_read(self, repository: Repository) -> bool:
        return repository.token is None or self.headers.get("Authorization") == f"Bearer {repository.token}"

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self.reply(404, {}, X_Error_Code="EntryNotFound")
            return
        content, span = files[name], re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part = content[int(span[1]) : int(span[2]) + 1 if span[2] else None] if span else content
        extra = {"Content_Range": f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(content)}"} if span else {}
        self.reply(206 if span else 200, self.server.damage(name, part), ETag='"x"', **extra)

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, str], path: str) -> None:
        start = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(start)}
        folders = {str(parent) for name in below for parent in PurePosixPath(name).parents if str(parent).startswith(start or "")}
        folders -= {".", folder}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        entries += [_entry(name, content) for name, content in sorted(below.items())]
        if query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"]).removeprefix(start)]
        if not entries:
            self.reply(404, {}, X_Error_Code="EntryNotFound")
            return
        at = int(query.get("cursor", "0"))
        query = {**query, "cursor": str(at + _PAGE)}
        following = f"{self.server.url}{path}?" + "&".join(f"{key}={value}" for key, value in query.items())
        link = {"Link": f'<{following}>; rel="next"'} if at + _PAGE < len(entries) else {}
        self.reply(200, entries[at : at + _PAGE], **link)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if len(content) > _LFS_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry |= {"oid": "1" * 40, "lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
    return entry


@contextmanager
def dataset_hub() -> Iterator[DatasetHub]:
    with DatasetHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
