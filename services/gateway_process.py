"""`millrace gateway`: HTTP and text in a process of its own, over the queue that it shares with workers.

While Redis is away it is not ready, new requests are answered 503, and open streams wait. On SIGTERM open streams have
drain_s to come to their end; what is cut off then goes on at another gateway, whose client has 30 s to come.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from gateway.app import create_app
from gateway.models import Models
from gateway.probes import Health
from services.loading import StoredModel
from services.queue_watch import QueueWatch
from services.redis_queue import open_queue
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


def run_gateway(settings: Settings) -> int:
    """Serve until a signal."""
    return run_loop(_serve(settings, *begin(settings)))


async def _serve(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    keys = keys_of(settings, listener)
    queue = await open_queue(settings)
    registry = CollectorRegistry()
    draining = asyncio.Event()

    def health() -> Health:
        reason = "draining" if draining.is_set() else "" if queue.is_connected else "Redis is away"
        return Health(is_live=True, is_ready=not reason, is_draining=draining.is_set(), reason=reason)

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
    watch = QueueWatch(
        queue,
        model_ids,
        replica_capacity_tokens=settings.replica_capacity_tokens,
        redis=queue.redis,
        expected_replicas=settings.redis_replicas,
        is_connected=lambda: queue.is_connected,
    )
    registry.register(watch)
    describe_process(registry, package_version(), [model.manifest for model in models], draining.is_set)
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app, ending_s=settings.drain_s))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    stop = asyncio.create_task(draining.wait())
    async with watch.running():
        settle()
        say_where(listener, model_ids, needs_key=keys is not None)
        await asyncio.wait([stop, serving], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    await queue.close()
    return 0
