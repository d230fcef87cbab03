"""The shared queue as the settings want it, and what both kinds of process say about it."""

from __future__ import annotations

from redis.exceptions import ResponseError

from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from services.queues.redis_clients import redis_client
from services.queues.redis_master import MISTAKES
from services.settings import Settings, SettingsError
from wire.errors import Unavailable

MAX_DELIVERIES = 3
WORKER_TTL_MS = 30_000  # long enough for the only worker to be replaced
ORPHAN_MS = 30_000  # clients of a gateway that has died have this long to come to another
MAX_OVERTAKES = 64


async def open_queue(settings: Settings) -> RedisQueue:
    """Connect. Raises SettingsError for an address that cannot be right, Unavailable if nobody answers there."""
    limits = QueueLimits(
        lease_ms=int(settings.lease_s * 1000),
        max_deliveries=MAX_DELIVERIES,
        max_queued_tokens=settings.max_queued_tokens,
        max_tenant_tokens=settings.max_tenant_tokens or settings.max_queued_tokens,
        log_ttl_ms=int(settings.log_ttl_s * 1000),
        background_ttl_ms=int(settings.background_ttl_s * 1000),
        max_overtakes=MAX_OVERTAKES,
        worker_ttl_ms=WORKER_TTL_MS,
        orphan_ms=ORPHAN_MS,
        refuses_unserved=settings.unserved == "refuse",
    )
    try:
        client = redis_client(settings.redis_url)
    except ValueError as error:
        raise SettingsError(f"redis_url is no address of a Redis: {error}") from error
    try:
        return await RedisQueue.open(client, limits)
    except (Unavailable, ResponseError) as error:
        cause = error.__cause__ if isinstance(error, Unavailable) else error
        if isinstance(cause, (*MISTAKES, ResponseError)):
            raise SettingsError(f"redis_url leads to no Redis that can keep the queue: {cause}") from error
        raise
