"""The queue's contract: who is handed what, in which order, and how a worker waits for it."""

from __future__ import annotations

import asyncio

from tests.contracts.queues import PATIENCE_S, QueueRig, budget, generate, held, lease_one, submit_and_lease
from wire.queue import Queue


async def test_requests_are_handed_out_by_priority_and_then_by_age(queue: Queue) -> None:
    for i, priority in enumerate([0, -1, 1, 0, 1, -1]):
        await queue.submit(generate(str(i), priority=priority))
    leases = [*await queue.lease(budget(max_requests=4)), *await queue.lease(budget())]
    assert [lease.request.request_id for lease in leases] == ["2", "4", "0", "3", "1", "5"]


async def test_only_listed_models_are_handed_out_in_one_order(queue: Queue) -> None:
    for i, model in enumerate("abcab"):
        await queue.submit(generate(str(i), model=model))
    leases = await queue.lease(budget("b", "a", "b"))
    assert [lease.request.request_id for lease in leases] == ["0", "1", "3", "4"]


async def test_what_is_handed_out_sums_up_to_at_most_max_tokens(queue: Queue) -> None:
    for request_id in "abc":
        await queue.submit(generate(request_id, prompt_tokens=10, max_tokens=90))
    assert len(await queue.lease(budget(max_tokens=200, capacity_tokens=1_000))) == 2
    assert await queue.lease(budget(max_tokens=99, capacity_tokens=1_000)) == []
    assert len(await queue.lease(budget(max_tokens=100, capacity_tokens=1_000))) == 1


async def test_a_request_that_can_never_fit_is_handed_out_to_be_refused_in_words(queue: Queue) -> None:
    await queue.submit(generate("huge", prompt_tokens=10, max_tokens=991))
    await queue.submit(generate("small", prompt_tokens=10, max_tokens=90))
    leases = await queue.lease(budget(max_tokens=100, capacity_tokens=1_000))
    assert [lease.request.request_id for lease in leases] == ["huge", "small"]


async def test_a_large_request_is_overtaken_a_bounded_number_of_times_and_then_blocks_the_line(queue: Queue) -> None:
    await queue.submit(generate("large", prompt_tokens=1, max_tokens=499))
    for i in range(10):
        await queue.submit(generate(str(i), prompt_tokens=1, max_tokens=9))
    busy = budget(max_requests=3, max_tokens=100, capacity_tokens=500)
    assert [len(await queue.lease(busy)) for _ in range(4)] == [3, 1, 0, 0]  # max_overtakes is 4
    await queue.submit(generate("urgent", prompt_tokens=1, max_tokens=9, priority=1))
    assert [lease.request.request_id for lease in await queue.lease(busy)] == ["urgent"]
    leases = await queue.lease(budget(max_tokens=510, capacity_tokens=510))
    assert [lease.request.request_id for lease in leases] == ["large", "4"]


async def test_a_waiting_lease_wakes_for_the_first_request(queue: Queue) -> None:
    waiting = asyncio.create_task(queue.lease(budget(), wait_s=PATIENCE_S))
    other_model = asyncio.create_task(queue.lease(budget("other"), wait_s=0.05))
    await asyncio.sleep(0.01)
    await queue.submit(generate())
    async with asyncio.timeout(PATIENCE_S / 2):
        assert [lease.request.request_id for lease in await waiting] == ["r"]
        assert await other_model == []


async def test_one_request_wakes_one_of_two_waiting_workers_and_the_next_the_other(queue: Queue) -> None:
    waiting = [asyncio.create_task(queue.lease(budget(max_requests=1), wait_s=PATIENCE_S)) for _ in range(2)]
    await asyncio.sleep(0.01)
    await queue.submit(generate("a"))
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S / 2)
    assert (len(done), len(pending)) == (1, 1)
    await queue.submit(generate("b"))
    async with asyncio.timeout(PATIENCE_S / 2):
        leases = [lease for each in waiting for lease in await each]
    assert sorted(lease.request.request_id for lease in leases) == ["a", "b"]


async def test_a_waiting_lease_that_is_cancelled_takes_nothing_with_it(queue: Queue) -> None:
    waiting = asyncio.create_task(queue.lease(budget(), wait_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    await queue.submit(generate())
    await lease_one(queue)


async def test_a_waiting_lease_wakes_for_a_lapsed_and_for_a_released_request(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue)
    waiting = asyncio.create_task(rig.queue.lease(budget(), wait_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    await rig.advance(6_000)
    async with asyncio.timeout(PATIENCE_S / 2):
        (again,) = await waiting
    assert (again.request, again.delivery) == (lease.request, 2)
    waiting = asyncio.create_task(rig.queue.lease(budget(), wait_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    await rig.queue.release([held(again)])
    async with asyncio.timeout(PATIENCE_S / 2):
        (once_more,) = await waiting
    assert once_more.delivery == 2


async def test_a_waiting_lease_ends_when_its_caller_wants_another(queue: Queue) -> None:
    await queue.submit(generate("large", prompt_tokens=10, max_tokens=90))
    has_room = asyncio.Event()
    tight = budget(max_tokens=50, capacity_tokens=1_000)
    waiting = asyncio.create_task(queue.lease(tight, PATIENCE_S, has_room))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    has_room.set()
    async with asyncio.timeout(PATIENCE_S / 2):
        assert await waiting == []
        assert await queue.lease(tight, PATIENCE_S, has_room) == []
    assert [lease.request.request_id for lease in await queue.lease(budget())] == ["large"]
