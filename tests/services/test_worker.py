"""A worker between a real queue and a real engine over the scripted backend: nothing lost, whatever happens to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from batcher.backend import BackendError, BackendErrorKind, BackendLimits
from batcher.engine import Engine
from services.backends.scripted import ScriptedBackend
from services.queues.memory import MemoryQueue
from services.worker import Worker
from wire.errors import Unavailable
from wire.messages import Event, Failed, Finished, Generate, SamplingParams, Tokens

LIMITS = BackendLimits(
    model="m", num_blocks=64, block_size=4, max_batch_tokens=32, max_batch_seqs=8, max_model_len=200, vocab_size=50
)


def generate(name: str, max_tokens: int = 20) -> Generate:
    prompt = [len(name) + ord(letter) % 40 for letter in name]
    return Generate(name, "m", prompt, max_tokens, SamplingParams(temperature=1.0, seed=sum(prompt)))


def make_worker(
    queue: MemoryQueue,
    name: str = "w",
    *,
    step_s: float = 0.0,
    fault: Callable[[int], BackendErrorKind | None] = lambda forward: None,
    sleep: Callable[[float], None] = time.sleep,
    lease_s: float = 5.0,
) -> Worker:
    backend = ScriptedBackend(LIMITS, step_s=step_s, fault=fault, sleep=sleep)
    return Worker(name, "m", Engine(backend), LIMITS, queue, lease_s=lease_s)


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)


async def read(queue: MemoryQueue, request_id: str) -> tuple[list[int], Event]:
    """The tokens, each at its index, and the one terminal event."""
    tokens: list[int] = []
    last: Event | None = None
    async with asyncio.timeout(20):
        async for event in queue.events(request_id):
            assert last is None, "an event after the terminal one"
            if isinstance(event, Tokens):
                assert event.first_index == len(tokens)
                tokens += event.token_ids
            else:
                last = event
    assert last is not None
    return tokens, last


def alone(request: Generate) -> list[int]:
    engine = Engine(ScriptedBackend(LIMITS))
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work:
        tokens += [t for append in engine.step() if isinstance(append.event, Tokens) for t in append.event.token_ids]
    return tokens


async def test_what_a_worker_serves_is_what_the_engine_computes_alone() -> None:
    queue = MemoryQueue()
    requests = [generate(f"request-{index}") for index in range(30)]
    async with running(make_worker(queue)):
        for request in requests:
            await queue.submit(request)
        answers = await asyncio.gather(*(read(queue, request.request_id) for request in requests))
    for request, (tokens, last) in zip(requests, answers, strict=True):
        assert tokens == alone(request)
        assert isinstance(last, Finished)
        assert last.reason == "length"
        assert last.usage.completion_tokens == len(tokens)
    assert (await queue.depth()).running_requests == 0
    await queue.close()


async def test_a_cancelled_request_ends_within_a_step_and_frees_its_blocks() -> None:
    queue = MemoryQueue()
    worker = make_worker(queue, step_s=0.01)
    async with running(worker):
        await queue.submit(generate("endless", 150))
        await queue.submit(generate("other", 20))
        await asyncio.sleep(0.1)
        await queue.cancel("endless")
        tokens, last = await read(queue, "endless")
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert len(tokens) < 150
        assert (await read(queue, "other"))[0] == alone(generate("other", 20))
        await asyncio.sleep(0.05)
        assert worker.load.running == worker.load.waiting == 0
    await queue.close()


async def test_a_request_beyond_the_pool_is_refused_with_its_numbers_and_others_go_on() -> None:
    queue = MemoryQueue()
    small = BackendLimits("m", 8, 4, 32, 8, 200, 50)
    worker = Worker("w", "m", Engine(ScriptedBackend(small)), small, queue, lease_s=5.0)
    async with running(worker):
        await queue.submit(generate("huge", 150))
        await queue.submit(generate("fits", 10))
        tokens, last = await read(queue, "huge")
        assert isinstance(last, Failed)
        assert (tokens, last.code) == ([], "request_too_large")
        assert "32" in last.message
        assert (await read(queue, "fits"))[0] == alone(generate("fits", 10))
    await queue.close()


async def test_a_lost_backend_hands_its_requests_to_the_next_worker_and_no_token_changes() -> None:
    queue = MemoryQueue()
    requests = [generate(f"request-{index}") for index in range(8)]
    for request in requests:
        await queue.submit(request)
    dying = make_worker(queue, "dying", fault=lambda forward: BackendErrorKind.FATAL if forward == 9 else None)
    with pytest.raises(BackendError):
        await asyncio.wait_for(dying.run(), 20)
    assert not dying.is_ready
    async with running(make_worker(queue, "living")):
        for request in requests:
            tokens, last = await read(queue, request.request_id)
            assert tokens == alone(request)
            assert isinstance(last, Finished)
    await queue.close()


async def test_a_hung_engine_loses_its_lease_and_its_late_tokens_are_fenced() -> None:
    queue = MemoryQueue(lease_ms=300)
    hang, steps = threading.Event(), 0

    def sleep(_: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            hang.wait(10)

    request = generate("request", 40)
    async with running(make_worker(queue, "hung", step_s=0.001, sleep=sleep, lease_s=0.3)):
        await queue.submit(request)
        await asyncio.sleep(0.2)
        async with running(make_worker(queue, "living", lease_s=0.3)):
            tokens, last = await read(queue, "request")
            hang.set()  # the zombie wakes and publishes what it had
            await asyncio.sleep(0.2)
        assert tokens == alone(request)
        assert isinstance(last, Finished)
        assert (await read(queue, "request"))[0] == tokens
    await queue.close()


async def test_draining_finishes_what_runs_and_leaves_the_rest_to_others() -> None:
    queue = MemoryQueue()
    worker = make_worker(queue, step_s=0.005)
    task = asyncio.create_task(worker.run())
    await queue.submit(generate("running", 20))
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(worker.drain(10.0))
    await asyncio.sleep(0)
    await queue.submit(generate("later", 20))
    await asyncio.wait_for(asyncio.gather(task, draining), 20)
    assert (await read(queue, "running"))[0] == alone(generate("running", 20))
    assert (await queue.depth()).queued_requests == 1
    async with running(make_worker(queue, "next")):
        assert (await read(queue, "later"))[0] == alone(generate("later", 20))
    await queue.close()


class AwayQueue(MemoryQueue):
    """A queue that can be told not to answer what hands requests back."""

    is_away = False

    async def release(self, leases: Sequence[tuple[str, int]]) -> None:
        if self.is_away:
            raise Unavailable("away")
        await super().release(leases)


async def test_a_queue_that_goes_away_during_the_drain_does_not_end_what_runs() -> None:
    """A request comes after the drain has begun and cannot be handed back: its lease lapses, the other finishes."""
    queue = AwayQueue()
    worker = make_worker(queue, step_s=0.02)
    request = generate("running", 40)
    await queue.submit(request)
    async with running(worker) as task, asyncio.timeout(20):
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(worker.drain(10))
        await asyncio.sleep(0)
        queue.is_away = True
        await queue.submit(generate("late"))
        assert (await read(queue, "running"))[0] == alone(request)
        await draining
        await task


async def test_draining_hands_back_what_does_not_finish_in_time() -> None:
    queue = MemoryQueue()
    worker = make_worker(queue, step_s=0.02)
    task = asyncio.create_task(worker.run())
    await queue.submit(generate("long", 150))
    await asyncio.sleep(0.2)
    await worker.drain(0.1)
    await asyncio.wait_for(task, 20)
    async with running(make_worker(queue, "next")):
        tokens, _ = await read(queue, "long")
    assert tokens == alone(generate("long", 150))
    await queue.close()


async def test_room_that_is_left_over_does_not_keep_a_worker_from_asking_again() -> None:
    """256 KV tokens, twice lent out: two requests of 180 leave 152, too few for the next until one of them ends."""
    queue = MemoryQueue()
    requests = [generate(f"request-{index:03}", max_tokens=169) for index in range(12)]
    async with running(make_worker(queue, lease_s=60.0)):
        for request in requests:
            await queue.submit(request)
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*(read(queue, request.request_id) for request in requests))
    assert all(isinstance(last, Finished) for _, last in answers)
