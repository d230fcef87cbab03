"""Clients in which nothing happens but keep-alives: open WebSockets, and streams of requests that nobody serves."""

from __future__ import annotations

import asyncio
import base64
import os
from collections import Counter
from collections.abc import Iterator
from typing import cast

from bench.serve.client import HOST, Answer, Client, request_bytes
from bench.serve.processes import PARKED_NAME

HANDSHAKE_S = 30.0
MOST_BYTES = 1 << 16
OPEN_AT_ONCE = 50
# RFC 6455, section 5.2: the first byte of a frame that is whole.
_PING, _PONG, _CLOSE = 0x89, 0x8A, 0x88
_MASKED = 0x80


class IdleSocket(asyncio.Protocol):
    """A WebSocket that answers pings (RFC 6455) and wants nothing."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._is_upgraded = False
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pings = 0
        self.lost: str | None = None  # why it is not open any more

    @classmethod
    async def open(cls, port: int) -> IdleSocket:
        """Raises OSError, TimeoutError, ConnectionError if the server does not agree."""
        _, socket = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        async with asyncio.timeout(HANDSHAKE_S):
            await socket.opened
        return socket

    def close(self) -> None:
        self.lost = self.lost or "closed by us"
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
        head = f"GET /generate/stream HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        self._transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if not self._is_upgraded:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if end:
                self._upgrade(head, rest)
        if self._is_upgraded:
            for first, payload in self._frames():
                self._answer(first, payload)
        if len(self._rest) > MOST_BYTES:
            self._lose("a frame too long to be a ping")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("connection closed")

    def _upgrade(self, head: bytes, rest: bytes) -> None:
        if not head.startswith(b"HTTP/1.1 101 "):
            self._lose(f"refused: {head.splitlines()[0].decode(errors='replace')[:100]}")
            return
        self._is_upgraded, self._rest = True, rest
        self.opened.set_result(None)

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        """First byte and payload of each whole frame that is short enough for its length to be one byte."""
        while len(self._rest) >= 2:
            length = self._rest[1]
            if length > 125:
                self._lose("a frame too long to be a ping")
                return
            if len(self._rest) < 2 + length:
                return
            frame, self._rest = self._rest[: 2 + length], self._rest[2 + length :]
            yield frame[0], frame[2:]

    def _answer(self, first: int, payload: bytes) -> None:
        if first == _PING:
            self.pings += 1
            if self._transport is not None:
                # Clients mask what they send; with a key of zeros the payload stays as it is.
                self._transport.write(bytes((_PONG, _MASKED | len(payload), 0, 0, 0, 0)) + payload)
        elif first == _CLOSE:
            self._lose("closed by the server")
        else:
            self._lose(f"an unexpected frame 0x{first:02x}")

    def _lose(self, reason: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(reason))
        self.lost = self.lost or reason
        if self._transport is not None:
            self._transport.abort()


class IdleLinks:
    """So many idle sockets and waiting streams."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._client = Client(port, patience_s=0)
        self._sockets: list[IdleSocket] = []
        self._waiting: list[tuple[asyncio.Task[Answer], Answer]] = []

    async def open(self, sockets: int, streams: int) -> None:
        """Raises OSError, TimeoutError or ConnectionError if one socket cannot be had."""
        for start in range(0, sockets, OPEN_AT_ONCE):
            some = range(start, min(sockets, start + OPEN_AT_ONCE))
            self._sockets += await asyncio.gather(*(IdleSocket.open(self._port) for _ in some))
        for number in range(streams):
            fields = {"model": PARKED_NAME, "input_ids": [100 + number % 1000], "max_tokens": 1, "stream": True}
            answer = Answer()
            self._waiting.append((asyncio.create_task(self._client.ask(request_bytes(fields), answer)), answer))
            if number % OPEN_AT_ONCE == OPEN_AT_ONCE - 1:
                await asyncio.sleep(0.1)  # a server's accept queue is short

    def report(self) -> dict[str, object]:
        """How many are open, how many keep-alives came, and why others were lost."""
        lost = Counter(socket.lost for socket in self._sockets if socket.lost)
        lost.update(answer.error or f"status {answer.status}" for task, answer in self._waiting if task.done())
        return {
            "open_sockets": sum(not socket.lost for socket in self._sockets),
            "waiting_streams": sum(not task.done() for task, _ in self._waiting),
            "pings": sum(socket.pings for socket in self._sockets),
            "keep_alives": sum(answer.comments for _, answer in self._waiting),
            "lost": dict(lost),
        }

    async def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._client.close()
        await asyncio.gather(*(task for task, _ in self._waiting))
