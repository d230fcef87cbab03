"""`millrace up`: gateway and worker in one process, joined by the memory queue.

Start: store, models, engines, queue, gateway, then the address is printed. Stop, on SIGTERM or SIGINT: readiness goes
false, workers take nothing new and finish what runs (drain_s), then the sockets close; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from starlette.requests import Request
from starlette.responses import Response

from gateway.app import create_app
from gateway.limits import GatewayLimits
from gateway.models import Models
from gateway.probes import Health
from services.loading import StoredModel, find_model, open_backend, open_engine, warm_up
from services.model_commands import ensure_shipped
from services.queues.memory import MemoryQueue
from services.settings import Settings, SettingsError, package_version
from services.telemetry import EngineCollector, EngineSource, GatewayMetrics, configure_logging
from services.worker import Worker

logger = logging.getLogger(__name__)


def up(settings: Settings) -> int:
    """Serve until a signal; the exit code is 1 if a model's backend was lost."""
    configure_logging(settings.log_level)
    ensure_shipped(settings)
    models = [find_model(settings, name) for name in settings.model_names]
    if not models:
        raise SettingsError("models names no model; set MILLRACE_MODELS to a name of `millrace models list`")
    listener = _listen(settings)  # before the models load: a taken port should be said at once
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return asyncio.run(_serve(settings, models, listener))


async def _serve(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    queue = MemoryQueue(lease_ms=int(settings.lease_s * 1000), max_queued_tokens=settings.max_queued_tokens)
    registry = CollectorRegistry()
    workers = [_worker(settings, model, queue) for model in models]
    registry.register(EngineCollector([_source(worker) for worker in workers]))
    draining = asyncio.Event()

    def health() -> Health:
        return Health(
            is_live=all(worker.is_alive for worker in workers),
            is_ready=not draining.is_set() and all(worker.is_ready for worker in workers),
            is_draining=draining.is_set(),
            reason="draining" if draining.is_set() else "",
        )

    limits = GatewayLimits(
        max_body_bytes=settings.max_body_bytes,
        ws_max_frame_bytes=settings.max_body_bytes,
        cancel_grace_s=settings.cancel_grace_s,
    )
    served = Models.load([model.directory for model in models], limits)
    app = create_app(
        queue, served, limits=limits, health=health, telemetry=GatewayMetrics(registry), version=package_version()
    )
    _expose_metrics(settings, app, registry)
    server = _Server(_uvicorn_config(settings, app))
    running = [asyncio.create_task(worker.run(), name=f"worker-{worker.model_id}") for worker in workers]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _on_signals(draining, server)
    _say_where(settings, listener, models)
    stop = asyncio.create_task(draining.wait())
    await asyncio.wait([stop, serving, *running], return_when=asyncio.FIRST_COMPLETED)
    draining.set()
    # Workers first, so that their last tokens still reach clients; then the sockets; then the queue, which ends all
    # readers.
    await asyncio.gather(*(worker.drain(settings.drain_s) for worker in workers))
    failures = [each for each in await asyncio.gather(*running, return_exceptions=True) if isinstance(each, Exception)]
    server.should_exit = True
    await queue.close()
    await serving
    for failure in failures:
        logger.error("worker lost its backend", extra={"reason": str(failure)})
    return 1 if failures else 0


def _worker(settings: Settings, model: StoredModel, queue: MemoryQueue) -> Worker:
    backend = open_backend(settings, model)
    warm_up(backend)
    engine = open_engine(settings, backend)
    return Worker("embedded", model.manifest.model_id, engine, backend.limits, queue, lease_s=settings.lease_s)


def _source(worker: Worker) -> EngineSource:
    return EngineSource(worker.model_id, lambda: worker.load, lambda: worker.is_alive)


def _listen(settings: Settings) -> socket.socket:
    try:
        return socket.create_server((settings.host, settings.port), backlog=2048, reuse_port=False)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None


def _expose_metrics(settings: Settings, app: FastAPI, registry: CollectorRegistry) -> None:
    if settings.metrics_port == 0:

        async def metrics(_: Request) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        app.add_route("/metrics", metrics, include_in_schema=False)
        return
    try:
        start_http_server(settings.metrics_port, settings.host, registry)
    except OSError as error:
        raise SettingsError(f"cannot serve metrics on port {settings.metrics_port}: {error.strerror}") from None


def _uvicorn_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws_max_size=settings.max_body_bytes,
        ws_max_queue=16,
        ws_per_message_deflate=False,  # a deflate bomb is not worth the bytes saved on tokens
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        server_header=False,
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the order of shutdown is ours (drain, then close)."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # the base class is a generator context manager
        yield


def _on_signals(draining: asyncio.Event, server: _Server) -> None:
    loop = asyncio.get_running_loop()

    def stop(number: int, frame: FrameType | None = None) -> None:
        if draining.is_set():  # the second time: do not wait
            server.force_exit = True
            raise SystemExit(128 + number)
        logger.info("draining", extra={"signal": signal.Signals(number).name})
        draining.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def _say_where(settings: Settings, listener: socket.socket, models: Sequence[StoredModel]) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://{host}:{port}"
    message = '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'
    print(
        f"\nMillrace serves {', '.join(model.manifest.model_id for model in models)} at {address}\n\nTry:\n"
        f"  curl -s {address}/generate -H 'content-type: application/json' -d '{message}'\n",
        file=sys.stdout,
        flush=True,
    )
