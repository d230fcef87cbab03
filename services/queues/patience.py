"""Waiting for the first of a few things."""

from __future__ import annotations

import asyncio


async def first_of(woken: asyncio.Future[None], until: asyncio.Event | None, give_up_s: float) -> None:
    """Return when `woken` has a result, `until` is set, or the loop's time is `give_up_s`; nothing is left waiting."""
    loop = asyncio.get_running_loop()
    timeout_s = max(0.0, give_up_s - loop.time())
    if until is None:
        await asyncio.wait([woken], timeout=timeout_s)
        return
    changed = loop.create_task(_changed(until))
    try:
        await asyncio.wait([woken, changed], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        changed.cancel()


async def _changed(until: asyncio.Event) -> None:
    await until.wait()
