"""An S3 endpoint over real HTTP on the loopback interface, and buckets in it. Answers can be lost, cut short or replaced.

The server is moto, or that of LocalStack if ENAT_TEST_S3 names the Python of an environment with its packages.
"""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage.s3 import S3Folder
from pipelines.storage.s3_client import S3Config

# A test must not reach a real bucket or find other credentials.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
_FORBIDDEN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")

SECOND = os.environ.get("ENAT_TEST_S3")
only_moto = pytest.mark.skipif(SECOND is not None, reason="needs the times or the access control of moto, or thousands of objects")

Environ = dict[str, Any]


@dataclass
class Fault:
    """What happens to the first `times` requests that match. lose: the work is done, and no answer is sent.
    cut: only so many bytes of the body are sent.   flip: one bit of the body is another.   status, code: this answer is sent, and
    nothing is done."""

    matches: Callable[[Environ], bool]
    times: int = 1
    lose: bool = False
    cut: int | None = None
    flip: bool = False
    status: str = ""
    code: str = ""


@dataclass
class S3Endpoint:
    """url: its address.   requests: method, path with query, and headers of each request, oldest first."""

    url: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def config(self) -> S3Config:
        return S3Config(endpoint_url=self.url, path_style=True)

    @property
    def boto(self) -> Any:
        """A client for preparing and inspecting buckets, separate from the tested ones."""
        import boto3

        return boto3.client("s3", endpoint_url=self.url)

    def fill(self, folder: S3Folder, contents: dict[str, bytes]) -> None:
        """Put many objects at once, without HTTP if the server is moto."""
        from moto.s3.models import s3_backends

        bucket, _, prefix = folder.uri.removeprefix("s3://").partition("/")
        client = self.boto if SECOND else None
        for name, content in contents.items():
            if client is not None:
                client.put_object(Bucket=bucket, Key=f"{prefix}/{name}".lstrip("/"), Body=content)
                continue
            s3_backends["123456789012"]["global"].put_object(bucket, f"{prefix}/{name}".lstrip("/"), content)

    @contextmanager
    def fault(self, method: str, name: str, **what: Any) -> Iterator[Fault]:
        """Requests with this method for a path that holds `name`."""
        fault = Fault(lambda environ: environ["REQUEST_METHOD"] == method and name in _target(environ), **what)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)


def _target(environ: Environ) -> str:
    return f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"


class _Application:
    """A server, with faults. S3 checks a condition and writes in one step. Conditional writes of servers that do not are serialized
    here: all of moto, uploads in parts of LocalStack."""

    def __init__(self, server: Any, endpoint: S3Endpoint) -> None:
        self.server, self.endpoint = server, endpoint
        self.one_by_one = threading.Lock()
        self.places = random.Random(0)

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        headers = {name.removeprefix("HTTP_"): value for name, value in environ.items() if name.startswith("HTTP_")}
        self.endpoint.requests.append((environ["REQUEST_METHOD"], _target(environ), headers))
        fault = next((fault for fault in self.endpoint.faults if fault.times > 0 and fault.matches(environ)), None)
        if fault is None:
            return self._answer(environ, start_response)
        fault.times -= 1
        if fault.status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(fault.status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{fault.code}</Code><Message>as the test asks</Message></Error>".encode()[: fault.cut]]
        if fault.lose:
            list(self._answer(environ, lambda *_: None))
            environ["werkzeug.socket"].shutdown(2)
            return []
        content = b"".join(self._answer(environ, start_response))
        if fault.flip and content:
            place = self.places.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1 << self.places.randrange(8)]) + content[place + 1 :]
        return [content[: fault.cut]]

    def _answer(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or (SECOND and environ["REQUEST_METHOD"] == "PUT"):
            return self.server(environ, start_response)
        with self.one_by_one:
            return [*self.server(environ, start_response)]


@contextmanager
def _second_server(python: str) -> Iterator[Callable[[Environ, Any], list[bytes]]]:
    """Starts LocalStack's server, and sends it what it is called with."""
    script = Path(__file__).with_name("localstack_server.py")
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())

        def forward(environ: Environ, start_response: Any) -> list[bytes]:
            headers = {name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
            headers.pop("EXPECT", None)
            headers |= {"Content-Type": kind} if (kind := environ.get("CONTENT_TYPE")) else {}
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(environ["REQUEST_METHOD"], environ["REQUEST_URI"], body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            kept = [pair for pair in answer.getheaders() if pair[0].lower() not in ("connection", "transfer-encoding")]
            start_response(f"{answer.status} {answer.reason}", kept)
            return [content]

        yield forward
        process.stdin.close()


@contextmanager
def _moto() -> Iterator[Any]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    yield DomainDispatcherApplication(create_backend_app)


@contextmanager
def serve() -> Iterator[S3Endpoint]:
    """An endpoint in threads of this process."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log(self, *_: Any) -> None:
            """Log nothing: answers are lost on purpose."""

    endpoint = S3Endpoint()
    with _second_server(SECOND) if SECOND else _moto() as application:
        server = make_server("127.0.0.1", 0, _Application(application, endpoint), threaded=True, request_handler=Handler)
        endpoint.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield endpoint
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[S3Endpoint]:
    """The environment names the endpoint, too: open_store("s3://...") finds it, here and in started processes."""
    with serve() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name in _FORBIDDEN:
            patch.delenv(name, raising=False)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint.url}.items():
            patch.setenv(name, value)
        yield endpoint


_numbers = count()


@pytest.fixture(scope="session")
def make_bucket(s3_endpoint: S3Endpoint) -> Callable[..., S3Folder]:
    """A folder in a bucket of its own: make_bucket("a/b") is below a prefix."""

    def make(prefix: str = "") -> S3Folder:
        bucket = f"bucket-{next(_numbers)}"
        s3_endpoint.boto.create_bucket(Bucket=bucket)
        return S3Folder(f"s3://{bucket}/{prefix}", s3_endpoint.config)

    return make
