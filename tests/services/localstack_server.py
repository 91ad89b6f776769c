"""LocalStack's S3 on a free port of the loopback interface, which is printed: a second, independent server for the tests of stores.

Its packages conflict with those of this repository, so it has an environment of its own (`make .localstack/ready`). Only the
gateway and S3 run: no other services, no DNS, no telemetry. It ends with the process that reads its output.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading


def serve() -> None:
    folder = tempfile.TemporaryDirectory()
    own = {"DISABLE_EVENTS": "1", "SKIP_SSL_CERT_DOWNLOAD": "1", "DNS_ADDRESS": "0", "LOCALSTACK_VOLUME_DIR": folder.name}
    os.environ.update(own)  # read when localstack is imported
    from localstack.aws.app import LocalstackAwsGateway
    from localstack.aws.serving.werkzeug import CustomWSGIRequestHandler
    from localstack.services.plugins import Service, ServiceManager
    from localstack.services.s3.provider import S3Provider
    from rolo.gateway.wsgi import WsgiGateway
    from werkzeug.serving import ThreadedWSGIServer

    services = ServiceManager()
    services.add_service(Service.for_provider(S3Provider()))
    gateway = WsgiGateway(LocalstackAwsGateway(services))
    server = ThreadedWSGIServer("127.0.0.1", 0, gateway, handler=CustomWSGIRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)  # noqa: T201 (to the process that started it)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
