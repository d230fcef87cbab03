"""The shared queue as the settings want it: clients with time limits, and what both kinds of process say about it."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from services.settings import Settings, SettingsError

CALL_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
PING_EVERY_S = 5
MAX_DELIVERIES = 3
WORKER_TTL_MS = 30_000  # long enough for the only worker to be replaced
ORPHAN_MS = 30_000  # clients of a gateway that has died have this long to come to another
MAX_OVERTAKES = 64


async def open_queue(settings: Settings) -> RedisQueue:
    """Connect. Raises SettingsError for an address that is none, Unavailable if nobody answers there."""
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
        calls = Redis.from_url(
            settings.redis_url, socket_timeout=CALL_TIMEOUT_S, socket_connect_timeout=CONNECT_TIMEOUT_S
        )
        # News may be long in coming: no time limit on reading them, but a ping that notices a dead connection.
        news = Redis.from_url(
            settings.redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, health_check_interval=PING_EVERY_S
        )
    except (ValueError, RedisError) as error:
        raise SettingsError(f"redis_url is no address of a Redis: {error}") from error
    return await RedisQueue.open(calls, limits, news=news)
