"""What a gateway's /metrics says of the whole queue: who waits, who works, how Redis is.

The gateway says it and not the workers, because these are the numbers by which workers are started: they must be there
when no worker is. Every gateway says the same, so several are aggregated with max, never summed. The queue is asked
every two seconds, not at each scrape; what could not be read for a while is left out, since a number that is old is
worse than none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.queues.redis_facts import RedisFacts
from services.telemetry.table import QUEUE_METRICS, families
from wire.errors import Unavailable
from wire.queue import Depth, Queue, SeenWorker

logger = logging.getLogger(__name__)

READ_EVERY_S: Final = 2.0
STALE_S: Final = 15.0
SEEN_MS: Final = 10_000  # five reports missed: the worker is gone, or its engine hangs

Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Reading:
    """The queue at one moment."""

    at_s: float  # of the monotonic clock
    depths: Mapping[str, Depth]  # by model
    workers: Sequence[SeenWorker]
    redis: RedisFacts | None  # None: the queue is not in Redis, or Redis does not say


class QueueWatch(Collector):
    """Use `async with watch.running()`, on the queue's event loop; scrapes may come on any thread."""

    def __init__(
        self,
        queue: Queue,
        model_ids: Sequence[str],
        *,
        replica_capacity_tokens: int = 0,
        redis: Callable[[], Awaitable[RedisFacts | None]] | None = None,
        expected_replicas: int = 0,
        is_connected: Callable[[], bool] = lambda: True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`replica_capacity_tokens`: what is said before a worker was seen; 0 = nothing."""
        self._queue = queue
        self._redis = redis
        self._expected_replicas = expected_replicas
        self._is_connected = is_connected
        self._now_s = now_s
        self._reading: Reading | None = None
        self._capacity = dict.fromkeys(model_ids, float(replica_capacity_tokens))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read now, and again and again until the end."""
        await self.look()
        reading = asyncio.create_task(self._run(), name="queue-watch")
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def look(self) -> None:
        """Read once. A queue that is away leaves the last reading, which grows old."""
        try:
            depths = {model: await self._queue.depth(model) for model in self._capacity}
            workers = await self._queue.workers()
            redis = await self._redis() if self._redis is not None else None
        except Unavailable:
            return
        for model in depths:
            seen = [each.report.capacity_tokens for each in workers if model in each.report.models]
            if seen:
                self._capacity[model] = sum(seen) / len(seen)
        self._reading = Reading(self._now_s(), depths, workers, redis)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(READ_EVERY_S)
            try:
                await self.look()
            except Exception as error:  # this is a task's edge: metrics must not end because of one bad answer
                logger.error("the queue could not be read", exc_info=error)

    def collect(self) -> Iterable[Metric]:
        reading = self._reading
        if reading is not None and self._now_s() - reading.at_s > STALE_S:
            reading = None
        samples: dict[str, list[Sample]] = {
            "millrace_queue_up": [((), float(reading is not None and self._is_connected()))],
            "millrace_replica_capacity_tokens": [
                ((model,), tokens) for model, tokens in self._capacity.items() if tokens
            ],
        }
        if reading is not None:
            samples |= _queue_samples(reading)
            if reading.redis is not None:
                samples |= _redis_samples(reading.redis, self._expected_replicas)
        yield from families(QUEUE_METRICS, samples)


def _queue_samples(reading: Reading) -> dict[str, list[Sample]]:
    requests: list[Sample] = []
    tokens: list[Sample] = []
    workers: list[Sample] = []
    for model, depth in reading.depths.items():
        requests += [((model, "waiting"), depth.queued_requests), ((model, "running"), depth.running_requests)]
        tokens += [((model, "waiting"), depth.queued_tokens), ((model, "running"), depth.running_tokens)]
        draining = [
            each.report.is_draining for each in reading.workers if model in each.report.models and each.age_ms < SEEN_MS
        ]
        workers += [((model, "ready"), draining.count(False)), ((model, "draining"), draining.count(True))]
    return {
        "millrace_queue_requests": requests,
        "millrace_queue_tokens": tokens,
        "millrace_queue_oldest_waiting_seconds": [((m,), d.oldest_ms / 1e3) for m, d in reading.depths.items()],
        "millrace_dead_letters": [((model,), depth.dead_letters) for model, depth in reading.depths.items()],
        "millrace_workers": workers,
    }


def _redis_samples(redis: RedisFacts, expected_replicas: int) -> dict[str, list[Sample]]:
    values: dict[str, float] = {
        "millrace_redis_memory_used_bytes": redis.memory_used_bytes,
        "millrace_redis_memory_max_bytes": redis.memory_max_bytes,
        "millrace_redis_aof_ok": redis.is_aof_ok,
        "millrace_redis_connected_replicas": redis.connected_replicas,
        "millrace_redis_expected_replicas": expected_replicas,
    }
    return {name: [((), float(value))] for name, value in values.items()}
