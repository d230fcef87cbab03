"""The gateway as a part of a process: what `up` and `gateway` put together and start in the same way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from gateway.app import create_app
from gateway.keys import KeyRing
from gateway.models import Models
from gateway.probes import Health
from services.loading import StoredModel
from services.queue_watch import QueueWatch
from services.queues.redis_facts import RedisFacts
from services.serving import (
    ENDING_S,
    Server,
    allowed_hosts,
    expose_metrics,
    gateway_limits,
    on_signals,
    say_where,
    settle,
    uvicorn_config,
)
from services.settings import Settings, package_version
from services.telemetry.gateway import GatewayMetrics
from services.telemetry.process import describe_process
from wire.queue import Queue


@dataclass(frozen=True, slots=True)
class Front:
    """A gateway that serves: `serving` ends some time after `server.should_exit` is set."""

    server: Server
    serving: asyncio.Task[None]


@asynccontextmanager
async def open_front(
    settings: Settings,
    models: Sequence[StoredModel],
    listener: socket.socket,
    queue: Queue,
    *,
    keys: KeyRing | None,
    registry: CollectorRegistry,
    draining: asyncio.Event,
    health: Callable[[], Health],
    ending_s: float = ENDING_S,
    redis: Callable[[], Awaitable[RedisFacts | None]] | None = None,
    is_connected: Callable[[], bool] = lambda: True,
) -> AsyncIterator[Front]:
    """Start it, and say where it is. In the block the queue is watched; who opens it ends `serving` and the queue.

    The first signal sets `draining`. `ending_s`: for answers, once the server stops. `redis`, `is_connected`: of a
    queue in Redis.
    """
    limits = gateway_limits(settings, allowed_hosts(settings, listener, keys))
    model_ids = [model.manifest.model_id for model in models]
    app = create_app(
        queue,
        Models.load([model.directory for model in models], limits),
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
        redis=redis,
        expected_replicas=settings.redis_replicas,
        is_connected=is_connected,
    )
    registry.register(watch)
    describe_process(registry, package_version(), [model.manifest for model in models], draining.is_set)
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app, ending_s=ending_s))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    async with watch.running():
        settle()
        say_where(listener, model_ids, needs_key=keys is not None)
        yield Front(server, serving)
