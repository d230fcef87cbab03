"""`millrace up`: gateway and worker in one process, joined by the memory queue.

Start: store, models, engines, queue, gateway, then the address is printed. Stop, on SIGTERM or SIGINT: readiness goes
false, workers take nothing new and finish what runs (drain_s), then the sockets close; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from gateway.app import create_app
from gateway.models import Models
from gateway.probes import Health
from services.crew import Crew
from services.loading import StoredModel
from services.queue_watch import QueueWatch
from services.queues.memory import MemoryQueue
from services.serving import (
    Server,
    allowed_hosts,
    begin,
    expose_metrics,
    gateway_limits,
    keys_of,
    on_signals,
    run_loop,
    say_where,
    settle,
    uvicorn_config,
)
from services.settings import Settings, package_version
from services.telemetry.gateway import GatewayMetrics
from services.telemetry.process import describe_process


def up(settings: Settings) -> int:
    """Serve until a signal; the exit code is 1 if a model's backend was lost."""
    return run_loop(_serve(settings, *begin(settings)))


async def _serve(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    keys = keys_of(settings, listener)
    queue = MemoryQueue(
        lease_ms=int(settings.lease_s * 1000),
        max_queued_tokens=settings.max_queued_tokens,
        max_tenant_tokens=settings.max_tenant_tokens,
        log_ttl_ms=int(settings.log_ttl_s * 1000),
        background_ttl_ms=int(settings.background_ttl_s * 1000),
    )
    registry = CollectorRegistry()
    crew = Crew(settings, models, queue, "embedded", registry)
    draining = asyncio.Event()

    def health() -> Health:
        return Health(
            is_live=crew.is_alive,
            is_ready=not draining.is_set() and crew.is_ready,
            is_draining=draining.is_set(),
            reason="draining" if draining.is_set() else "",
        )

    limits = gateway_limits(settings, allowed_hosts(settings, listener, keys))
    served = Models.load([model.directory for model in models], limits)
    model_ids = [model.manifest.model_id for model in models]
    app = create_app(
        queue,
        served,
        limits=limits,
        health=health,
        telemetry=GatewayMetrics(registry, model_ids),
        keys=keys,
        version=package_version(),
    )
    watch = QueueWatch(queue, model_ids, replica_capacity_tokens=settings.replica_capacity_tokens)
    registry.register(watch)
    describe_process(registry, package_version(), [model.manifest for model in models], draining.is_set)
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    # Workers first, so that their last tokens still reach clients; then the queue, which ends all readers; then the
    # sockets.
    async with watch.running():
        settle()
        say_where(listener, model_ids, needs_key=keys is not None)
        code = await crew.work(draining, serving)
    server.should_exit = True
    await queue.close()
    await serving
    return code
