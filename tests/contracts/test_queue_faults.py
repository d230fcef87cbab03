"""The queue's contract under faults that a queue alone can show: lost replies, zombies, storms, crowds, slow
readers."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from tests.contracts.conftest import OpenRig
from tests.contracts.queues import (
    PATIENCE_S,
    QueueOptions,
    QueueRig,
    budget,
    completion,
    finished,
    fold,
    generate,
    held,
    lease_one,
    read,
    refusal,
    submit_and_lease,
    tokens,
)
from wire.errors import Conflict, QueueFull
from wire.messages import Event, Finished, Tokens, Usage
from wire.queue import Append, Depth, Queue, RefusalReason


async def test_every_call_may_come_twice_because_its_reply_was_lost(queue: Queue) -> None:
    async def publish_twice(*appends: Append) -> None:
        assert await queue.publish(appends) == []
        assert await queue.publish(appends) == []

    for _ in range(2):
        await queue.submit(generate())
    first = await lease_one(queue)
    await publish_twice(tokens(first, 0, 1), tokens(first, 1, 2))
    for _ in range(2):
        assert await queue.renew([held(first)]) == []
    for _ in range(2):
        await queue.release([held(first)])
    second = await lease_one(queue)
    assert (second.token_ids, second.delivery) == ((1, 2), 1)
    await publish_twice(tokens(second, 2, 3), finished(second, 3))
    for _ in range(2):
        await queue.cancel("r")
    answer = await completion(queue)
    assert (answer.token_ids, answer.terminal) == ([1, 2, 3], Finished("r", "stop", Usage(3, 3)))
    assert await queue.depth() == Depth(0, 0, 0, 0)


async def test_the_end_of_a_cancelled_request_may_come_twice(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    for _ in range(2):
        await queue.cancel("r")
    for _ in range(2):
        assert await queue.publish([finished(lease, 0, "stop")]) == []
    assert await read(queue) == [Finished("r", "cancelled", Usage(3, 0))]


async def test_a_publish_half_of_which_was_logged_before_is_completed(queue: Queue) -> None:
    """What a worker does that does not know how much of its last write arrived: it sends all of it again, and more."""
    lease = await submit_and_lease(queue)
    sent: list[Append] = []
    for index in range(20):
        sent.append(tokens(lease, index, index))
        await queue.publish(sent)
    await queue.publish([*sent, finished(lease, 20)])
    assert (await completion(queue)).token_ids == list(range(20))


async def test_a_zombie_writes_nothing_after_its_request_was_taken_over(rig: QueueRig) -> None:
    zombie = await submit_and_lease(rig.queue)
    await rig.queue.publish([tokens(zombie, 0, 1, 2)])
    await rig.advance(3 * 6_000)
    heir = await lease_one(rig.queue)
    fenced = refusal(zombie, RefusalReason.FENCED)
    for late in ([tokens(zombie, 2, 66)], [tokens(zombie, 0, 1)], [finished(zombie, 2)], [tokens(zombie, 9, 66)]):
        assert await rig.queue.publish(late) == [fenced]
    assert await rig.queue.renew([held(zombie)]) == [fenced]
    mixed = [tokens(zombie, 2, 66), tokens(heir, 2, 3), finished(zombie, 3), finished(heir, 3)]
    assert await rig.queue.publish(mixed) == [fenced, fenced]
    assert (await completion(rig.queue)).token_ids == [1, 2, 3]


async def test_a_zombie_cannot_keep_its_request_alive(rig: QueueRig) -> None:
    """Its late renewals come after the takeover; when the heir dies too, the third worker gets the request."""
    zombie = await submit_and_lease(rig.queue)
    await rig.advance(6_000)
    heir = await lease_one(rig.queue)
    for _ in range(6):
        await rig.advance(1_000)
        assert await rig.queue.renew([held(zombie)]) == [refusal(zombie, RefusalReason.FENCED)]
    third = await lease_one(rig.queue)
    assert third.epoch > heir.epoch > zombie.epoch


async def test_a_zombie_of_a_forgotten_request_cannot_write_into_its_namesake(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(log_ttl_ms=1_000))
    zombie = await submit_and_lease(rig.queue, generate(deadline_ms=500))
    await rig.advance(500)
    await rig.advance(1_000)
    lease = await submit_and_lease(rig.queue, generate(max_tokens=7))
    assert await rig.queue.publish([tokens(zombie, 0, 66)]) == [refusal(zombie, RefusalReason.FENCED)]
    await rig.queue.publish([tokens(lease, 0, 1), finished(lease, 1)])
    assert (await completion(rig.queue)).token_ids == [1]


async def test_a_hundred_simultaneous_submits_of_one_id_make_one_generation(queue: Queue) -> None:
    await asyncio.gather(*(queue.submit(generate()) for _ in range(100)))
    readers = [asyncio.create_task(read(queue)) for _ in range(100)]
    (lease,) = await queue.lease(budget())
    for index in range(10):
        await queue.publish([tokens(lease, index, index)])
        await asyncio.sleep(0)
    await queue.publish([finished(lease, 10)])
    answers = [fold(events) for events in await asyncio.gather(*readers)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].token_ids == list(range(10))
    assert await queue.lease(budget()) == []


async def test_of_simultaneous_submits_with_two_bodies_one_body_wins(queue: Queue) -> None:
    bodies = [generate(max_tokens=1 + i % 2) for i in range(50)]
    results = await asyncio.gather(*(queue.submit(body) for body in bodies), return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 25
    assert [result for result in results if result is True] == [True]
    assert sum(result is False for result in results) == 24
    assert len(await queue.lease(budget())) == 1


async def test_simultaneous_submits_never_exceed_the_cap(open_rig: OpenRig) -> None:
    queue = (await open_rig(QueueOptions(max_queued_tokens=1_000))).queue
    requests = [generate(f"r{i}", prompt_tokens=10, max_tokens=20) for i in range(100)]
    results = await asyncio.gather(*(queue.submit(request) for request in requests), return_exceptions=True)
    assert sum(isinstance(result, QueueFull) for result in results) == 67
    assert await queue.depth() == Depth(33, 990, 0, 0)


async def test_simultaneous_workers_get_each_request_once(queue: Queue) -> None:
    for i in range(60):
        await queue.submit(generate(f"r{i}"))
    takes = await asyncio.gather(*(queue.lease(budget(max_requests=7, worker_id=f"w{i}")) for i in range(10)))
    taken = [lease for leases in takes for lease in leases]
    assert sorted(lease.request.request_id for lease in taken) == sorted(f"r{i}" for i in range(60))
    assert len({lease.epoch for lease in taken}) == 60


async def test_readers_at_different_starts_and_speeds_all_read_the_one_log(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    length = 200

    async def read_slowly(start: int, pause_every: int) -> list[Event]:
        events = []
        async for event in queue.events("r", start):
            events.append(event)
            if len(events) % pause_every == 0:
                await asyncio.sleep(0.002)
        return events

    crowd = [(start, 1 + start % 4) for start in range(0, length + 20, 3)]
    readers = [asyncio.create_task(read_slowly(*reader)) for reader in crowd]
    for index in range(0, length, 2):
        await queue.publish([tokens(lease, index, index, index + 1)])
        await asyncio.sleep(0)
    await queue.publish([finished(lease, length)])
    async with asyncio.timeout(PATIENCE_S):
        for (start, _), events in zip(crowd, await asyncio.gather(*readers), strict=True):
            assert fold(events, start).token_ids == list(range(start, length))


async def test_a_reader_that_leaves_disturbs_nobody_and_may_resume(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    staying = asyncio.create_task(read(queue))
    leaving = [asyncio.create_task(read(queue)) for _ in range(5)]
    await asyncio.sleep(0)
    await queue.publish([tokens(lease, 0, 0)])
    await asyncio.sleep(0.01)
    for each in leaving:
        each.cancel()
    await asyncio.wait(leaving)
    async for event in queue.events("r"):  # and one that breaks off half way
        assert isinstance(event, Tokens)
        break
    await queue.publish([tokens(lease, 1, 1), finished(lease, 2)])
    assert fold(await staying).token_ids == [0, 1]
    assert (await completion(queue, start=1)).token_ids == [1]


async def test_all_workers_gone_for_a_minute_lose_no_request(rig: QueueRig) -> None:
    for i in range(10):
        await rig.queue.submit(generate(f"r{i}"))
    dead = await rig.queue.lease(budget(max_requests=5))
    await rig.queue.publish([tokens(lease, 0, n) for n, lease in enumerate(dead)])
    await rig.advance(60_000)
    assert await rig.queue.depth() == Depth(10, 1_030, 0, 0, oldest_ms=60_000)
    for n, lease in enumerate(await rig.queue.lease(budget())):
        assert lease.token_ids == ((n,) if n < 5 else ())
        await rig.queue.publish([finished(lease, len(lease.token_ids))])
    for i in range(10):
        assert isinstance((await completion(rig.queue, f"r{i}")).terminal, Finished)
    assert await rig.queue.depth() == Depth(0, 0, 0, 0)


async def test_epochs_are_never_given_out_twice(rig: QueueRig) -> None:
    epochs: list[int] = []
    for i in range(5):
        await rig.queue.submit(generate(f"r{i}"))
    for _ in range(3):
        leases = await rig.queue.lease(budget())
        epochs += [lease.epoch for lease in leases]
        await rig.queue.release([held(leases[0])])
        await rig.advance(6_000)
    assert all(earlier < later for earlier, later in pairwise(epochs))
