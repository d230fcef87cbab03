"""`millrace up`: gateway and worker in one process, joined by the memory queue.

Start: store, models, engines, queue, gateway, then the address is printed. Stop, on SIGTERM or SIGINT: readiness goes
false, workers take nothing new and finish what runs (drain_s), then the sockets close; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from gateway.probes import Health
from services.crew import Crew
from services.front import open_front
from services.loading import StoredModel
from services.queues.memory import MemoryQueue
from services.serving import begin, keys_of, run_loop
from services.settings import Settings


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

    # Workers first, so that their last tokens still reach clients; then the queue, which ends all readers; then the
    # sockets.
    async with open_front(
        settings, models, listener, queue, keys=keys, registry=registry, draining=draining, health=health
    ) as front:
        code = await crew.work(draining, front.serving)
    front.server.should_exit = True
    await queue.close()
    await front.serving
    return code
