"""A client that costs little beside what it measures: one protocol object a connection, httptools, msgspec.

It shares the machine with the server, so every microsecond here is one that the server lacks. An Answer is written
whatever happens: refused, cut off, not ended in time.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar, cast

import httptools
import msgspec
import uvloop

HOST = "127.0.0.1"
PATIENCE_S = 120.0
MOST_BYTES = 1 << 20  # of one event or one whole answer

Fields = Mapping[str, object]
Result = TypeVar("Result")


class _Error(msgspec.Struct):
    code: str


class _Part(msgspec.Struct):
    """What is read of a chunk, an end, a whole answer and an error alike."""

    index: int = 0
    token_ids: list[int] = []
    finish_reason: str | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Part).decode


class Answer:
    """One request's answer as it comes in. Times are those of time.perf_counter()."""

    __slots__ = (
        "_is_stream",
        "_rest",
        "comments",
        "ended_at",
        "error",
        "finish_reason",
        "sent_at",
        "status",
        "times",
        "token_ids",
    )

    def __init__(self) -> None:
        self.status = 0
        self.sent_at = 0.0
        self.ended_at = 0.0
        self.times: list[float] = []  # of each event with tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None  # a code of ours, or what became of the connection
        self.comments = 0  # keep-alives
        self._is_stream = False
        self._rest = b""

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.finish_reason in ("stop", "length")

    @property
    def is_refused(self) -> bool:
        return self.status in (429, 503)

    @property
    def ttft_s(self) -> float | None:
        return self.times[0] - self.sent_at if self.times else None

    def begin(self, status: int, *, is_stream: bool) -> None:
        self.status, self._is_stream = status, is_stream

    def take(self, body: bytes, now: float) -> None:
        """More of the body. Raises ValueError if it is not ours."""
        rest = self._rest + body if self._rest else body
        if self._is_stream:
            *events, rest = rest.split(b"\n\n")
            for event in events:
                if event.startswith(b":"):
                    self.comments += 1
                else:
                    self._note(_decode(event[event.index(b"data: ") + 6 :]), now)
        if len(rest) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes without an end")
        self._rest = rest

    def end(self, now: float) -> None:
        """The body was whole. Raises ValueError if it is not ours."""
        if not self._is_stream and self._rest:
            self._note(_decode(self._rest), now)
        self.ended_at = now

    def fail(self, reason: str, now: float) -> None:
        self.error = self.error or reason
        self.ended_at = now

    def _note(self, part: _Part, now: float) -> None:
        if part.error is not None:
            self.error = part.error.code
            return
        if part.token_ids:
            if part.index != len(self.token_ids):
                self.error = f"token {part.index} came after {len(self.token_ids)} tokens"
            self.token_ids += part.token_ids
            self.times.append(now)
        self.finish_reason = part.finish_reason


class Connection(asyncio.Protocol):
    """One connection; one request at a time on it."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._ended: asyncio.Future[None] | None = None
        self._is_stream = False
        self.is_open = False

    async def ask(self, request: bytes, answer: Answer) -> None:
        """Send, and wait until the answer has ended, one way or another."""
        assert self._transport is not None, "not connected; this is a bug"
        self._answer, self._is_stream = answer, False
        self._ended = asyncio.get_running_loop().create_future()
        answer.sent_at = time.perf_counter()
        self._transport.write(request)
        try:
            await self._ended
        finally:
            if not self._ended.done() or self._ended.cancelled():
                self.close()  # what would still come is not the next request's

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, ValueError, msgspec.MsgspecError) as error:
            self._finish(f"unreadable: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._finish("connection closed")

    # httptools' calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self._answer.begin(self._parser.get_status_code(), is_stream=self._is_stream)

    def on_body(self, body: bytes) -> None:
        self._answer.take(body, time.perf_counter())

    def on_message_complete(self) -> None:
        self._answer.end(time.perf_counter())
        if not self._parser.should_keep_alive():
            self.close()
        self._finish(None)

    def _finish(self, reason: str | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if reason is not None:
            self._answer.fail(reason, time.perf_counter())
        self._ended.set_result(None)


class Client:
    """Keep-alive connections to one port. A request takes one that is idle, or a new one."""

    def __init__(self, port: int, patience_s: float = PATIENCE_S) -> None:
        self._port = port
        self._patience_s = patience_s
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def ask(self, request: bytes, answer: Answer | None = None) -> Answer:
        """Send `request` and read its answer to the end; never raises for what the server did."""
        answer = answer or Answer()
        try:
            connection = await self._connection()
        except OSError as error:
            answer.fail(f"no connection: {error.strerror}", time.perf_counter())
            return answer
        try:
            async with asyncio.timeout(self._patience_s or None):
                await connection.ask(request, answer)
        except TimeoutError:
            answer.fail(f"no end within {self._patience_s:g} s", time.perf_counter())
        finally:
            if connection.is_open:
                self._idle.append(connection)
            else:
                self._all.discard(connection)
        return answer

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            self._all.discard(connection)
        _, connection = await asyncio.get_running_loop().create_connection(Connection, HOST, self._port)
        self._all.add(connection)
        return connection

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()


def request_bytes(fields: Fields) -> bytes:
    """POST /generate as it goes over the wire."""
    body = json.dumps(dict(fields)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return f"{head}\r\n\r\n".encode() + body


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """On the fast event loop, as a batch thread (sched(7)): what it wakes up for does not push aside what it measures.

    A client on another machine would not either. Being late for that counts as time of the answer.
    """
    usual = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    finally:
        os.sched_setscheduler(0, usual, os.sched_param(0))
