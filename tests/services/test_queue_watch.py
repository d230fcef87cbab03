"""What a gateway says of the queue: the truth while it can be read, and nothing once it is old."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.queue_watch import STALE_S, QueueWatch
from services.queues.memory import MemoryQueue
from services.queues.redis import RedisQueue
from services.queues.redis_facts import RedisFacts, redis_facts
from tests.contracts.queues import PATIENCE_S, budget, generate
from tests.redis_server import RedisServer
from tests.services.test_redis_queue import LIMITS
from wire.errors import Unavailable
from wire.messages import WorkerReport


class Site:
    """A queue in memory, the watch over it, and their clocks."""

    def __init__(self, *, capacity: int = 0) -> None:
        self.now_ms = 1_700_000_000_000
        self.queue = MemoryQueue(now_ms=lambda: self.now_ms, max_deliveries=1)
        self.registry = CollectorRegistry()
        self.watch = QueueWatch(
            self.queue, ["x", "y"], replica_capacity_tokens=capacity, now_s=lambda: self.now_ms / 1000
        )
        self.registry.register(self.watch)

    async def advance(self, ms: int) -> None:
        self.now_ms += ms
        self.queue.expire()

    def value(self, name: str, model: str, state: str | None = None) -> float | None:
        labels = {"model_name": model} | ({} if state is None else {"state": state})
        return self.registry.get_sample_value(f"millrace_{name}", labels)

    async def report(self, worker: str, model: str, capacity: int, *, is_draining: bool = False) -> None:
        await self.queue.report(WorkerReport(worker, [model], capacity, 10, 0, is_draining))


async def test_the_queue_is_counted_by_model_with_no_worker_there() -> None:
    site = Site()
    await site.queue.submit(generate("a", prompt_tokens=10, max_tokens=20, model="x"))
    await site.advance(4_000)
    await site.queue.submit(generate("b", prompt_tokens=10, max_tokens=90, model="x"))
    await site.queue.submit(generate("c", prompt_tokens=1, max_tokens=1, model="y"))
    await site.queue.lease(budget("y"))
    await site.advance(1_500)
    await site.watch.look()
    assert site.registry.get_sample_value("millrace_queue_up") == 1
    assert (site.value("queue_requests", "x", "waiting"), site.value("queue_requests", "x", "running")) == (2, 0)
    assert (site.value("queue_tokens", "x", "waiting"), site.value("queue_tokens", "y", "running")) == (130, 2)
    assert site.value("queue_oldest_waiting_seconds", "x") == 5.5
    assert site.value("queue_oldest_waiting_seconds", "y") == 0
    assert (site.value("workers", "x", "ready"), site.value("workers", "x", "draining")) == (0, 0)
    assert site.value("replica_capacity_tokens", "x") is None
    await site.advance(6_000)
    await site.watch.look()
    assert (site.value("dead_letters_total", "x"), site.value("dead_letters_total", "y")) == (0, 1)


async def test_workers_count_while_they_report_and_their_capacity_is_remembered() -> None:
    site = Site(capacity=7)
    await site.watch.look()
    assert site.value("replica_capacity_tokens", "x") == 7
    await site.report("a", "x", 1_000)
    await site.report("b", "x", 3_000, is_draining=True)
    await site.report("c", "y", 500)
    await site.watch.look()
    assert (site.value("workers", "x", "ready"), site.value("workers", "x", "draining")) == (1, 1)
    assert [site.value("replica_capacity_tokens", model) for model in ("x", "y")] == [2_000, 500]
    await site.advance(11_000)
    await site.report("c", "y", 500)
    await site.watch.look()
    assert [site.value("workers", model, "ready") for model in ("x", "y")] == [0, 1]
    await site.advance(60_000)
    await site.watch.look()
    assert [site.value("replica_capacity_tokens", model) for model in ("x", "y")] == [2_000, 500]


async def test_what_is_old_is_not_said() -> None:
    site = Site(capacity=9)
    await site.queue.submit(generate("a", model="x"))
    await site.watch.look()
    await site.queue.close()
    site.now_ms += int(STALE_S * 1000)
    with pytest.raises(Unavailable):
        await site.queue.depth()
    await site.watch.look()
    assert site.value("queue_requests", "x", "waiting") == 1
    site.now_ms += 1
    assert site.value("queue_requests", "x", "waiting") is None
    assert site.registry.get_sample_value("millrace_queue_up") == 0
    assert site.value("replica_capacity_tokens", "x") == 9


async def test_it_reads_again_and_again_until_it_is_left() -> None:
    before = asyncio.all_tasks()
    site = Site()
    async with site.watch.running():
        assert site.value("queue_requests", "x", "waiting") == 0
        await site.queue.submit(generate("a", model="x"))
        async with asyncio.timeout(PATIENCE_S):
            while site.value("queue_requests", "x", "waiting") != 1:  # noqa: ASYNC110  # its own pace
                await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before
    await site.queue.close()


@pytest.mark.parametrize("keeps_data", [False, True])
async def test_redis_says_how_it_is(tmp_path: Path, keeps_data: bool) -> None:
    server = RedisServer(tmp_path, keeps_data=keeps_data)
    server.start()
    try:
        queue = await RedisQueue.open(Redis(unix_socket_path=server.socket), LIMITS)
        registry = CollectorRegistry()
        watch = QueueWatch(queue, ["x"], redis=queue.redis, expected_replicas=2, is_connected=lambda: True)
        registry.register(watch)
        await watch.look()
        assert (registry.get_sample_value("millrace_redis_memory_used_bytes") or 0) > 100_000
        assert registry.get_sample_value("millrace_redis_memory_max_bytes") == 0
        assert registry.get_sample_value("millrace_redis_aof_ok") == keeps_data
        assert registry.get_sample_value("millrace_redis_connected_replicas") == 0
        assert registry.get_sample_value("millrace_redis_expected_replicas") == 2
        await queue.close()
    finally:
        server.stop()


async def test_a_redis_that_may_not_be_asked_is_still_a_queue(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        async with Redis(unix_socket_path=server.socket) as admin:
            queue = await RedisQueue.open(Redis(unix_socket_path=server.socket), LIMITS)
            await admin.execute_command("ACL", "SETUSER", "default", "-info")  # type: ignore[no-untyped-call]
            registry = CollectorRegistry()
            watch = QueueWatch(queue, ["x"], redis=queue.redis)
            registry.register(watch)
            await watch.look()
            assert registry.get_sample_value("millrace_queue_up") == 1
            assert registry.get_sample_value("millrace_redis_memory_used_bytes") is None
            await queue.close()
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("status", "is_ok"), [({}, True), ({"aof_enabled": 0}, False), ({"aof_last_write_status": "err"}, False),
                          ({"aof_last_bgrewrite_status": "err"}, False)],
)  # fmt: skip
def test_a_file_of_appends_is_ok_if_it_is_on_and_was_written(status: dict[str, object], is_ok: bool) -> None:
    info = {
        "used_memory": 5,
        "maxmemory": 9,
        "aof_enabled": 1,
        "aof_last_write_status": "ok",
        "aof_last_bgrewrite_status": "ok",
        "connected_slaves": 2,
        "slave0": {"state": "online"},
        "slave1": {"state": "wait_bgsave"},
        "slave_repl_offset": 7,
    }
    assert redis_facts(info | status) == RedisFacts(5, 9, is_ok, connected_replicas=1)
