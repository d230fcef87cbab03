"""One client's connection while an answer is on its way: is it still there, does it still read?

Shared by whole answers, event streams and sockets. ASGI servers do not tell a handler that its client has left:
somebody has to wait for the disconnect message. One task per connection does that, keeps silence from looking like
a dead link, and notices a reader that takes nothing; none is started per token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Send


class ClientGone(Exception):
    """The client has left, or was cut. There is nobody to answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Outlet:
    """The sending side. Messages go out one at a time; `send` waits while the transport is full (back-pressure)."""

    __slots__ = ("_lock", "_send", "_stuck_since", "last_sent")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()
        self._stuck_since: float | None = None
        self.last_sent = time.monotonic()

    async def send(self, message: Message) -> None:
        async with self._lock:
            self._stuck_since = time.monotonic()
            await self._send(message)
            self.last_sent = time.monotonic()
            self._stuck_since = None

    def cut_at(self, max_stall_s: float) -> float | None:
        """When the message that is stuck now will have been stuck for too long; None if none is stuck."""
        return None if self._stuck_since is None else self._stuck_since + max_stall_s


async def watch_reader(outlet: Outlet, max_stall_s: float) -> None:
    """Raise ClientGone when a message has been stuck for `max_stall_s`."""
    while True:
        cut_at = outlet.cut_at(max_stall_s)
        now = time.monotonic()
        if cut_at is not None and now >= cut_at:
            raise ClientGone("slow reader")
        # A message that gets stuck right after this look is cut on time all the same.
        await asyncio.sleep(max_stall_s if cut_at is None else cut_at - now)


async def disconnected(receive: Receive) -> None:
    """Raise ClientGone when the HTTP client leaves."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("disconnected")


@asynccontextmanager
async def while_present(watch: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run the block while `watch` runs beside it; what `watch` raises interrupts the block and is raised here.

    The interruption is that of asyncio.timeout, rescheduled to now, so cancelling from outside still works.
    """
    loop = asyncio.get_running_loop()
    watcher = loop.create_task(watch)
    is_inside = True
    try:
        async with asyncio.timeout(None) as scope:

            def interrupt(_: asyncio.Task[None]) -> None:
                if is_inside and not watcher.cancelled():
                    scope.reschedule(loop.time())

            watcher.add_done_callback(interrupt)
            try:
                yield
            finally:
                is_inside = False
    except TimeoutError:
        if scope.expired():
            watcher.result()  # raises
        raise
    finally:
        if watcher.done():
            _ = watcher.cancelled() or watcher.exception()  # an exception that nobody looks at is reported as lost
        watcher.cancel()
