"""An https server on this machine, with a certificate that this process trusts."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Page:
    """An answer. headers: beside Content-Length.   stated: another Content-Length than that of the body; None for none at all."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stated: int | None = -1


class WebServer(ThreadingHTTPServer):
    """pages: by path.   sent: paths whose body was read to its end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"https://127.0.0.1:{self.server_port}"
        self.pages: dict[str, Page] = {}
        self.sent: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave before the end."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0], Page(status=404))
        self.send_response(page.status)
        length = len(page.body) if page.stated == -1 else page.stated
        for name, value in {**page.headers, **({} if length is None else {"Content-Length": str(length)})}.items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(page.body), 1 << 16):
            self.wfile.write(page.body[at : at + (1 << 16)])
        self.server.sent.append(self.path)


@contextmanager
def https_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[WebServer]:
    """Writes its certificate and key into the folder."""
    certificate, key = _certificate(folder)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with WebServer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _certificate(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"
