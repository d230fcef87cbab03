"""/metrics, in the format that the scraper asks for: OpenMetrics, which has exemplars, or the older text.

Apart from prometheus_client's own server and negotiation because those rename metrics: a scraper that asks for
OpenMetrics and names no escaping gets vllm_... for vllm:... (as of 0.26). All our names are legal in every escaping, so
nothing is ever escaped here.
"""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import Response

PATH: Final = "/metrics"
OPENMETRICS: Final = "application/openmetrics-text"
CLIENT_TIMEOUT_S: Final = 10.0


def exposed(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """What the registry holds now, and its content type. `accept`: the header, or nothing."""
    kinds = [part.replace(" ", "").split(";") for part in accept.split(",")]
    if any(kind == OPENMETRICS and "version=0.0.1" not in options for kind, *options in kinds):
        text: bytes = openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
        return text, f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
    return exposition.generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"


def metrics_answer(request: Request, registry: CollectorRegistry) -> Response:
    """As a route's answer."""
    text, content_type = exposed(registry, ",".join(request.headers.getlist("accept")))
    return Response(text, headers={"content-type": content_type})


class MetricsServer(ThreadingHTTPServer):
    """/metrics on a port of its own and on threads of its own, so that it answers while the event loop is busy."""

    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Listen and serve. Raises OSError."""
        self.registry = registry
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]  # IPv6 addresses have four parts
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_TIMEOUT_S
    server: MetricsServer

    def do_GET(self) -> None:
        if self.path.split("?")[0] != PATH:
            self.send_error(404)
            return
        text, content_type = exposed(self.server.registry, ",".join(self.headers.get_all("accept") or ()))
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is not worth a line."""
