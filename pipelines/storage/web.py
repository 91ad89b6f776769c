"""Single files from web servers, over https only.

A first request states the version of the file. Another one fetches it into the cache (cache.py), with its sha256 beside it.
"""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.formatting import show_size
from pipelines.storage import cache
from pipelines.storage.base import CHUNK, AccessError, digest_of, file_digest
from pipelines.storage.redaction import without_credentials

MAX_BYTES = 32 << 30  # of one file: four times the weights of the largest published model
_DIGEST = "sha256"
_SECONDS = 60  # without a byte
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0917 (as urllib calls it)
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if not newurl.startswith("https://"):
            raise ValueError(f"{without_credentials(req.full_url)} leads to an address that is not https://; give another one")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str) -> Path:
    """The local copy of a file, fetched again only if the server states another version.

    Raises ValueError for an address that gives no file, or one that is larger than MAX_BYTES, and AccessError if the server cannot
    be reached.
    """
    shown = without_credentials(url)
    with _answer(url, shown) as head:  # not by HEAD, which signed addresses refuse; the body is not read
        version = [url, head.headers.get("ETag"), head.headers.get("Last-Modified"), head.headers.get("Content-Length")]
        size = _size(head.headers.get("Content-Length"), shown)
        if (head.headers.get("Content-Type") or "").startswith("text/html"):
            raise ValueError(f"{shown} is a web page, not a file; open it in a browser, and give the downloaded file")
    name = _name(url)

    def download(folder: Path) -> None:
        arrived = 0
        with _answer(url, shown) as answer, (folder / name).open("wb") as file:
            while chunk := answer.read(CHUNK):
                arrived += len(chunk)
                if arrived > MAX_BYTES:
                    raise ValueError(f"{shown} has more than {show_size(MAX_BYTES)}, the most that is fetched")
                file.write(chunk)
        if size is not None and arrived != size:
            raise AccessError(f"{shown} ended after {arrived:,} of {size:,} bytes; run again, and check the network")
        (folder / _DIGEST).write_text(file_digest(folder / name))

    def is_whole(folder: Path) -> bool:
        try:
            return cache.holds(folder / name, (folder / name).stat().st_size, (folder / _DIGEST).read_text())
        except (OSError, ValueError):
            return False

    return cache.fetch_folder(digest_of(version)[:32], size or 0, download, is_whole) / name


@contextmanager
def _answer(url: str, shown: str) -> Iterator[Any]:
    """The answer of a server. Errors become one sentence without the query of the address, which may hold a key."""
    try:
        opener = urllib.request.build_opener(_OnlyHttps, urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        request = urllib.request.Request(url, headers={"User-Agent": "enat"})  # noqa: S310 (https only)
        with opener.open(request, timeout=_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        advice = "correct the address" if error.code in (404, 410) else "look at it in a browser"
        raise ValueError(f"{shown} cannot be fetched: the server answers {error.code}; {advice}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise AccessError(f"{shown} cannot be reached: {reason}") from error


def _size(stated: str | None, shown: str) -> int | None:
    if stated is None or not stated.isdecimal():
        return None
    if int(stated) > MAX_BYTES:
        raise ValueError(f"{shown} has {show_size(int(stated))}; at most {show_size(MAX_BYTES)} are fetched")
    return int(stated)


def _name(url: str) -> str:
    """The name of the local copy, with the suffix of the address: it says how weights are read."""
    suffix = PurePosixPath(unquote(urlsplit(url).path)).suffix
    return "file" + (suffix if suffix in _SUFFIXES else "")
