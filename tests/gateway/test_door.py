"""Under overload those who cannot fit are refused without asking the queue, and nobody else is."""

from __future__ import annotations

import asyncio

import pytest

from gateway.door import FULL_S, Door
from tests.gateway.support import Script, rig
from wire.errors import QueueFull
from wire.messages import Generate

A, B = "a tenant", "another"


def full(room_tokens: int = 19, cap_tokens: int = 60) -> QueueFull:
    return QueueFull.of(30, cap_tokens - room_tokens, cap_tokens, 2.5, is_tenant=False)


def test_nobody_is_refused_before_the_queue_has_refused_one() -> None:
    door = Door()
    door.check(A, 1_000)
    door.enter(A, 1_000)


def test_a_refusal_stands_for_those_who_do_not_fit_either() -> None:
    door = Door()
    door.refused(A, full())
    for way in (door.check, door.enter):
        with pytest.raises(QueueFull) as refusal:
            way(A, 20)
        assert refusal.value.retry_after_s == 2.5
        assert refusal.value.message == "the queue is full: 41 of 60 tokens are taken, the request needs 20"
        way(A, 19)
        way(A, 61)  # it will never fit, which the queue says in other words
        way(B, 1_000)


def test_a_tenant_is_told_again_that_its_part_is_full() -> None:
    door = Door()
    door.refused(A, QueueFull.of(30, 50, 60, None, is_tenant=True))
    with pytest.raises(QueueFull, match="this tenant's part of the queue is full"):
        door.enter(A, 11)


async def test_after_a_moment_one_may_try_and_the_others_wait_for_what_it_finds() -> None:
    door = Door()
    door.refused(A, full())
    await asyncio.sleep(FULL_S)
    door.check(A, 60)
    door.check(A, 60)  # looking is not trying
    door.enter(A, 60)
    with pytest.raises(QueueFull):
        door.check(A, 60)
    with pytest.raises(QueueFull):
        door.enter(A, 60)
    door.took(A)
    door.enter(A, 60)
    door.enter(A, 60)


@pytest.mark.parametrize("room", [0, 4, 9])
async def test_a_gateway_asks_the_queue_once_for_all_who_do_not_fit(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is missing: a prompt counts, with what may be added to it."""
    monkeypatch.setattr("gateway.door.FULL_S", 60.0)
    asked: list[int] = []
    gate = asyncio.Event()
    async with rig(Script(first_step=gate), max_queued_tokens=20 + room) as gateway:
        submit = gateway.queue.submit

        async def counted(request: Generate) -> bool:
            asked.append(request.max_total_tokens)
            return await submit(request)

        monkeypatch.setattr(gateway.queue, "submit", counted)
        inside = asyncio.create_task(gateway.client.post("/generate", json={"input_ids": [70] * 5, "max_tokens": 15}))
        await gateway.until_leased(1)
        assert asked == [20]
        ids: dict[str, object] = {"input_ids": [70] * 5, "max_tokens": 5}
        text: dict[str, object] = {"prompt": "Hello", "max_tokens": 9}
        for body in (ids, text, ids, text):
            assert (await gateway.client.post("/generate", json=body)).status_code == 429
        assert asked == [20, 10]
        gate.set()
        await inside
