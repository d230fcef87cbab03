"""The queues under contract, and the few words in which the contract's tests are written.

A queue joins the suite with one factory below. The seam it must offer is small: options, and a clock that the test
moves.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from redis.asyncio import Redis

from services.queues.memory import MemoryQueue
from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from tests.redis_server import redis_socket
from wire.messages import Event, Failed, Finished, FinishReason, Generate, Tokens, Usage
from wire.queue import Append, Lease, LeaseBudget, Queue, Refusal, RefusalReason

MODEL = "m"
ORPHAN_MS = 30_000
PATIENCE_S = 10.0  # a test that waits longer than this hangs


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """What the tests vary."""

    lease_ms: int = 6_000
    max_deliveries: int = 3
    max_queued_tokens: int = 1_000_000
    max_tenant_tokens: int = 1_000_000
    log_ttl_ms: int = 60_000
    background_ttl_ms: int = 600_000
    max_overtakes: int = 4
    worker_ttl_ms: int = 30_000
    refuses_unserved: bool = False


class QueueRig(Protocol):
    """A queue whose clock stands still until the test moves it."""

    @property
    def queue(self) -> Queue: ...

    async def advance(self, ms: int) -> None:
        """Move the queue's clock; when this returns, what fell due has been applied."""
        ...


QueueFactory = Callable[[QueueOptions], AbstractAsyncContextManager[QueueRig]]


class MemoryRig:
    def __init__(self, options: QueueOptions) -> None:
        self._now_ms = 1_700_000_000_000
        self._queue = MemoryQueue(now_ms=lambda: self._now_ms, **asdict(options))

    @property
    def queue(self) -> Queue:
        return self._queue

    async def advance(self, ms: int) -> None:
        self._now_ms += ms
        self._queue.expire()
        await asyncio.sleep(0)


@asynccontextmanager
async def memory_rig(options: QueueOptions) -> AsyncIterator[QueueRig]:
    rig = MemoryRig(options)
    yield rig
    await rig.queue.close()


class RedisRig:
    """A queue on a real Redis, in a partition of its own whose clock is a key that the test sets."""

    def __init__(self, queue: RedisQueue, client: Redis, partition: str) -> None:
        self._queue = queue
        self._client = client
        self._clock = f"mr:{{{partition}}}:clock"
        self._now_ms = 1_700_000_000_000

    @property
    def queue(self) -> Queue:
        return self._queue

    async def advance(self, ms: int) -> None:
        self._now_ms += ms
        await self._client.set(self._clock, self._now_ms)
        await self._queue.sweep()


@asynccontextmanager
async def redis_rig(options: QueueOptions) -> AsyncIterator[QueueRig]:
    limits = QueueLimits(**asdict(options), orphan_ms=ORPHAN_MS)
    partition = secrets.token_hex(4)
    async with Redis(unix_socket_path=redis_socket()) as client:
        await client.set(f"mr:{{{partition}}}:clock", 1_700_000_000_000)
        queue = await RedisQueue.open(client, limits, partition=partition)
        yield RedisRig(queue, client, partition)
        await queue.close()


FACTORIES: dict[str, QueueFactory] = {"memory": memory_rig, "redis": redis_rig}


def generate(
    request_id: str = "r",
    *,
    prompt_tokens: int = 3,
    max_tokens: int = 100,
    model: str = MODEL,
    priority: int = 0,
    deadline_ms: int | None = None,
    tenant: str = "",
    weight: int = 1,
    background: bool = False,
) -> Generate:
    return Generate(
        request_id,
        model,
        list(range(prompt_tokens)),
        max_tokens,
        priority=priority,
        deadline_ms=deadline_ms,
        tenant=tenant,
        weight=weight,
        background=background,
    )


def budget(
    *models: str,
    max_requests: int = 100,
    max_tokens: int = 10**9,
    capacity_tokens: int = 10**9,
    worker_id: str = "w",
    takes_suspect: bool = True,
) -> LeaseBudget:
    return LeaseBudget(worker_id, models or (MODEL,), max_requests, max_tokens, capacity_tokens, takes_suspect)


async def lease_one(queue: Queue, request_id: str = "r") -> Lease:
    """The next lease, which must be of this request."""
    leases = await queue.lease(budget(max_requests=1))
    assert [lease.request.request_id for lease in leases] == [request_id]
    return leases[0]


async def submit_and_lease(queue: Queue, request: Generate | None = None) -> Lease:
    request = request or generate()
    await queue.submit(request)
    return await lease_one(queue, request.request_id)


def tokens(lease: Lease, first_index: int, *token_ids: int) -> Append:
    return Append(lease.epoch, Tokens(lease.request.request_id, first_index, list(token_ids)))


def finished(lease: Lease, completion_tokens: int, reason: FinishReason = "stop") -> Append:
    usage = Usage(len(lease.request.prompt_ids), completion_tokens)
    return Append(lease.epoch, Finished(lease.request.request_id, reason, usage))


def failed(lease: Lease, code: str = "internal") -> Append:
    return Append(lease.epoch, Failed(lease.request.request_id, code, "it broke", False))


def refusal(lease: Lease, reason: RefusalReason) -> Refusal:
    return Refusal(lease.request.request_id, reason, lease.epoch)


def held(lease: Lease) -> tuple[str, int]:
    return lease.request.request_id, lease.epoch


async def read(queue: Queue, request_id: str = "r", start: int = 0) -> list[Event]:
    """All events up to the end of the iterator."""
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in queue.events(request_id, start)]


@dataclass(frozen=True, slots=True)
class Completion:
    """Events folded: what a client has in the end."""

    token_ids: list[int]
    terminal: Finished | Failed


def fold(events: Sequence[Event], start: int = 0) -> Completion:
    """Join the events of one reader; fails unless they are Tokens* and one terminal, contiguous from `start`."""
    token_ids: list[int] = []
    for event in events[:-1]:
        assert isinstance(event, Tokens), f"{event} before the end"
        assert event.first_index == start + len(token_ids), f"{event} does not continue at {start + len(token_ids)}"
        assert event.token_ids
        token_ids += event.token_ids
    terminal = events[-1]
    assert not isinstance(terminal, Tokens), "no terminal event"
    return Completion(token_ids, terminal)


async def completion(queue: Queue, request_id: str = "r", start: int = 0) -> Completion:
    return fold(await read(queue, request_id, start), start)
