"""One call of events() over Redis: a position in a log, fed by news and, where they leave a gap, by the log itself.

Apart from the queue because it is the reader's whole life: read the log once, then take what is heard, in order,
without holes. A slow reader holds what it has not taken yet, joined to one run of tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from wire.errors import BadRequest, Unavailable
from wire.messages import Event, Tokens


class Source(Protocol):
    """What a reader needs of its queue."""

    def check_open(self) -> None: ...
    def attach(self, follower: Follower) -> None: ...
    def detach(self, follower: Follower) -> None: ...
    async def follow(self, request_id: str, start: int) -> tuple[list[int], Event | None]: ...


class Follower:
    """What has been heard of one request and not been taken."""

    def __init__(self, request_id: str, start: int, *, must_look: bool = True) -> None:
        self.request_id = request_id
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.must_look = must_look  # at the log: nothing was read yet, or news may be missing
        self._next = start  # index after the last token that is held or was taken
        self._tokens: list[int] = []
        self._terminal: Event | None = None

    def hear(self, first_index: int, tokens: list[int], terminal: Event | None) -> None:
        """Take in news; what is known already is dropped, a gap sends the reader to the log."""
        if first_index > self._next:
            self.look_again()
            return
        fresh = tokens[self._next - first_index :]
        self._tokens += fresh
        self._next += len(fresh)
        if terminal is not None:
            self._terminal = terminal
        self._wake()

    def look_again(self) -> None:
        self.must_look = True
        self._wake()

    def take(self) -> Event | None:
        """The next event, if there is one."""
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return Tokens(self.request_id, self._next - len(tokens), tokens)
        return None if self.must_look else self._terminal

    @property
    def next_index(self) -> int:
        return self._next

    def sleep(self) -> asyncio.Future[None]:
        """Something to wait for until there is news."""
        if self.woken.done():
            self.woken = asyncio.get_running_loop().create_future()
        return self.woken

    def _wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class Reader:
    """A plain object and not an async generator: a reader that is dropped half way leaves nothing to finalize."""

    def __init__(self, source: Source, request_id: str, start: int, follower: Follower | None = None) -> None:
        """`follower`: attached, and has heard of the request from the beginning."""
        self._source = source
        self._request_id = request_id
        self._start = start
        self._follower = follower
        self._has_looked = follower is not None  # the request is known to exist: the reader waits for Redis
        self._has_ended = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    def __del__(self) -> None:
        if self._follower is not None:
            self._source.detach(self._follower)

    async def __anext__(self) -> Event:
        if self._has_ended:
            raise StopAsyncIteration
        if self._start < 0:
            raise BadRequest(f"start is {self._start}; the first token has index 0", param="start")
        if self._follower is None:
            self._follower = Follower(self._request_id, self._start)
            self._source.attach(self._follower)
        event = await self._next_event(self._follower)
        if not isinstance(event, Tokens):
            self._has_ended = True
            self._source.detach(self._follower)
        return event

    async def _next_event(self, follower: Follower) -> Event:
        while True:
            if follower.must_look:
                await self._look(follower)
            event = follower.take()
            if event is not None:
                return event
            self._source.check_open()
            if not follower.must_look:
                await follower.sleep()

    async def _look(self, follower: Follower) -> None:
        """Read the log; while Redis is away, wait until it can be read."""
        self._source.check_open()
        follower.must_look = False  # now: news that overtake the answer and find a gap must have it looked at again
        try:
            start = follower.next_index
            tokens, terminal = await self._source.follow(self._request_id, start)
        except Unavailable:
            follower.must_look = True
            self._source.check_open()
            if not self._has_looked:
                raise
            await asyncio.sleep(0.1)
            return
        self._has_looked = True
        follower.hear(start, tokens, terminal)
