"""Files over https, from a server on this machine: fetched once, limited in size, and refused in one sentence."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage import web
from pipelines.storage.base import AccessError
from pipelines.storage.external import content_digest, local_file, local_folder
from services.https_server import Page, WebServer, https_server

KEY = "tokenizer.weights"
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    with https_server(monkeypatch, tmp_path) as made:
        made.pages["/a.pth"] = Page(WEIGHTS, headers={"ETag": '"1"'})
        yield made


def kept(cache: Path) -> list[Path]:
    return list((cache / "downloads").glob("*"))


def test_a_file_is_fetched_once_and_again_if_the_server_states_another_version(server: WebServer, cache: Path) -> None:
    path = local_file(f"{server.url}/a.pth", KEY)
    assert path.read_bytes() == WEIGHTS and path.suffix == ".pth"
    assert content_digest(f"{server.url}/a.pth", KEY) == hashlib.sha256(WEIGHTS).hexdigest()
    assert local_file(f"{server.url}/a.pth", KEY) == path and len(kept(cache)) == 1
    server.pages["/a.pth"] = Page(WEIGHTS[::-1], headers={"ETag": '"2"'})
    assert local_file(f"{server.url}/a.pth", KEY).read_bytes() == WEIGHTS[::-1] and len(kept(cache)) == 2


def test_a_damaged_copy_is_fetched_again(server: WebServer) -> None:
    path = local_file(f"{server.url}/a.pth", KEY)
    for damaged in (path, path.with_name("sha256")):
        damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
        assert local_file(f"{server.url}/a.pth", KEY).read_bytes() == WEIGHTS


def test_redirects_are_followed_to_https_only(server: WebServer, cache: Path) -> None:
    server.pages["/moved"] = Page(status=302, headers={"Location": f"{server.url}/a.pth"})
    assert local_file(f"{server.url}/moved", KEY).read_bytes() == WEIGHTS
    before = kept(cache)
    for place in (f"http://127.0.0.1:{server.server_port}/a.pth", "file:///etc/passwd", "ftp://127.0.0.1/a"):
        server.pages["/moved"] = Page(status=302, headers={"Location": place})
        with pytest.raises(
            ValueError, match=r"/moved (leads to an address that is not https://|cannot be fetched: the server answers 302);"
        ):
            local_file(f"{server.url}/moved", KEY)
    assert kept(cache) == before


@pytest.mark.parametrize("stated", [-1, None])
def test_files_above_the_limit_are_refused(
    server: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch, stated: int | None
) -> None:
    """Whether the server states the size or not."""
    monkeypatch.setattr(web, "MAX_BYTES", len(WEIGHTS) - 1)
    server.pages["/a.pth"] = Page(WEIGHTS, stated=stated)
    with pytest.raises(ValueError, match=r"^tokenizer\.weights: https://\S+/a\.pth has (more than )?256 kB"):
        local_file(f"{server.url}/a.pth", KEY)
    assert kept(cache) == []
    monkeypatch.setattr(web, "MAX_BYTES", len(WEIGHTS))
    assert local_file(f"{server.url}/a.pth", KEY).read_bytes() == WEIGHTS


def test_a_file_that_ends_early_is_not_kept(server: WebServer, cache: Path) -> None:
    server.pages["/a.pth"] = Page(WEIGHTS[:-5], stated=len(WEIGHTS))
    with pytest.raises(ValueError, match=r"a\.pth (ended after|cannot be reached)"):
        local_file(f"{server.url}/a.pth", KEY)
    assert kept(cache) == []


def test_what_is_no_file_is_one_sentence_without_the_query(server: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages["/page"] = Page(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    server.pages["/closed"] = Page(status=403)
    for path, message in (
        ("/page", "is a web page, not a file; open it in a browser, and give the downloaded file"),
        ("/closed", "cannot be fetched: the server answers 403; look at it in a browser"),
        ("/missing", "cannot be fetched: the server answers 404; correct the address"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            local_file(f"{server.url}{path}?token=secret", KEY)
        assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
        assert str(refused.value).startswith(f"{KEY}: https://")
    with pytest.raises(ValueError, match="is neither a local path nor a place on the hub"):
        local_folder(f"{server.url}/a", KEY)
    assert kept(cache) == []


def test_servers_without_a_trusted_certificate_or_none_at_all_are_failures(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    with pytest.raises(AccessError, match=r"cannot be reached: .*certificate verify failed"):
        web.fetch(f"{server.url}/a.pth")
    with pytest.raises(AccessError, match="cannot be reached"):
        web.fetch("https://127.0.0.1:9/a.pth")
