"""The HTTP side of a process: socket, server, metrics, signals. What `up`, `gateway` and `worker` share.

Start: the port is taken before anything slow happens. Stop: the first signal begins the drain, a second ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.keys import BadKeyFile, KeyRing
from gateway.limits import GatewayLimits
from services.loading import StoredModel, find_model
from services.model_commands import ensure_shipped
from services.settings import Settings, SettingsError, names_in
from services.telemetry.exposition import PATH, MetricsServer, metrics_answer
from services.telemetry.log import configure_logging

logger = logging.getLogger(__name__)

LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "[::1]"))
ENDING_S = 5.0  # where the answers themselves have ended already


def run_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run `main` on the fast event loop where it is installed."""
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return asyncio.run(main)


def begin(settings: Settings) -> tuple[list[StoredModel], socket.socket]:
    """What comes before anything slow: logging, the models' names, and the port, so that a taken one is said at once.

    Raises SettingsError, UnknownModel.
    """
    configure_logging(settings.log_level)
    ensure_shipped(settings)
    models = [find_model(settings, name) for name in settings.model_names]
    if not models:
        raise SettingsError("models names no model; set MILLRACE_MODELS to a name of `millrace models list`")
    return models, listen(settings)


def keys_of(settings: Settings, listener: socket.socket) -> KeyRing | None:
    """The keys that let clients in; None if anybody may: on loopback, or by the operator's word.

    Raises SettingsError, of a file that cannot be read as well.
    """
    if settings.keys_file:
        try:
            return KeyRing(Path(settings.keys_file).expanduser())
        except BadKeyFile as error:
            raise SettingsError(f"keys_file: {error}") from None
    address = listener.getsockname()[0]  # what the name in `host` has come to
    if settings.open_access == "no" and not ipaddress.ip_address(address).is_loopback:
        raise SettingsError(
            f"other machines can reach {settings.host or address}, and no keys are asked for; set MILLRACE_KEYS_FILE to"
            " a file that `millrace keys create` has written, or MILLRACE_OPEN_ACCESS=yes to let everybody in"
        )
    return None


def allowed_hosts(settings: Settings, listener: socket.socket, keys: KeyRing | None) -> frozenset[str]:
    """The names that requests may be addressed to; empty = any. The setting's help says why."""
    named = names_in(settings.allowed_hosts)
    if not named and keys is None and ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        return LOOPBACK | {settings.host.lower()}
    return frozenset() if "*" in named else frozenset(name.lower() for name in named)


def gateway_limits(settings: Settings, hosts: frozenset[str] = frozenset()) -> GatewayLimits:
    """What clients may send, as the settings say; `hosts` as allowed_hosts says."""
    return GatewayLimits(
        allowed_hosts=hosts,
        allowed_origins=frozenset(names_in(settings.allowed_origins)),
        max_body_bytes=settings.max_body_bytes,
        ws_max_frame_bytes=settings.max_body_bytes,
        cancel_grace_s=settings.cancel_grace_s,
    )


def listen(settings: Settings) -> socket.socket:
    """Take the port. Raises SettingsError in words."""
    try:
        return socket.create_server((settings.host, settings.port), backlog=2048, reuse_port=False)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None


def probe_routes(*, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> Starlette:
    """/livez and /readyz, of a process that serves nothing else."""

    def probe(holds: Callable[[], bool], word: str) -> Callable[[Request], JSONResponse]:
        def answer(_: Request) -> JSONResponse:
            return JSONResponse({"status": word if holds() else f"not {word}"}, status_code=200 if holds() else 503)

        return answer

    return Starlette(routes=[Route("/livez", probe(is_live, "live")), Route("/readyz", probe(is_ready, "ready"))])


def expose_metrics(settings: Settings, app: Starlette, registry: CollectorRegistry) -> None:
    """/metrics on the application's port, or on one of its own."""
    if settings.metrics_port == 0:

        async def metrics(request: Request) -> Response:
            return metrics_answer(request, registry)

        app.add_route(PATH, metrics, include_in_schema=False)
        return
    try:
        MetricsServer(settings.host, settings.metrics_port, registry)
    except OSError as error:
        raise SettingsError(f"cannot serve metrics on port {settings.metrics_port}: {error.strerror}") from None


def uvicorn_config(settings: Settings, app: Starlette, *, ending_s: float = ENDING_S) -> uvicorn.Config:
    """How the server treats connections. Once it stops, those that are open have `ending_s` to come to their end."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws_max_size=settings.max_body_bytes,
        ws_max_queue=16,
        ws_per_message_deflate=False,  # a deflate bomb is not worth the bytes saved on tokens
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(ending_s)),
        server_header=False,
    )


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the order of shutdown is ours (drain, then close)."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # the base class is a generator context manager
        yield


def on_signals(draining: asyncio.Event, server: Server) -> None:
    """SIGTERM and SIGINT set `draining`."""
    loop = asyncio.get_running_loop()

    def stop(number: int, frame: FrameType | None = None) -> None:
        if draining.is_set():  # the second time: do not wait
            server.force_exit = True
            raise SystemExit(128 + number)
        logger.info("draining", extra={"signal": signal.Signals(number).name})
        draining.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def address_of(listener: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


def settle() -> None:
    """Everything made so far stays: the garbage collector need not look at it again.

    A full collection stops every stream, for 50 ms with all that was imported (gc.freeze, docs.python.org).
    """
    gc.collect()
    gc.freeze()


def say_where(listener: socket.socket, model_ids: Sequence[str], *, needs_key: bool) -> None:
    """Print the address and a line to try."""
    address = address_of(listener)
    key = " -H 'authorization: Bearer YOUR-KEY'" if needs_key else ""
    message = '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    print(
        f"\nMillrace serves {', '.join(model_ids)} at {address}\n\nTry:\n"
        f"  curl -s {address}/generate -H 'content-type: application/json'{key} -d '{message}'\n",
        file=sys.stdout,
        flush=True,
    )
