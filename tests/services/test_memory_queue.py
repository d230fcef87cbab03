"""What the embedded queue promises beyond the contract: its own timers, no polling, no copies shared, memory that
comes back.

The contract itself is in tests/contracts.
"""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple

import pytest
import uvloop

from services.queues.memory import MemoryQueue, steady_epoch_clock
from wire.errors import Unavailable
from wire.messages import Event, Failed, Finished, Generate, Tokens, Usage
from wire.queue import Append, LeaseBudget

Ts = TypeVarTuple("Ts")
BUDGET = LeaseBudget("w", ("m",), 100, 10**9, 10**9)
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def generate(request_id: str = "r", max_tokens: int = 10, deadline_ms: int | None = None) -> Generate:
    return Generate(request_id, "m", [1, 2, 3], max_tokens, deadline_ms=deadline_ms)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test's coroutine on each kind of event loop that the service may run on."""

    def run_on_loop(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(asyncio.wait_for(test, 10.0))

    return run_on_loop


def test_a_lapsed_lease_is_handed_to_the_waiting_worker_on_time(run: Callable[..., None]) -> None:
    async def test() -> None:
        queue = MemoryQueue(lease_ms=60)
        await queue.submit(generate())
        started = time.monotonic()
        (first,) = await queue.lease(BUDGET)
        (second,) = await queue.lease(BUDGET, wait_s=9.0)
        assert 0.055 < time.monotonic() - started < 1.0
        assert (first.delivery, second.delivery) == (1, 2)
        await queue.close()

    run(test())


def test_a_deadline_ends_a_request_on_time_with_nobody_calling(run: Callable[..., None]) -> None:
    async def test() -> None:
        queue = MemoryQueue()
        started = time.monotonic()
        await queue.submit(generate("later", deadline_ms=5_000))
        await queue.submit(generate(deadline_ms=60))
        events = [event async for event in queue.events("r")]
        assert 0.055 < time.monotonic() - started < 1.0
        assert isinstance(events[0], Failed)
        await queue.close()

    run(test())


def test_a_waiting_lease_gives_up_on_time(run: Callable[..., None]) -> None:
    async def test() -> None:
        queue = MemoryQueue()
        started = time.monotonic()
        assert await queue.lease(BUDGET, wait_s=0.05) == []
        assert 0.045 < time.monotonic() - started < 1.0
        await queue.close()

    run(test())


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts timers: what polls, or sets a timer for each token, is seen here."""

    num_timers = 0

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.num_timers += 1
        return super().call_at(when, callback, *args, context=context)


def test_publishing_and_waiting_set_no_timers_and_no_tasks() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        queue = MemoryQueue(lease_ms=60_000)
        ids = [f"r{i}" for i in range(32)]
        for request_id in ids:
            await queue.submit(generate(request_id, 1_000))
        leases = await queue.lease(BUDGET)
        readers = [asyncio.create_task(drain(queue, request_id)) for request_id in ids]
        waiting = asyncio.create_task(queue.lease(BUDGET, wait_s=60.0))
        await asyncio.sleep(0)
        timers, tasks = loop.num_timers, len(asyncio.all_tasks())
        for index in range(100):
            await queue.publish([Append(e.epoch, Tokens(e.request.request_id, index, [index])) for e in leases])
            await asyncio.sleep(0)
        assert (loop.num_timers, len(asyncio.all_tasks())) == (timers, tasks)
        await queue.publish([Append(e.epoch, Finished(e.request.request_id, "stop", Usage(3, 100))) for e in leases])
        await asyncio.gather(*readers)
        await queue.close()
        assert await waiting == []

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(test())


async def drain(queue: MemoryQueue, request_id: str) -> list[Event]:
    return [event async for event in queue.events(request_id)]


async def test_a_reader_that_has_fallen_behind_gets_all_it_missed_in_one_event() -> None:
    queue = MemoryQueue()
    await queue.submit(generate(max_tokens=1_000))
    (lease,) = await queue.lease(BUDGET)
    reader = queue.events("r")
    for index in range(500):
        await queue.publish([Append(lease.epoch, Tokens("r", index, [index]))])
    assert await anext(reader) == Tokens("r", 0, list(range(500)))
    await queue.close()


async def test_slow_readers_cost_no_memory_beyond_the_log() -> None:
    queue = MemoryQueue()
    await queue.submit(generate(max_tokens=50_000))
    (lease,) = await queue.lease(BUDGET)
    await queue.publish([Append(lease.epoch, Tokens("r", 0, [0]))])
    readers = [queue.events("r") for _ in range(100)]
    for reader in readers:
        await anext(reader)
    tracemalloc.start()
    for first in range(1, 40_000, 100):
        await queue.publish([Append(lease.epoch, Tokens("r", first, list(range(100))))])
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 3 * 4 * 40_000  # int32, and an array may over-allocate
    event = await anext(readers[0])
    assert isinstance(event, Tokens)
    assert len(event.token_ids) == 40_000
    await queue.close()


async def test_memory_comes_back_when_requests_are_forgotten() -> None:
    """Far deadlines and ids of their own: whatever is kept by request must go with it."""
    clock = Clock()
    queue = MemoryQueue(now_ms=clock, log_ttl_ms=1_000)

    async def serve(round_: int) -> None:
        for i in range(100):
            await queue.submit(generate(f"{round_}-{i}", 200, deadline_ms=86_400_000))
        for lease in await queue.lease(BUDGET):
            rid = lease.request.request_id
            reading = asyncio.create_task(drain(queue, rid))
            await asyncio.sleep(0)
            end = Finished(rid, "stop", Usage(3, 200))
            await queue.publish([Append(lease.epoch, Tokens(rid, 0, [7] * 200)), Append(lease.epoch, end)])
            assert len(await reading) == 2
        clock.now_ms += 1_000
        queue.expire()

    for round_ in range(3):
        await serve(round_)
    gc.collect()
    tracemalloc.start()
    for round_ in range(3, 13):
        await serve(round_)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20_000  # 20 bytes for each of 1,000 requests
    await queue.close()


async def test_an_ended_request_keeps_its_tokens_and_not_its_prompt() -> None:
    queue = MemoryQueue()
    tracemalloc.start()
    for i in range(50):
        await queue.submit(Generate(f"r{i}", "m", [100_000] * 2_000, 10))
    for lease in await queue.lease(BUDGET):
        await queue.publish([Append(lease.epoch, Finished(lease.request.request_id, "stop", Usage(2_000, 0)))])
    del lease
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50 * 4_000  # a prompt alone is 10,000 bytes
    await queue.close()


async def test_those_who_stop_waiting_leave_nothing_behind() -> None:
    queue = MemoryQueue()
    await queue.submit(generate())
    await queue.lease(BUDGET)
    await queue.submit(generate("woken"))
    tracemalloc.start()
    for _ in range(500):
        reading = asyncio.create_task(drain(queue, "r"))
        leaving = asyncio.create_task(queue.lease(BUDGET, wait_s=3_600.0))
        (lease,) = await leaving
        staying = asyncio.create_task(queue.lease(BUDGET, wait_s=3_600.0))
        await asyncio.sleep(0)
        await queue.release([(lease.request.request_id, lease.epoch)])
        await staying
        await queue.release([((await staying)[0].request.request_id, (await staying)[0].epoch)])
        reading.cancel()
        await asyncio.wait([reading])
    del reading, leaving, staying, lease
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000  # 100 bytes each
    await queue.close()


async def test_a_reader_keeps_its_log_even_when_the_queue_has_forgotten_it() -> None:
    clock = Clock()
    queue = MemoryQueue(now_ms=clock, log_ttl_ms=1_000)
    await queue.submit(generate())
    (lease,) = await queue.lease(BUDGET)
    await queue.publish([Append(lease.epoch, Tokens("r", 0, [5]))])
    reader = queue.events("r")
    assert await anext(reader) == Tokens("r", 0, [5])
    end = Finished("r", "stop", Usage(3, 2))
    await queue.publish([Append(lease.epoch, Tokens("r", 1, [6])), Append(lease.epoch, end)])
    clock.now_ms += 5_000
    queue.expire()
    await queue.submit(generate(max_tokens=3))  # the id has a new life
    assert [event async for event in reader] == [Tokens("r", 1, [6]), end]
    await queue.close()


async def test_nothing_mutable_is_shared_between_writers_and_readers() -> None:
    queue = MemoryQueue()
    prompt = [1, 2, 3]
    await queue.submit(Generate("r", "m", prompt, 10))
    prompt.append(4)
    (lease,) = await queue.lease(BUDGET)
    assert lease.request.prompt_ids == [1, 2, 3]
    written = [5, 6]
    await queue.publish([Append(lease.epoch, Tokens("r", 0, written))])
    written[0] = 66
    event = await anext(queue.events("r"))
    assert isinstance(event, Tokens)
    event.token_ids[1] = 66
    assert await anext(queue.events("r")) == Tokens("r", 0, [5, 6])
    await queue.close()


async def test_closing_leaves_no_timer_and_no_task_behind() -> None:
    before = asyncio.all_tasks()
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    queue = MemoryQueue(lease_ms=20)
    await queue.submit(generate())
    await queue.lease(BUDGET)
    reading = asyncio.create_task(drain(queue, "r"))
    await asyncio.sleep(0)
    await queue.close()
    with pytest.raises(Unavailable):
        await reading
    await asyncio.sleep(0.05)  # a timer left behind would raise into the loop's exception handler
    assert raised == []
    assert asyncio.all_tasks() == before


def test_the_clock_reads_time_of_day_and_never_goes_back() -> None:
    clock = steady_epoch_clock()
    assert abs(clock() - time.time() * 1000) < 1_000
    readings = [clock() for _ in range(1_000)]
    assert readings == sorted(readings)


@pytest.mark.parametrize("limit", ["lease_ms", "max_deliveries", "max_queued_tokens", "log_ttl_ms", "max_overtakes"])
def test_a_limit_that_makes_no_sense_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        MemoryQueue(**{limit: 0})  # type: ignore[arg-type]  # mypy cannot see that none of these is the clock


@pytest.mark.parametrize("bug", ["gap at the start", "gap in the batch", "bill"])
def test_a_gap_or_a_wrong_bill_is_a_bug_where_no_log_can_be_lost(run: Callable[..., None], bug: str) -> None:
    async def test() -> None:
        queue = MemoryQueue()
        await queue.submit(generate("other"))
        await queue.submit(generate())
        other, lease = await queue.lease(BUDGET)
        first, second = Tokens("r", 0, [5]), Tokens("r", 2, [6])
        events: dict[str, list[Event]] = {
            "gap at the start": [second],
            "gap in the batch": [first, second],
            "bill": [first, Finished("r", "stop", Usage(3, 2))],
        }
        appends = [Append(other.epoch, Tokens("other", 0, [1])), *(Append(lease.epoch, each) for each in events[bug])]
        with pytest.raises(ValueError, match="bug"):
            await queue.publish(appends)
        assert (await queue.standing("r")).num_tokens == (await queue.standing("other")).num_tokens == 0
        await queue.close()

    run(test())
