"""The queue's contract: how a request ends when it does not simply finish.

Cancelled, out of time, its worker lost once, or once too often; always with exactly one terminal event.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.contracts.conftest import OpenRig
from tests.contracts.queues import (
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
from wire.errors import DeadlineExceeded, UnknownRequest, WorkerLost, error_from_code
from wire.messages import Failed, Finished, Timings, Usage
from wire.queue import Append, Depth, Queue, RefusalReason

# --- cancel -----------------------------------------------------------------------------------------------------------


async def test_a_waiting_request_ends_at_once_when_it_is_cancelled(queue: Queue) -> None:
    await queue.submit(generate())
    reading = asyncio.create_task(read(queue))
    await asyncio.sleep(0)
    await queue.cancel("r")
    assert await reading == [Finished("r", "cancelled", Usage(3, 0))]
    assert await queue.lease(budget()) == []


async def test_the_worker_of_a_cancelled_request_learns_at_its_next_append(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 1)])
    await queue.cancel("r")
    assert await queue.publish([tokens(lease, 1, 2)]) == [refusal(lease, RefusalReason.CANCELLED)]
    assert await queue.publish([finished(lease, 1, "cancelled")]) == []
    assert fold(await read(queue)) == await completion(queue)
    answer = await completion(queue)
    assert (answer.token_ids, answer.terminal) == ([1], Finished("r", "cancelled", Usage(3, 1)))


async def test_the_worker_of_a_cancelled_request_learns_at_its_next_renewal(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.cancel("r")
    assert await queue.renew([held(lease)]) == [refusal(lease, RefusalReason.CANCELLED)]


async def test_tokens_refused_after_a_cancel_are_not_billed_even_if_their_worker_had_finished(queue: Queue) -> None:
    """The cancel lands between two publishes; the second carries the last token and Finished("length")."""
    lease = await submit_and_lease(queue)
    await queue.publish([tokens(lease, 0, 1)])
    await queue.cancel("r")
    end = Finished("r", "length", Usage(3, 2, 2), Timings(1.0, 2.0, 3.0, 0))
    refusals = await queue.publish([tokens(lease, 1, 2), Append(lease.epoch, end)])
    assert refusals == [refusal(lease, RefusalReason.CANCELLED)]
    answer = await completion(queue)
    assert answer.token_ids == [1]
    assert answer.terminal == Finished("r", "cancelled", Usage(3, 1, 2), Timings(1.0, 2.0, 3.0, 0))


async def test_a_cancelled_request_may_still_fail(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.cancel("r")
    assert await queue.publish([failed(lease)]) == []
    assert isinstance((await completion(queue)).terminal, Failed)


async def test_a_cancelled_request_whose_worker_is_lost_is_not_handed_out_again(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue)
    await rig.queue.publish([tokens(lease, 0, 1)])
    await rig.queue.cancel("r")
    await rig.advance(6_000)
    assert (await completion(rig.queue)).terminal == Finished("r", "cancelled", Usage(3, 1))
    assert await rig.queue.depth() == Depth(0, 0, 0, 0)


async def test_a_cancelled_request_that_is_released_ends(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.cancel("r")
    await queue.release([held(lease)])
    assert (await completion(queue)).terminal == Finished("r", "cancelled", Usage(3, 0))


async def test_cancelling_what_has_ended_changes_nothing_and_what_is_unknown_is_an_error(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.publish([finished(lease, 0)])
    await queue.cancel("r")
    assert (await completion(queue)).terminal == Finished("r", "stop", Usage(3, 0))
    with pytest.raises(UnknownRequest):
        await queue.cancel("nobody")


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_request_that_waits_past_its_deadline_fails_and_is_never_handed_out(rig: QueueRig) -> None:
    await rig.queue.submit(generate(deadline_ms=1_000))
    reading = asyncio.create_task(read(rig.queue))
    await rig.advance(999)
    assert not reading.done()
    await rig.advance(1)
    async with asyncio.timeout(PATIENCE_S):
        (terminal,) = await reading
    assert isinstance(terminal, Failed)
    assert (error_from_code(terminal.code), terminal.retryable) == (DeadlineExceeded, False)
    assert await rig.queue.lease(budget()) == []


async def test_a_request_that_runs_past_its_deadline_fails_once_and_its_worker_is_told(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue, generate(deadline_ms=1_000))
    await rig.queue.publish([tokens(lease, 0, 1)])
    await rig.advance(1_000)
    late = [tokens(lease, 1, 2), finished(lease, 2), tokens(lease, 0, 1)]
    assert await rig.queue.publish(late) == [refusal(lease, RefusalReason.EXPIRED)] * 3
    assert await rig.queue.renew([held(lease)]) == [refusal(lease, RefusalReason.EXPIRED)]
    answer = await completion(rig.queue)
    assert answer.token_ids == [1]
    assert isinstance(answer.terminal, Failed)
    assert answer.terminal.code == DeadlineExceeded.code


async def test_renewing_keeps_a_lease_but_not_a_deadline(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue, generate(deadline_ms=10_000))
    for _ in range(4):
        await rig.advance(2_499)
        assert await rig.queue.renew([held(lease)]) == []
    await rig.advance(4)
    assert await rig.queue.renew([held(lease)]) == [refusal(lease, RefusalReason.EXPIRED)]


async def test_a_deadline_counts_from_the_first_acceptance(rig: QueueRig) -> None:
    await rig.queue.submit(generate(deadline_ms=1_000))
    await rig.advance(600)
    await rig.queue.submit(generate(deadline_ms=1_000))
    await rig.advance(400)
    assert isinstance((await completion(rig.queue)).terminal, Failed)


async def test_an_answer_before_the_deadline_is_not_touched_by_it(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue, generate(deadline_ms=1_000))
    await rig.queue.publish([finished(lease, 0)])
    await rig.advance(2_000)
    assert (await completion(rig.queue)).terminal == Finished("r", "stop", Usage(3, 0))


# --- leases that lapse ------------------------------------------------------------------------------------------------


async def test_a_request_whose_worker_is_lost_goes_on_at_the_next_index(rig: QueueRig) -> None:
    reading = None
    dead = await submit_and_lease(rig.queue)
    reading = asyncio.create_task(read(rig.queue))
    await rig.queue.publish([tokens(dead, 0, 10, 11)])
    await rig.advance(5_999)
    assert await rig.queue.lease(budget()) == []
    await rig.advance(1)
    assert await rig.queue.depth() == Depth(1, 103, 0, 0)
    heir = await lease_one(rig.queue)
    assert (heir.token_ids, heir.delivery, heir.request) == ((10, 11), 2, dead.request)
    assert heir.epoch > dead.epoch
    await rig.queue.publish([tokens(heir, 2, 12), finished(heir, 3)])
    assert fold(await reading).token_ids == [10, 11, 12]


async def test_publishing_and_renewing_keep_a_lease(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue)
    for index in range(5):
        await rig.advance(5_999)
        assert await rig.queue.publish([tokens(lease, index, index)]) == []
        await rig.advance(5_999)
        assert await rig.queue.renew([held(lease)]) == []
        assert await rig.queue.lease(budget()) == []
    await rig.advance(6_000)
    assert (await lease_one(rig.queue)).token_ids == (0, 1, 2, 3, 4)


async def test_an_owner_that_was_merely_late_has_its_lease_back(rig: QueueRig) -> None:
    lease = await submit_and_lease(rig.queue)
    await rig.advance(60_000)
    assert await rig.queue.publish([tokens(lease, 0, 1)]) == []
    assert await rig.queue.lease(budget()) == []
    await rig.advance(60_000)
    assert await rig.queue.renew([held(lease)]) == []
    assert await rig.queue.depth() == Depth(0, 0, 1, 103)
    await rig.advance(60_000)
    assert await rig.queue.publish([finished(lease, 1)]) == []
    assert (await completion(rig.queue)).token_ids == [1]


async def test_a_request_that_comes_back_takes_its_old_place(rig: QueueRig) -> None:
    for request_id in "abc":
        await rig.queue.submit(generate(request_id))
    (a,) = await rig.queue.lease(budget(max_requests=1))
    (b,) = await rig.queue.lease(budget(max_requests=1))
    await rig.queue.submit(generate("d"))
    await rig.queue.release([held(b)])
    await rig.queue.release([held(a)])
    assert [lease.request.request_id for lease in await rig.queue.lease(budget())] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("max_deliveries", [1, 3])
async def test_a_request_that_loses_every_worker_fails_when_the_last_lease_lapses(
    open_rig: OpenRig, max_deliveries: int
) -> None:
    rig = await open_rig(QueueOptions(max_deliveries=max_deliveries))
    await rig.queue.submit(generate())
    for delivery in range(1, max_deliveries + 1):
        lease = await lease_one(rig.queue)
        assert lease.delivery == delivery
        await rig.advance(6_000)
    answer = await completion(rig.queue)
    assert isinstance(answer.terminal, Failed)
    assert (error_from_code(answer.terminal.code), answer.terminal.retryable) == (WorkerLost, True)
    assert await rig.queue.lease(budget()) == []
    assert await rig.queue.publish([tokens(lease, 0, 1)]) == [refusal(lease, RefusalReason.FENCED)]


# --- release ----------------------------------------------------------------------------------------------------------


async def test_releasing_hands_a_request_back_without_counting_the_delivery(queue: Queue) -> None:
    await queue.submit(generate())
    for index in range(10):  # far more often than max_deliveries
        lease = await lease_one(queue)
        assert (lease.delivery, len(lease.token_ids)) == (1, index)
        await queue.publish([tokens(lease, index, index)])
        await queue.release([held(lease)])
    assert (await lease_one(queue)).token_ids == tuple(range(10))


async def test_after_a_release_the_old_lease_is_worth_nothing(queue: Queue) -> None:
    lease = await submit_and_lease(queue)
    await queue.release([held(lease)])
    fenced = refusal(lease, RefusalReason.FENCED)
    assert await queue.publish([tokens(lease, 0, 1), finished(lease, 0)]) == [fenced, fenced]
    assert await queue.renew([held(lease)]) == [fenced]
    assert (await lease_one(queue)).token_ids == ()


async def test_releasing_what_is_not_ours_changes_nothing(rig: QueueRig) -> None:
    dead = await submit_and_lease(rig.queue)
    await rig.advance(6_000)
    heir = await lease_one(rig.queue)
    ended = await submit_and_lease(rig.queue, generate("ended"))
    await rig.queue.publish([finished(ended, 0)])
    await rig.queue.release([held(dead), held(ended), ("never seen", 1)])
    assert await rig.queue.lease(budget()) == []
    assert await rig.queue.renew([held(heir)]) == []
