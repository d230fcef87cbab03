"""`millrace gateway`: HTTP and text in a process of its own, over the queue that it shares with workers.

While Redis is away it is not ready, new requests are answered 503, and open streams wait. On SIGTERM open streams have
drain_s to come to their end; what is cut off then goes on at another gateway, whose client has 30 s to come.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from gateway.probes import Health
from services.front import open_front
from services.loading import StoredModel
from services.redis_queue import open_queue
from services.serving import begin, keys_of, run_loop
from services.settings import Settings


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

    stop = asyncio.create_task(draining.wait())
    async with open_front(
        settings,
        models,
        listener,
        queue,
        keys=keys,
        registry=registry,
        draining=draining,
        health=health,
        ending_s=settings.drain_s,
        redis=queue.redis,
        is_connected=lambda: queue.is_connected,
    ) as front:
        await asyncio.wait([stop, front.serving], return_when=asyncio.FIRST_COMPLETED)
        front.server.should_exit = True
        await front.serving
    await queue.close()
    return 0
