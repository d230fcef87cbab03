"""`millrace up`: gateway and worker in one process, joined by the memory queue.

Start: store, models, engines, queue, gateway, then the address is printed. Stop, on SIGTERM or SIGINT: readiness goes
false, workers take nothing new and finish what runs (drain_s), then the sockets close; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from gateway.app import create_app
from gateway.models import Models
from gateway.probes import Health
from services.loading import StoredModel, find_model
from services.model_commands import ensure_shipped
from services.queues.memory import MemoryQueue
from services.serving import (
    Server,
    expose_metrics,
    gateway_limits,
    listen,
    on_signals,
    run_loop,
    say_where,
    uvicorn_config,
)
from services.settings import Settings, SettingsError, package_version
from services.telemetry import EngineCollector, GatewayMetrics, configure_logging
from services.worker_process import open_worker

logger = logging.getLogger(__name__)


def up(settings: Settings) -> int:
    """Serve until a signal; the exit code is 1 if a model's backend was lost."""
    configure_logging(settings.log_level)
    ensure_shipped(settings)
    models = [find_model(settings, name) for name in settings.model_names]
    if not models:
        raise SettingsError("models names no model; set MILLRACE_MODELS to a name of `millrace models list`")
    listener = listen(settings)  # before the models load: a taken port should be said at once
    return run_loop(_serve(settings, models, listener))


async def _serve(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    queue = MemoryQueue(lease_ms=int(settings.lease_s * 1000), max_queued_tokens=settings.max_queued_tokens)
    registry = CollectorRegistry()
    workers = [open_worker(settings, model, queue, "embedded") for model in models]
    registry.register(EngineCollector([worker.source for worker in workers]))
    draining = asyncio.Event()

    def health() -> Health:
        return Health(
            is_live=all(worker.is_alive for worker in workers),
            is_ready=not draining.is_set() and all(worker.is_ready for worker in workers),
            is_draining=draining.is_set(),
            reason="draining" if draining.is_set() else "",
        )

    limits = gateway_limits(settings)
    served = Models.load([model.directory for model in models], limits)
    app = create_app(
        queue, served, limits=limits, health=health, telemetry=GatewayMetrics(registry), version=package_version()
    )
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app))
    running = [asyncio.create_task(worker.run(), name=f"worker-{worker.model_id}") for worker in workers]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    say_where(listener, [model.manifest.model_id for model in models])
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
