"""A proxy before an S3 server that damages answers, loses them, or gives others, while a stage works on a store in a bucket."""

from __future__ import annotations

import http.client
import random
import shutil
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from oracle import STAGES, Laboratory, Outcome, differences, leftovers

from pipelines.artifacts.open import open_store
from pipelines.storage.s3_client import S3Config
from services.s3_server import S3Endpoint, serve

KINDS = ("500", "503", "skew", "reset", "lost", "cut", "flip", "flip sent")
_REFUSALS = {"500": "InternalError", "503": "SlowDown", "403": "RequestTimeTooSkewed", "400": "BadDigest"}
_ATTEMPTS = 5
_numbers = count()


def network(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    """Up to eight faults of requests while one command runs; the command is repeated until it succeeds."""
    stage = rng.choice(("token_map", "train", "generate", "reference", "evaluate"))
    with serve() as endpoint, proxy(endpoint.url, rng) as faults:
        store = open_store(f"s3://bucket-{next(_numbers)}/store", S3Config(endpoint_url=endpoint.url, path_style=True))
        fill(endpoint, lab, store, stage)
        shutil.rmtree(lab.folder / "cache", ignore_errors=True)
        arguments = [
            *lab.run_of(lab.folder / "work", stage),
            f"store={store.uri}",
            f"s3={{endpoint_url: '{faults.url}', path_style: true}}",
        ]
        faults.left, texts, code = rng.randint(3, 8), "", None
        for _ in range(_ATTEMPTS):
            command = lab.start(*arguments, cluster=lab.cluster)
            code, log = command.wait(), str(command.log)
            texts += command.text
            if not code:
                break
        faults.left = 0
        wrong = differences(store, lab.oracle, STAGES[: STAGES.index(stage) + 1]) if code == 0 else []
        twice = leftovers(store) if code == 0 else []
    outcomes = [Outcome(f"{stage}: {what}", log=log, is_rough="Traceback" in texts) for what in faults.done]
    told = any(line.startswith("enat: ") for line in texts.splitlines())
    for outcome in outcomes:
        if told:
            outcome.verdict = "detected"
        if code != 0:
            outcome.verdict, outcome.note = "hung", f"exit code {code}: {texts.strip().splitlines()[-1:]}"
        elif wrong:
            outcome.verdict, outcome.note = "silent", "; ".join(wrong[:3])
        elif twice:
            outcome.verdict, outcome.note = "doubled", ", ".join(twice[:3])
    return outcomes


def fill(endpoint: S3Endpoint, lab: Laboratory, store: Any, stage: str) -> None:
    """All that comes before a stage, without HTTP."""
    endpoint.boto.create_bucket(Bucket=store.uri.split("/")[2])
    before = STAGES[: STAGES.index(stage)]
    contents = {
        p.relative_to(lab.oracle).as_posix(): p.read_bytes()
        for name in before
        for p in (lab.oracle / name).rglob("*")
        if p.is_file()
    }
    endpoint.fill(store.folder, contents)


@dataclass
class Faults:
    """url: of the proxy.   left: faults still to come.   done: what was done to which request.   is_away: nothing is answered."""

    url: str
    rng: random.Random
    kinds: tuple[str, ...]
    is_away: bool = False
    left: int = 0
    done: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def draw(self, request: str) -> str | None:
        with self.lock:
            if self.is_away:
                return "reset"
            if self.left == 0 or self.rng.random() > 0.15:
                return None
            self.left -= 1
            kind = self.rng.choice(self.kinds)
            self.done.append(f"{kind} of {request}")
            return kind


@contextmanager
def proxy(url: str, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Iterator[Faults]:
    """Before the server at a URL."""
    faults = Faults("", rng, kinds)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with suppress(ConnectionError):
                super().handle_one_request()

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = bytearray(self.rfile.read(length))
            fault = faults.draw(f"{self.command} {self.path.partition('?')[0].rpartition('/')[2]}")
            if fault in ("500", "503", "skew"):
                self.refuse("403" if fault == "skew" else fault)
            elif fault == "reset":
                self.reset()
            elif fault == "flip sent" and body and self.is_checked():
                self.refuse("400")  # as S3 does, which compares the content with its checksum
            else:
                if fault == "flip sent" and body:
                    body[len(body) // 2] ^= 1
                self.forward(bytes(body), fault)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 (named by http.server)

        def is_checked(self) -> bool:
            return any(name.lower().startswith(("x-amz-checksum", "x-amz-trailer", "content-md5")) for name in self.headers)

        def refuse(self, status: str) -> None:
            content = f"<Error><Code>{_REFUSALS[status]}</Code><Message>of the campaign</Message></Error>".encode()
            self.send(int(status), {"Content-Type": "application/xml", "Content-Length": str(len(content))}, content)

        def forward(self, body: bytes, fault: str | None) -> None:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            given = connection.getresponse()
            content, headers = (
                bytearray(given.read()),
                {k: v for k, v in given.getheaders() if k.lower() not in ("transfer-encoding", "connection")},
            )
            connection.close()
            headers["Content-Length"] = headers.get("Content-Length", str(len(content)))
            if fault == "flip" and content:
                content[len(content) // 2] ^= 1
            if fault == "cut" and content:
                self.send(given.status, headers, bytes(content[: len(content) // 2]))
            elif fault in ("lost", "cut"):
                self.reset()
                return
            else:
                self.send(given.status, headers, bytes(content))
            self.close_connection = self.close_connection or fault is not None

        def send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    faults.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield faults
    finally:
        server.shutdown()
