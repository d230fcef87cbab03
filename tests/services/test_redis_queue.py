"""What only a shared queue has: several gateways on it, replies that are lost, gateways that die."""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from services.queues.redis_clients import redis_client
from tests.contracts.queues import PATIENCE_S, budget, completion, finished, generate, lease_one, tokens
from tests.redis_server import RedisServer, redis_socket
from wire.errors import Unavailable
from wire.messages import Failed, Tokens, encode
from wire.queue import Status

LIMITS = QueueLimits(
    lease_ms=6_000,
    max_deliveries=3,
    max_queued_tokens=1_000_000,
    max_tenant_tokens=1_000_000,
    log_ttl_ms=60_000,
    background_ttl_ms=60_000,
    max_overtakes=4,
    worker_ttl_ms=30_000,
    orphan_ms=10_000,
    refuses_unserved=False,
)


class LossyRedis(Redis):
    """Executes calls of some functions and loses the replies, as often as it is told."""

    lost: dict[str, int]

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        answer: Any = super().fcall(function, numkeys, *keys_and_args)
        reply = await answer
        name = function.rsplit("_", 1)[1]
        if self.lost.get(name, 0) > 0:
            self.lost[name] -= 1
            raise RedisConnectionError("the reply was lost")
        return reply


class Site:
    """One partition of a Redis, whose clock stands still, and queue objects over it: one for each process."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._partition = secrets.token_hex(4)
        self._now_ms = 1_700_000_000_000
        self.lost: dict[str, int] = {}

    async def client(self) -> LossyRedis:
        client = await self._stack.enter_async_context(LossyRedis(unix_socket_path=redis_socket()))
        client.lost = self.lost
        return client

    async def process(self) -> RedisQueue:
        client = await self.client()
        await client.set(self.key("clock"), self._now_ms)
        queue = await RedisQueue.open(client, LIMITS, partition=self._partition)
        self._stack.push_async_callback(queue.close)
        return queue

    def key(self, name: str) -> str:
        return f"mr:{{{self._partition}}}:{name}"

    async def advance(self, ms: int, queue: RedisQueue) -> None:
        self._now_ms += ms
        client = await self.client()
        await client.set(self.key("clock"), self._now_ms)
        await queue.sweep()


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(stack)


async def first_tokens(queue: RedisQueue, start: int = 0) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        event = await anext(queue.events("r", start))
    assert isinstance(event, Tokens)
    return event.token_ids


async def test_who_still_reads_elsewhere_keeps_a_request_alive() -> None:
    async with open_site() as site:
        first, second, worker = [await site.process() for _ in range(3)]
        await first.submit(generate())
        lease = await lease_one(worker)
        await worker.publish([tokens(lease, 0, 5)])
        assert await first_tokens(second) == [5]
        await first.abandon("r")
        assert await worker.renew([("r", lease.epoch)]) == []
        await second.abandon("r")
        assert [refusal.reason.value for refusal in await worker.renew([("r", lease.epoch)])] == ["cancelled"]


async def test_a_gateway_that_never_read_it_does_not_end_it() -> None:
    async with open_site() as site:
        first, stranger = await site.process(), await site.process()
        await first.submit(generate())
        await stranger.abandon("r")
        assert (await first.standing("r")).status is Status.WAITING


async def test_a_gateway_that_dies_leaves_its_requests_time_to_be_resumed_elsewhere() -> None:
    async with open_site() as site:
        dead, second, worker = [await site.process() for _ in range(3)]
        for request_id in ("resumed", "orphan"):
            await dead.submit(generate(request_id))
        await dead.submit(generate("background", background=True))
        leases = {lease.request.request_id: lease for lease in await worker.lease(budget())}
        await dead.close()
        await worker.publish([tokens(lease, 0, 5) for lease in leases.values()])
        reading = asyncio.create_task(completion(second, "resumed"))
        await until(second, "resumed")
        held = [(request_id, lease.epoch) for request_id, lease in leases.items()]
        await site.advance(5_000, worker)
        assert await worker.renew(held) == []
        await site.advance(5_000, worker)
        assert [(each.request_id, each.reason.value) for each in await worker.renew(held)] == [("orphan", "cancelled")]
        await worker.publish([finished(leases["resumed"], 1)])
        async with asyncio.timeout(PATIENCE_S):
            assert (await reading).token_ids == [5]


async def test_a_request_that_cannot_be_read_harms_no_other_and_is_given_up_in_the_end() -> None:
    """Of a newer gateway, say, that asks for what this worker does not know."""
    async with open_site() as site:
        gateway, worker = await site.process(), await site.process()
        for request_id in ("strange", "plain"):
            await gateway.submit(generate(request_id))
        unknown = {**msgspec.msgpack.decode(encode(generate("strange"))), "from_the_future": 1}
        client: Any = await site.client()
        await client.hset(site.key("r:strange"), "body", msgspec.msgpack.encode(unknown))
        (lease,) = await worker.lease(budget())
        assert lease.request.request_id == "plain"
        await worker.publish([tokens(lease, 0, 5), finished(lease, 1)])
        reading = asyncio.create_task(completion(gateway, "strange"))
        for _ in range(LIMITS.max_deliveries):
            await site.advance(LIMITS.lease_ms + 1, worker)
            assert await worker.lease(budget()) == []
        async with asyncio.timeout(PATIENCE_S):
            end = (await reading).terminal
        assert isinstance(end, Failed)
        assert end.code == "worker_lost"


async def until(queue: RedisQueue, request_id: str) -> None:
    """Until a reader of this request has looked at its log."""
    async with asyncio.timeout(PATIENCE_S):
        while not any(not each.must_look for each in queue._followers.get(request_id, ())):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("losses", [1, 2, 3])
async def test_a_lease_whose_reply_was_lost_is_handed_out_again_as_it_was(losses: int) -> None:
    async with open_site() as site:
        queue = await site.process()
        await queue.submit(generate("a"))
        await queue.submit(generate("b"))
        site.lost["lease"] = losses
        if losses > 1:  # a call is made twice before it gives up
            with pytest.raises(Unavailable):
                await queue.lease(budget())
            await queue._await_answer()
        leases = await queue.lease(budget()) or await queue.lease(budget())
        assert [(lease.request.request_id, lease.epoch, lease.delivery) for lease in leases] == [
            ("a", 1, 1),
            ("b", 2, 1),
        ]
        assert await queue.lease(budget()) == []


Call = Callable[[RedisQueue], Awaitable[object]]


async def test_every_call_may_lose_its_first_reply() -> None:
    async with open_site() as site:
        queue = await site.process()
        site.lost |= dict.fromkeys(
            ("submit", "lease", "publish", "renew", "release", "follow", "cancel", "standing"), 1
        )
        await queue.submit(generate())
        lease = await lease_one(queue)
        assert await queue.publish([tokens(lease, 0, 5, 6)]) == []
        assert await queue.renew([("r", lease.epoch)]) == []
        await queue.release([("r", lease.epoch)])
        lease = await lease_one(queue)
        assert (lease.token_ids, lease.delivery) == ((5, 6), 1)
        assert (await queue.standing("r")).num_tokens == 2
        await queue.cancel("r")
        site.lost["publish"] = 1
        assert await queue.publish([finished(lease, 2)]) == []
        done = await completion(queue)
        assert done.token_ids == [5, 6]
        assert not any(site.lost.values())


async def test_nothing_is_left_in_redis_when_all_is_over() -> None:
    async with open_site() as site:
        queue = await site.process()
        for i in range(5):
            await queue.submit(generate(f"r{i}", tenant=f"t{i % 2}"))
        for lease in await queue.lease(budget(max_requests=3)):
            await queue.publish([tokens(lease, 0, 5), finished(lease, 1)])
        for i in range(3, 5):
            await queue.cancel(f"r{i}")
        await site.advance(60_000, queue)
        client = await site.client()
        keys = {key.decode().split("}:")[1] async for key in client.scan_iter(f"mr:{{{site._partition}}}:*")}
        assert keys <= {"clock", "epoch", "arrivals", "drain", "fair", "acct", "l:w"}
        account = await client.hgetall(f"mr:{{{site._partition}}}:acct")  # type: ignore[misc]
        assert {int(number) for number in account.values()} <= {0}


@pytest.mark.parametrize("ends", [False, True])
async def test_a_log_that_lost_its_end_goes_on_where_it_ends(ends: bool) -> None:
    """A failover to a replica that lagged: the worker has been told that more was logged than there is."""
    async with open_site() as site:
        queue = await site.process()
        await queue.submit(generate())
        await queue.submit(generate("other"))
        lease, other = await queue.lease(budget())
        await queue.publish([tokens(lease, 0, 5, 6, 7), tokens(other, 0, 1)])
        assert await first_tokens(queue) == [5, 6, 7]
        client = await site.client()
        await client.set(f"mr:{{{site._partition}}}:t:r", array("i", [5]).tobytes())
        lost = finished(lease, 3) if ends else tokens(lease, 3, 8)
        refusals = await queue.publish([tokens(other, 1, 2), lost])
        assert [(each.request_id, each.reason.value) for each in refusals] == [("r", "fenced")]
        assert (await queue.standing("other")).num_tokens == 2
        again = await lease_one(queue)
        assert (again.token_ids, again.delivery) == ((5,), 2)
        assert await queue.publish([tokens(again, 1, 6, 7, 8), finished(again, 4)]) == []
        assert (await completion(queue)).token_ids == [5, 6, 7, 8]


async def test_a_redis_without_memory_takes_nothing_new_and_lets_the_rest_come_to_its_end(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        client = redis_client(server.url)
        queue = await RedisQueue.open(client, LIMITS)
        await queue.submit(generate())
        lease = await lease_one(queue)
        await client.config_set("maxmemory", 1)
        with pytest.raises(Unavailable):
            await queue.submit(generate("more"))
        assert await queue.publish([tokens(lease, 0, 5), finished(lease, 1)]) == []
        assert (await completion(queue)).token_ids == [5]
        await client.config_set("maxmemory", 0)
        await queue._await_answer()
        await queue.submit(generate("after"))
        await queue.close()
    finally:
        server.stop()


async def test_a_message_that_cannot_be_read_leaves_nobody_deaf() -> None:
    async with open_site() as site:
        queue, worker = await site.process(), await site.process()
        await queue.submit(generate())
        reading = asyncio.create_task(completion(queue))
        lease = await lease_one(worker)
        client = await site.client()
        await client.publish(queue._channel, b"\xff\xff\xff\x00nonsense")
        await asyncio.sleep(0.05)
        await worker.publish([tokens(lease, 0, 5), finished(lease, 1)])
        assert (await reading).token_ids == [5]
