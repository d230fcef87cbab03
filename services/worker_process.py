"""`millrace worker`: engines in a process of its own, taking work from the queue that gateways fill.

It takes only what it can run. On SIGTERM it takes nothing new, finishes what runs (drain_s) and hands the rest back;
killed, its leases lapse and another worker continues at the next token. Its port answers probes and /metrics.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from services.loading import StoredModel, find_model, open_backend, open_engine, warm_up
from services.model_commands import ensure_shipped
from services.redis_queue import open_queue
from services.serving import Server, address_of, expose_metrics, listen, on_signals, run_loop, uvicorn_config
from services.settings import Settings, SettingsError
from services.telemetry import EngineCollector, configure_logging
from services.worker import Worker
from wire.queue import Queue

logger = logging.getLogger(__name__)


def run_worker(settings: Settings) -> int:
    """Work until a signal; the exit code is 1 if a model's backend was lost."""
    configure_logging(settings.log_level)
    ensure_shipped(settings)
    models = [find_model(settings, name) for name in settings.model_names]
    if not models:
        raise SettingsError("models names no model; set MILLRACE_MODELS to a name of `millrace models list`")
    return run_loop(_work(settings, models, listen(settings)))


def open_worker(settings: Settings, model: StoredModel, queue: Queue, name: str) -> Worker:
    """A model loaded, warm, and ready to take work from `queue`."""
    backend = open_backend(settings, model)
    warm_up(backend)
    engine = open_engine(settings, backend)
    return Worker(name, model.manifest.model_id, engine, backend.limits, queue, lease_s=settings.lease_s)


async def _work(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    queue = await open_queue(settings)
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    workers = [open_worker(settings, model, queue, name) for model in models]
    registry = CollectorRegistry()
    registry.register(EngineCollector([worker.source for worker in workers]))
    draining = asyncio.Event()
    app = _probes(
        is_live=lambda: all(worker.is_alive for worker in workers),
        is_ready=lambda: queue.is_connected and not draining.is_set() and all(worker.is_ready for worker in workers),
    )
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app))
    running = [asyncio.create_task(worker.run(), name=f"worker-{worker.model_id}") for worker in workers]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    served = ", ".join(worker.model_id for worker in workers)
    print(f"Millrace worker {name} runs {served}; probes at {address_of(listener)}", flush=True)
    stop = asyncio.create_task(draining.wait())
    await asyncio.wait([stop, serving, *running], return_when=asyncio.FIRST_COMPLETED)
    draining.set()
    await asyncio.gather(*(worker.drain(settings.drain_s) for worker in workers))
    failures = [each for each in await asyncio.gather(*running, return_exceptions=True) if isinstance(each, Exception)]
    server.should_exit = True
    await serving
    await queue.close()
    for failure in failures:
        logger.error("worker lost its backend", extra={"reason": str(failure)})
    return 1 if failures else 0


def _probes(*, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> Starlette:
    def probe(holds: Callable[[], bool], word: str) -> Callable[[Request], JSONResponse]:
        def answer(_: Request) -> JSONResponse:
            return JSONResponse({"status": word if holds() else f"not {word}"}, status_code=200 if holds() else 503)

        return answer

    return Starlette(routes=[Route("/livez", probe(is_live, "live")), Route("/readyz", probe(is_ready, "ready"))])
