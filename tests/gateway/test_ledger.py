"""Nothing runs for nobody, and nothing is remembered for ever."""

from __future__ import annotations

import asyncio

import pytest

from gateway.admission import Admitted
from gateway.completion import fold, follow
from gateway.ledger import Ledger
from gateway.limits import GatewayLimits
from services.queues.memory import MemoryQueue
from tests.gateway.support import Recorder, rig, served_model, stream, until
from wire.errors import BadRequest, QueueFull, UnknownRequest
from wire.messages import Finished, Generate, Tokens, Usage
from wire.queue import Append, LeaseBudget

MODEL = served_model()
BUDGET = LeaseBudget("w", (MODEL.model_id,), max_requests=9, max_tokens=10**6, capacity_tokens=10**6)


def admitted(request_id: str, max_tokens: int = 5) -> Admitted:
    return Admitted(Generate(request_id, MODEL.model_id, [70], max_tokens), MODEL, (), arrived_at=0.0)


def ledger(queue: MemoryQueue, **limits: float) -> tuple[Ledger, Recorder]:
    telemetry = Recorder()
    return Ledger(queue, GatewayLimits(**limits), telemetry), telemetry  # type: ignore[arg-type]


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
    assert tickets.state(ticket).status == "queued"

    async def is_over() -> bool:
        return await is_idle(queue)

    await until(is_over)
    assert tickets.state(ticket).finish_reason == "cancelled"
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

    async def submit(self, request: Generate) -> None:
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
        tickets.find("a")


@pytest.mark.parametrize(("max_tokens", "error"), [(50, QueueFull), (500, BadRequest)])
async def test_a_refused_submit_leaves_no_ticket(max_tokens: int, error: type[Exception]) -> None:
    queue = MemoryQueue(max_queued_tokens=60)
    tickets, _ = ledger(queue)
    await tickets.submit(admitted("a", 40))
    with pytest.raises(error):
        await tickets.submit(admitted("b", max_tokens))
    with pytest.raises(UnknownRequest):
        tickets.find("b")
    await tickets.close()


async def test_only_so_many_ended_requests_are_remembered() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue, remembered_requests=2)
    for request_id in "abc":
        ticket = await tickets.submit(admitted(request_id))
        await answer(queue)
        with tickets.reading(ticket, grace_s=0.0):
            await fold(ticket, follow(tickets, ticket))
    with pytest.raises(UnknownRequest):
        tickets.find("a")
    assert tickets.find("c").finish_reason == "stop"


async def test_ended_requests_are_remembered_only_so_long() -> None:
    queue = MemoryQueue()
    tickets, _ = ledger(queue, remember_s=0.01)
    ticket = await tickets.submit(admitted("a"))
    await answer(queue)
    with tickets.reading(ticket, grace_s=0.0):
        await fold(ticket, follow(tickets, ticket))
    await asyncio.sleep(0.02)
    with pytest.raises(UnknownRequest):
        tickets.find("a")


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
