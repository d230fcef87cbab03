"""The queue's contract: tenants share by weight, and what kills workers takes nobody along."""

from __future__ import annotations

import pytest

from tests.contracts.conftest import OpenRig
from tests.contracts.queues import QueueOptions, budget, completion, finished, generate, lease_one, tokens
from wire.errors import QueueFull, RequestTooLarge
from wire.messages import Failed
from wire.queue import Lease, Queue


async def order(queue: Queue) -> list[str]:
    """Who is handed out, one by one."""
    ids: list[str] = []
    while leases := await queue.lease(budget(max_requests=1)):
        ids += [lease.request.request_id for lease in leases]
    return ids


async def test_a_tenant_that_asks_for_much_does_not_keep_the_others_waiting(queue: Queue) -> None:
    for i in range(6):
        await queue.submit(generate(f"a{i}", tenant="a"))
    for i in range(2):
        await queue.submit(generate(f"b{i}", tenant="b"))
    assert await order(queue) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


async def test_shares_are_of_tokens_and_not_of_requests(queue: Queue) -> None:
    for i in range(3):
        await queue.submit(generate(f"a{i}", tenant="a", prompt_tokens=10, max_tokens=390))
    for i in range(6):
        await queue.submit(generate(f"b{i}", tenant="b", prompt_tokens=10, max_tokens=90))
    assert await order(queue) == ["a0", "b0", "b1", "b2", "b3", "a1", "b4", "b5", "a2"]


async def test_weights_divide_the_cost(queue: Queue) -> None:
    for i in range(3):
        await queue.submit(generate(f"a{i}", tenant="a", prompt_tokens=10, max_tokens=90))
    for i in range(6):
        await queue.submit(generate(f"b{i}", tenant="b", prompt_tokens=10, max_tokens=90, weight=2))
    assert await order(queue) == ["a0", "b0", "b1", "a1", "b2", "b3", "a2", "b4", "b5"]


async def test_who_comes_late_begins_now_and_not_in_the_past(queue: Queue) -> None:
    for i in range(10):
        await queue.submit(generate(f"a{i}", tenant="a"))
    assert len(await queue.lease(budget(max_requests=5))) == 5
    for i in range(3):
        await queue.submit(generate(f"b{i}", tenant="b"))
    assert await order(queue) == ["b0", "a5", "b1", "a6", "b2", "a7", "a8", "a9"]


async def test_priority_comes_before_shares(queue: Queue) -> None:
    for i in range(2):
        await queue.submit(generate(f"a{i}", tenant="a"))
    await queue.submit(generate("b-low", tenant="b", priority=-1))
    await queue.submit(generate("a-high", tenant="a", priority=1))
    assert await order(queue) == ["a-high", "a0", "a1", "b-low"]


async def test_what_comes_back_has_its_old_place_even_if_the_line_was_empty(queue: Queue) -> None:
    await queue.submit(generate("old"))
    old = await lease_one(queue, "old")
    await queue.submit(generate("new"))
    await queue.release([("old", old.epoch)])
    assert await order(queue) == ["old", "new"]


async def test_one_tenant_has_at_most_its_part_of_the_queue(open_rig: OpenRig) -> None:
    queue = (await open_rig(QueueOptions(max_queued_tokens=1_000, max_tenant_tokens=300))).queue
    for i in range(3):
        await queue.submit(generate(f"a{i}", tenant="a", prompt_tokens=10, max_tokens=90))
    with pytest.raises(QueueFull, match=r"this tenant's part .* 300 of 300 tokens"):
        await queue.submit(generate("a3", tenant="a", prompt_tokens=10, max_tokens=90))
    with pytest.raises(RequestTooLarge, match="a tenant may have 300"):
        await queue.submit(generate("a4", tenant="a", prompt_tokens=10, max_tokens=291))
    await queue.submit(generate("b0", tenant="b", prompt_tokens=10, max_tokens=90))
    await queue.submit(generate("nobody's", prompt_tokens=10, max_tokens=590))
    lease = await lease_one(queue, "a0")
    assert await queue.publish([finished(lease, 0)]) == []
    with pytest.raises(QueueFull, match="the queue is full: 900"):
        await queue.submit(generate("c", prompt_tokens=10, max_tokens=91))
    await queue.submit(generate("a3", tenant="a", prompt_tokens=10, max_tokens=90))


async def test_a_worker_holds_one_suspect_at_a_time(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(max_deliveries=3, lease_ms=1_000))
    queue = rig.queue
    for request_id in ("a", "b", "c"):
        await queue.submit(generate(request_id))
    for _ in range(2):
        assert not any(lease.is_suspect for lease in await queue.lease(budget()))
        await rig.advance(1_000)
    await queue.submit(generate("fresh"))
    first = await queue.lease(budget())
    assert [(lease.request.request_id, lease.is_suspect) for lease in first] == [("a", True), ("fresh", False)]
    assert await queue.lease(budget(takes_suspect=False)) == []
    second = await queue.lease(budget(worker_id="w2"))
    assert [lease.request.request_id for lease in second] == ["b"]


async def test_a_request_that_kills_its_workers_takes_no_innocent_along(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(max_deliveries=3, lease_ms=1_000))
    queue = rig.queue
    requests = [f"r{i}" for i in range(7)] + ["poison"]
    for request_id in requests:
        await queue.submit(generate(request_id))
    held: dict[str, Lease] = {}
    for _ in range(20):  # one worker: it takes what it gets, dies of the poison, else answers and goes on
        for lease in await queue.lease(budget(takes_suspect=not any(each.is_suspect for each in held.values()))):
            held[lease.request.request_id] = lease
        if "poison" in held:
            held.clear()
            await rig.advance(1_000)
            continue
        for lease in held.values():
            assert await queue.publish([tokens(lease, 0, 5), finished(lease, 1)]) == []
        held.clear()
    for request_id in requests:
        terminal = (await completion(queue, request_id)).terminal
        if request_id == "poison":
            assert isinstance(terminal, Failed)
            assert terminal.code == "worker_lost"
        else:
            assert not isinstance(terminal, Failed)


async def test_what_makes_progress_is_never_given_up_however_many_workers_die(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(max_deliveries=3, lease_ms=1_000))
    queue = rig.queue
    await queue.submit(generate())
    for index in range(6):
        lease = await lease_one(queue)
        assert (lease.delivery, lease.is_suspect) == (1 if not index else 2, index >= 2)
        assert await queue.publish([tokens(lease, index, 5)]) == []
        await rig.advance(1_000)
    assert [(await lease_one(queue)).delivery for _ in range(1)] == [2]
    await rig.advance(1_000)
    last = await lease_one(queue)
    assert (last.delivery, last.is_suspect) == (3, True)
    await rig.advance(1_000)
    answer = await completion(queue)
    assert isinstance(answer.terminal, Failed)
    assert answer.token_ids == [5] * 6
