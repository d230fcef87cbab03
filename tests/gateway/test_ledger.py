"""Nothing runs for nobody, and nothing is remembered for ever."""

from __future__ import annotations

import asyncio

import pytest

from gateway.admission import Admitted
from gateway.caller import NOBODY, Caller
from gateway.completion import fold, follow
from gateway.ledger import Ledger
from gateway.models import Models
from services.queues.memory import MemoryQueue
from tests.gateway.support import Recorder, rig, served_model, stream, until
from wire.errors import BadRequest, Conflict, QueueFull, UnknownRequest
from wire.messages import Finished, Generate, Tokens, Usage
from wire.queue import Append, LeaseBudget, Status

MODEL = served_model()
BUDGET = LeaseBudget("w", (MODEL.model_id,), max_requests=9, max_tokens=10**6, capacity_tokens=10**6)


def admitted(request_id: str, max_tokens: int = 5) -> Admitted:
    return Admitted(Generate(request_id, MODEL.model_id, [70], max_tokens), MODEL, arrived_at=0.0)


def ledger(queue: MemoryQueue) -> tuple[Ledger, Recorder]:
    telemetry = Recorder()
    return Ledger(queue, Models([MODEL]), telemetry), telemetry


async def is_idle(queue: MemoryQueue) -> bool:
    depth = await queue.depth()
    return depth.queued_requests == depth.running_requests == 0


async def answer(queue: MemoryQueue) -> None:
    for lease in await queue.lease(BUDGET):
        request_id = lease.request.request_id
        await queue.publish([
            Append(lease.epoch, Tokens(request_id, 0, [71])),
            Append(lease.epoch, Finished(request_id, "stop", Usage(1, 1))),
        ])  # fmt: skip


async def test_a_request_that_nobody_comes_to_read_is_cancelled() -> None:
    queue = MemoryQueue()
    tickets, telemetry = ledger(queue)
    ticket = await tickets.submit(admitted("a"))
    assert (await tickets.standing("a", NOBODY)).status is Status.WAITING

    async def is_over() -> bool:
        return await is_idle(queue)

    await until(is_over)
    assert ticket.finish_reason == "cancelled"
    assert [done.finish_reason for done in telemetry.ended] == ["cancelled"]


async def test_the_grace_begins_when_the_last_reader_leaves() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue)
    ticket = await tickets.submit(admitted("a"))
    with tickets.reading(ticket, grace_s=0.0):
        with tickets.reading(ticket, grace_s=0.0):
            pass
        await asyncio.sleep(0)
        assert not await is_idle(queue)
    await asyncio.sleep(0)
    assert await is_idle(queue)


async def test_a_request_that_has_ended_is_not_cancelled_afterwards() -> None:
    queue = MemoryQueue()
    tickets, telemetry = ledger(queue)
    ticket = await tickets.submit(admitted("a"))
    await answer(queue)
    with tickets.reading(ticket, grace_s=0.0):
        whole = await fold(ticket, follow(tickets, ticket))
    await tickets.cancel(ticket)
    await tickets.close()
    assert whole.finish_reason == "stop"
    assert [done.finish_reason for done in telemetry.ended] == ["stop"]


class LostReply(MemoryQueue):
    """A queue that takes the request in and then loses the connection."""

    async def submit(self, request: Generate) -> bool:
        await super().submit(request)
        raise ConnectionError


async def test_a_submit_with_an_unknown_end_is_cancelled_in_the_queue() -> None:
    queue = LostReply()
    tickets, telemetry = ledger(queue)
    with pytest.raises(ConnectionError):
        await tickets.submit(admitted("a"))
    await tickets.close()
    assert await is_idle(queue)
    assert telemetry.admissions == 0
    with pytest.raises(UnknownRequest):
        await tickets.find("b", NOBODY)


@pytest.mark.parametrize(("max_tokens", "error"), [(50, QueueFull), (500, BadRequest)])
async def test_a_refused_submit_leaves_no_ticket(max_tokens: int, error: type[Exception]) -> None:
    queue = MemoryQueue(max_queued_tokens=60)
    tickets, _ = ledger(queue)
    await tickets.submit(admitted("a", 40))
    with pytest.raises(error):
        await tickets.submit(admitted("b", max_tokens))
    with pytest.raises(UnknownRequest):
        await tickets.find("b", NOBODY)
    await tickets.close()


async def test_what_was_abandoned_or_has_ended_leaves_no_ticket() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue)
    read, left = await tickets.submit(admitted("read")), await tickets.submit(admitted("left"))
    await answer(queue)
    for ticket in (read, left):
        with tickets.reading(ticket, grace_s=0.0):
            if ticket is read:
                await fold(ticket, follow(tickets, ticket))
    await tickets.close()
    assert tickets.num_live == 0


async def test_another_gateway_makes_itself_a_ticket_and_counts_nothing() -> None:
    queue = MemoryQueue()
    first, _ = ledger(queue)
    second, telemetry = ledger(queue)
    await first.submit(admitted("a"))
    await answer(queue)
    ticket = await second.find("a", NOBODY)
    with second.reading(ticket, grace_s=0.0):
        whole = await fold(ticket, follow(second, ticket))
    assert (whole.token_ids, whole.finish_reason) == ([71], "stop")
    assert telemetry.admissions == len(telemetry.ended) == 0


async def test_another_tenants_request_is_not_to_be_told_from_none() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue)
    request = Generate("a", MODEL.model_id, [70], 5, tenant="one")
    await tickets.submit(Admitted(request, MODEL, arrived_at=0.0))
    assert (await tickets.find("a", Caller("one"))).id == "a"
    words = []
    for gateway in (tickets, ledger(queue)[0]):
        for request_id in ("a", "never"):
            with pytest.raises(UnknownRequest) as refused:
                await gateway.find(request_id, Caller("two"))
            words.append(refused.value.message.replace("never", "a"))
    assert len(set(words)) == 1
    await tickets.close()


async def test_a_background_request_runs_on_when_nobody_reads_it() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue)
    request = Generate("a", MODEL.model_id, [70], 5, background=True)
    ticket = await tickets.submit(Admitted(request, MODEL, arrived_at=0.0))
    with tickets.reading(ticket, grace_s=0.0):
        pass
    await tickets.close()
    assert (await queue.depth()).queued_requests == 1
    assert tickets.num_live == 0
    await answer(queue)
    assert (await tickets.standing("a", NOBODY)).status is Status.ENDED


async def test_of_many_submits_with_one_id_there_is_one_ticket_and_one_count() -> None:
    queue = MemoryQueue()
    tickets, telemetry = ledger(queue)
    found = await asyncio.gather(*(tickets.submit(admitted("a")) for _ in range(20)))
    assert len({id(ticket) for ticket in found}) == 1
    assert telemetry.admissions == 1
    assert (await queue.depth()).queued_requests == 1
    with pytest.raises(Conflict):
        await tickets.submit(admitted("a", max_tokens=6))
    assert (await tickets.find("a", NOBODY)) is found[0]


async def test_a_stream_whose_log_the_queue_has_forgotten_is_a_404() -> None:
    async with rig(log_ttl_ms=10) as gateway:
        generation_id, _ = await stream(gateway)
        await asyncio.sleep(0.05)
        again = await gateway.client.get(f"/streams/{generation_id}")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_request")


async def test_a_queue_that_closes_ends_streams_with_an_error_that_can_be_retried() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue)
    ticket = await tickets.submit(admitted("a"))
    reading = asyncio.create_task(fold(ticket, follow(tickets, ticket)))
    await asyncio.sleep(0)
    await queue.close()
    with pytest.raises(Exception, match="closed") as caught:
        await reading
    assert getattr(caught.value, "retryable", False)
    await tickets.close()


async def test_the_door_hears_what_the_queue_said() -> None:
    tickets, _ = ledger(MemoryQueue(max_queued_tokens=60))
    await tickets.submit(admitted("a", 40))
    tickets.door.enter("", 1_000)
    with pytest.raises(QueueFull):
        await tickets.submit(admitted("b", 30))
    with pytest.raises(QueueFull):
        tickets.door.enter("", 20)
    await tickets.submit(admitted("c", 5))
    tickets.door.enter("", 60)  # it fitted: the door is open
    await tickets.close()
