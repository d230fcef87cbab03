"""The queue's contract, sentence by sentence: coming in, being logged, being read.

Who is handed what is in test_queue_leasing.py, how requests end otherwise in test_queue_endings.py, faults in
test_queue_faults.py, random histories in test_queue_histories.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.contracts.conftest import OpenRig
from tests.contracts.queues import (
    MODEL,
    PATIENCE_S,
    QueueOptions,
    QueueRig,
    budget,
    completion,
    failed,
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
from wire.errors import BadRequest, Conflict, QueueFull, RequestTooLarge, Unavailable, UnknownRequest
from wire.messages import Event, Failed, Finished, Generate, SamplingParams, Timings, Tokens, Usage
from wire.queue import Append, Depth, Queue, RefusalReason

# --- submit -----------------------------------------------------------------------------------------------------------


async def test_a_request_is_handed_out_as_it_was_submitted(queue: Queue) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=2**63 - 1)
    request = Generate("r", MODEL, [0, 2**31 - 1], 7, sampling, [2, 3], 1, "tenant", 1, 60_000)
    lease = await submit_and_lease(queue, request)
    assert lease.request == request
    assert (lease.token_ids, lease.delivery) == ((), 1)


async def test_submitting_the_same_request_again_attaches_to_it(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.submit(generate())
    assert await queue.lease(budget()) == []
    await queue.publish([tokens(lease, 0, 5), finished(lease, 1)])
    await queue.submit(generate())
    assert await queue.lease(budget()) == []
    assert (await completion(queue)).token_ids == [5]


OTHER_BODIES: list[dict[str, Any]] = [
    {"model": "other"},
    {"prompt_ids": [0, 1, 9]},
    {"max_tokens": 99},
    {"sampling": SamplingParams(seed=1)},
    {"stop_token_ids": [4]},
    {"min_tokens": 1},
    {"tenant": "other"},
    {"priority": 1},
    {"deadline_ms": 5},
]


@pytest.mark.parametrize("change", OTHER_BODIES, ids=lambda change: next(iter(change)))
async def test_a_request_id_taken_by_another_body_is_a_conflict(queue: Queue, change: dict[str, Any]) -> None:
    lease = await submit_and_lease(queue)
    other = msgspec.structs.replace(generate(), **change)
    with pytest.raises(Conflict):
        await queue.submit(other)
    await queue.publish([finished(lease, 0)])
    with pytest.raises(Conflict):
        await queue.submit(other)


async def test_equal_bodies_attach_however_their_numbers_are_written(queue: Queue) -> None:
    await queue.submit(msgspec.structs.replace(generate(), sampling=SamplingParams(temperature=1)))
    await queue.submit(msgspec.structs.replace(generate(), sampling=SamplingParams(temperature=1.0)))
    assert (await queue.depth()).queued_requests == 1


CANNOT_TRAVEL: list[dict[str, Any]] = [
    {"request_id": ""},
    {"request_id": "x" * 129},
    {"request_id": "\ud800"},
    {"prompt_ids": []},
    {"prompt_ids": [-1]},
    {"prompt_ids": [2**31]},
    {"prompt_ids": [np.int64(1)]},
    {"max_tokens": 0},
    {"max_tokens": 2**70},
    {"priority": 2},
    {"deadline_ms": 0},
    {"deadline_ms": 1_800_000_000_000},  # a time of day: deadlines count from acceptance
    {"sampling": SamplingParams(temperature=float("nan"))},
    {"sampling": SamplingParams(top_p=0.0)},
]


@pytest.mark.parametrize("change", CANNOT_TRAVEL, ids=str)
async def test_a_request_out_of_bounds_is_refused_at_the_door(queue: Queue, change: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        await queue.submit(msgspec.structs.replace(generate(), **change))
    assert await queue.depth() == Depth(0, 0, 0, 0)


async def test_over_the_cap_a_request_is_refused_and_leaves_no_trace(open_rig: OpenRig) -> None:
    queue = (await open_rig(QueueOptions(max_queued_tokens=100))).queue
    await queue.submit(generate("a", prompt_tokens=10, max_tokens=50))
    with pytest.raises(QueueFull, match=r"60 of 100.* 41") as caught:
        await queue.submit(generate("b", prompt_tokens=1, max_tokens=40))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    with pytest.raises(UnknownRequest):
        await read(queue, "b")
    assert (await queue.depth()).queued_tokens == 60
    await queue.submit(generate("c", prompt_tokens=1, max_tokens=39))


async def test_the_cap_counts_what_runs_and_opens_when_it_ends(open_rig: OpenRig) -> None:
    queue = (await open_rig(QueueOptions(max_queued_tokens=100))).queue
    lease = await submit_and_lease(queue, generate("a", prompt_tokens=10, max_tokens=90))
    with pytest.raises(QueueFull):
        await queue.submit(generate("b", prompt_tokens=1, max_tokens=1))
    await queue.submit(lease.request)  # attaching takes no room
    await queue.publish([finished(lease, 0)])
    await queue.submit(generate("b", prompt_tokens=10, max_tokens=90))


async def test_a_request_that_exceeds_the_whole_cap_is_too_large_and_not_told_to_come_back(open_rig: OpenRig) -> None:
    queue = (await open_rig(QueueOptions(max_queued_tokens=100))).queue
    with pytest.raises(RequestTooLarge, match=r"101.*100"):
        await queue.submit(generate(prompt_tokens=1, max_tokens=100))


async def test_retry_after_is_when_the_request_will_fit(open_rig: OpenRig) -> None:
    """Ten requests of 100 tokens; one ends every 500 ms, so a request of 250 fits after the third end."""
    rig = await open_rig(QueueOptions(max_queued_tokens=1_000))
    for i in range(30):
        if i >= 10:
            await rig.advance(500)
            lease = (await rig.queue.lease(budget(max_requests=1)))[0]
            await rig.queue.publish([finished(lease, 0)])
        await rig.queue.submit(generate(f"r{i}", prompt_tokens=1, max_tokens=99))
    with pytest.raises(QueueFull) as caught:
        await rig.queue.submit(generate("big", prompt_tokens=1, max_tokens=249))
    assert caught.value.retry_after_s == pytest.approx(1.25, rel=0.1)


async def test_retry_after_grows_when_workers_die_under_load(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(max_queued_tokens=1_000))
    refused_after: list[float] = []
    for i in range(10):
        await rig.queue.submit(generate(f"r{i}", prompt_tokens=1, max_tokens=99))
    await rig.advance(1_000)
    lease = (await rig.queue.lease(budget(max_requests=1)))[0]
    await rig.queue.publish([finished(lease, 0)])
    for _ in range(3):
        with pytest.raises(QueueFull) as caught:
            await rig.queue.submit(generate("big", prompt_tokens=1, max_tokens=499))
        refused_after.append(caught.value.retry_after_s or 0.0)
        await rig.advance(5_000)
    assert refused_after == sorted(set(refused_after))


# --- publish ----------------------------------------------------------------------------------------------------------


async def test_one_publish_serves_many_requests(queue: Queue) -> None:
    leases = [await submit_and_lease(queue, generate(f"r{i}")) for i in range(5)]
    for index in range(3):
        assert await queue.publish([tokens(lease, index, 10 * n + index) for n, lease in enumerate(leases)]) == []
    assert await queue.publish([finished(lease, 3, "length") for lease in leases]) == []
    for n, lease in enumerate(leases):
        answer = await completion(queue, lease.request.request_id)
        assert answer.token_ids == [10 * n, 10 * n + 1, 10 * n + 2]
        assert answer.terminal == Finished(f"r{n}", "length", Usage(3, 3))


async def test_terminals_arrive_whole(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    end = Finished("r", "stop", Usage(3, 1, 2), Timings(1.5, 2.5, 3.5, 4))
    await queue.publish([tokens(lease, 0, 2**31 - 1), Append(lease.epoch, end)])
    assert await read(queue) == [Tokens("r", 0, [2**31 - 1]), end]
    other = await submit_and_lease(queue, generate("other"))
    await queue.publish([failed(other, "internal")])
    assert await read(queue, "other") == [Failed("other", "internal", "it broke", False)]


async def test_indices_already_logged_are_dropped_and_what_is_logged_stays(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 1, 2, 3)])
    assert await queue.publish([tokens(lease, 0, 7, 8)]) == []
    assert await queue.publish([tokens(lease, 2, 9, 4), tokens(lease, 2, 9, 9, 5), finished(lease, 5)]) == []
    assert (await completion(queue)).token_ids == [1, 2, 3, 4, 5]


async def test_a_bug_in_one_append_is_raised_and_nothing_of_the_publish_is_logged(queue: Queue) -> None:
    lease, other = await submit_and_lease(queue), await submit_and_lease(queue, generate("other"))
    bugs: list[list[Append]] = [
        [tokens(lease, 0)],  # no tokens
        [tokens(lease, 0, -1)],
        [tokens(lease, 0, 2**31)],
        [tokens(lease, 0, np.int64(1))],  # type: ignore[arg-type]  # what an engine may leak
        [tokens(lease, -1, 5)],
    ]
    for bug in bugs:
        with pytest.raises(ValueError, match="bug"):
            await queue.publish([tokens(other, 0, 1), *bug])
    await queue.publish([finished(lease, 0), finished(other, 0)])
    assert (await completion(queue)).token_ids == (await completion(queue, "other")).token_ids == []


async def test_appends_without_a_lease_are_fenced(queue: Queue) -> None:
    await queue.submit(generate())
    unknown = await submit_and_lease(queue, generate("gone", priority=1))
    await queue.publish([finished(unknown, 0)])
    appends = [Append(epoch, Tokens("r", 0, [1])) for epoch in (-1, 0, unknown.epoch, 10**6)]
    appends.append(Append(1, Tokens("never seen", 0, [1])))
    assert [each.reason for each in await queue.publish(appends)] == [RefusalReason.FENCED] * 5
    assert (await lease_one(queue)).token_ids == ()


async def test_after_its_end_a_request_takes_no_more(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 1), finished(lease, 1)])
    late = [tokens(lease, 1, 2), finished(lease, 1, "length"), failed(lease)]
    assert await queue.publish(late) == [refusal(lease, RefusalReason.FENCED)] * 3
    assert await queue.renew([held(lease)]) == [refusal(lease, RefusalReason.FENCED)]
    assert fold(await read(queue)).terminal == Finished("r", "stop", Usage(3, 1))


# --- events -----------------------------------------------------------------------------------------------------------


async def test_reading_may_start_at_any_index_whatever_the_appends_were(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 0, 1, 2), tokens(lease, 3, 3)])
    await queue.publish([tokens(lease, 4, 4, 5, 6, 7), finished(lease, 8)])
    for start in range(8):
        events = await read(queue, start=start)
        assert isinstance(events[0], Tokens)
        assert events[0].first_index == start
        assert fold(events, start).token_ids == list(range(start, 8))
    for beyond in (8, 9, 10**9):
        assert await read(queue, start=beyond) == [Finished("r", "stop", Usage(3, 8))]


async def test_a_reader_from_beyond_the_end_follows_from_its_start(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 0)])
    reading = asyncio.create_task(read(queue, start=3))
    for index in range(1, 6):
        await queue.publish([tokens(lease, index, index)])
        await asyncio.sleep(0)
    await queue.publish([finished(lease, 6)])
    assert fold(await reading, 3).token_ids == [3, 4, 5]


async def test_a_negative_start_and_an_unknown_request_are_refused(queue: Queue) -> None:
    await queue.submit(generate())
    with pytest.raises(BadRequest, match="-1"):
        await anext(queue.events("r", -1))
    with pytest.raises(UnknownRequest, match="nobody"):
        await anext(queue.events("nobody"))


async def test_tokens_reach_a_live_reader_before_the_end(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    events = queue.events("r")
    async with asyncio.timeout(PATIENCE_S):
        for index in range(3):
            following = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            await queue.publish([tokens(lease, index, index)])
            assert await following == Tokens("r", index, [index])


async def test_an_iterator_that_has_ended_stays_ended(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([finished(lease, 0)])
    events: list[Event] = []
    iterator = queue.events("r")
    for _ in range(3):
        events += [event async for event in iterator]
    assert len(events) == 1


async def test_a_log_is_forgotten_some_time_after_the_end_and_its_id_is_free_again(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(log_ttl_ms=1_000))
    lease = await submit_and_lease(rig.queue)
    await rig.advance(5_000)
    await rig.queue.publish([tokens(lease, 0, 1), finished(lease, 1)])
    await rig.advance(999)
    assert (await completion(rig.queue)).token_ids == [1]
    await rig.advance(1)
    with pytest.raises(UnknownRequest):
        await read(rig.queue)
    with pytest.raises(UnknownRequest):
        await rig.queue.cancel("r")
    again = await submit_and_lease(rig.queue, generate(max_tokens=50))
    assert (again.request.max_tokens, again.token_ids, again.delivery) == (50, (), 1)


# --- depth and close --------------------------------------------------------------------------------------------------


async def test_depth_counts_what_waits_and_what_runs_of_one_model_or_of_all(queue: Queue) -> None:
    for request_id, model in (("a", "x"), ("b", "x"), ("c", "y")):
        await queue.submit(generate(request_id, prompt_tokens=10, max_tokens=20, model=model))
    (lease,) = await queue.lease(budget("x", max_requests=1))
    assert await queue.depth() == Depth(2, 60, 1, 30)
    assert await queue.depth("x") == Depth(1, 30, 1, 30)
    assert await queue.depth("y") == Depth(1, 30, 0, 0)
    assert await queue.depth("z") == Depth(0, 0, 0, 0)
    await queue.publish([finished(lease, 0)])
    await queue.cancel("b")
    assert await queue.depth() == Depth(1, 30, 0, 0)


async def test_depth_says_how_long_the_oldest_has_waited_since_it_came_or_came_back(rig: QueueRig) -> None:
    queue = rig.queue

    async def oldest_ms(model: str | None = None) -> int:
        return (await queue.depth(model)).oldest_ms

    await queue.submit(generate("a", model="x"))
    await rig.advance(1_000)
    await queue.submit(generate("b", model="y"))
    await queue.submit(generate("first", model="y", priority=1))
    await rig.advance(500)
    assert [await oldest_ms(model) for model in (None, "x", "y", "z")] == [1_500, 1_500, 500, 0]
    (lease,) = await queue.lease(budget("x"))
    assert [await oldest_ms(model) for model in (None, "x")] == [500, 0]
    await queue.cancel("b")
    await queue.cancel("first")
    await rig.advance(6_000)  # the lease has lapsed
    await rig.advance(200)
    assert [await oldest_ms(model) for model in (None, "x", "y")] == [200, 200, 0]
    assert await queue.publish([finished(lease, 0)]) == []  # its owner was merely late
    assert await oldest_ms() == 0


async def test_depth_counts_the_dead_letters_of_one_model_or_of_all(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(max_deliveries=1, log_ttl_ms=1_000))
    for request_id, model in (("a", "x"), ("b", "x"), ("c", "y")):
        await rig.queue.submit(generate(request_id, model=model))
    await rig.queue.lease(budget("x", "y"))
    await rig.queue.submit(generate("waits", model="x"))
    assert (await rig.queue.depth()).dead_letters == 0
    await rig.advance(6_000)
    await rig.advance(1_000)  # their logs are gone, the count is not
    assert [(await rig.queue.depth(model)).dead_letters for model in (None, "x", "y", "z")] == [3, 2, 1, 0]


async def test_close_ends_readers_and_waiting_workers(queue: Queue) -> None:
    await queue.submit(generate())
    reading = [asyncio.create_task(read(queue, start=start)) for start in (0, 0, 5)]
    leasing = asyncio.create_task(queue.lease(budget("other"), wait_s=PATIENCE_S))
    await asyncio.sleep(0.01)
    await queue.close()
    async with asyncio.timeout(PATIENCE_S / 2):
        assert await leasing == []
        for ended in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(ended, Unavailable)
    with pytest.raises(Unavailable):
        await queue.submit(generate("late"))
    with pytest.raises(Unavailable):
        await queue.lease(budget())
    with pytest.raises(Unavailable):
        await anext(queue.events("r"))
    await queue.close()
