"""A bad network between the processes and Redis: a TCP proxy on a thread of its own, whose toxics can be changed while
connections are open.

Bytes pass through a delay line in each direction, in order. What a blackhole has swallowed is lost for good, so the
connections it has touched stay black when it is lifted, as behind a firewall that has forgotten them: both ends have
to find out by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

CHUNK_BYTES: Final = 4096
MOST_CHUNKS: Final = 256  # under way in one direction; then the sender has to wait
_NO_LINGER: Final = struct.pack("ii", 1, 0)  # close() sends RST


class Way(Enum):
    """A direction, by what travels in it."""

    CALLS = "calls"
    ANSWERS = "answers"


@dataclass(frozen=True, slots=True)
class Toxics:
    """What is wrong with the network. Times in s, for each chunk; rates for each connection and direction."""

    latency_s: float = 0.0  # of answers
    jitter_s: float = 0.0  # more or less
    bytes_per_s: int = 0  # 0 = no limit
    sliced_bytes: int = 0  # so many of a chunk travel one by one, then the rest of it
    swallows: Way | None = None
    loses_answers: float = 0.0  # probability that a call is executed, not answered, and its connection reset


class Proxy:
    """Use `with Proxy.open(unix_socket) as proxy`. `toxics` may be set from any thread."""

    def __init__(self, upstream: str, seed: int) -> None:
        self.toxics = Toxics()
        self.port = 0
        self._upstream = upstream
        self._chance = random.Random(seed)
        self._loop = asyncio.SelectorEventLoop()  # whatever kind the rest of this process prefers
        self._links: set[_Link] = set()
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    @contextmanager
    def open(cls, upstream: str, seed: int = 0) -> Iterator[Proxy]:
        """Listen on a port that the system picks; connections go on to the Unix socket `upstream`."""
        proxy = cls(upstream, seed)
        is_open = threading.Event()
        stop = asyncio.Event()
        thread = threading.Thread(target=proxy._loop.run_until_complete, args=(proxy._serve(is_open, stop),))
        thread.start()
        try:
            if not is_open.wait(10):
                raise RuntimeError("the proxy does not listen")
            yield proxy
        finally:
            proxy._loop.call_soon_threadsafe(stop.set)
            thread.join()
            proxy._loop.close()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Reset every connection. From any thread."""
        self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _serve(self, is_open: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        is_open.set()
        await stop.wait()
        server.close()
        self._reset()
        await asyncio.gather(*self._connections)
        await asyncio.sleep(0)  # the transports' own goodbyes

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_unix_connection(self._upstream)
        except OSError:  # Redis is away
            _cut(writer)
            return
        link = _Link(self, self._chance, (reader, writer), upstream)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One connection, and the one that goes on from it. Either ends: both are reset."""

    def __init__(self, proxy: Proxy, chance: random.Random, client: Stream, server: Stream) -> None:
        self._proxy = proxy
        self._chance = chance
        self._writers = client[1], server[1]
        self._ways = ((Way.CALLS, client[0], server[1]), (Way.ANSWERS, server[0], client[1]))
        self._black: set[Way] = set()
        self._awaits_answer = False
        self._is_over = asyncio.Event()

    def reset(self) -> None:
        self._is_over.set()

    async def run(self) -> None:
        parts: list[Coroutine[object, object, object]] = [self._is_over.wait()]
        for way, reader, writer in self._ways:
            line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_CHUNKS)
            parts += [self._take_in(way, reader, line), self._hand_on(line, writer)]
        tasks = [asyncio.create_task(part) for part in parts]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            _cut(writer)

    async def _take_in(self, way: Way, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Chunks, each with the time at which it is due."""
        loop, due = asyncio.get_running_loop(), 0.0
        while chunk := await reader.read(CHUNK_BYTES):
            toxics = self._proxy.toxics
            if way is Way.CALLS:
                self._awaits_answer = True
            elif self._awaits_answer:  # not news, which nobody has called for
                self._awaits_answer = False
                if self._chance.random() < toxics.loses_answers:
                    return
            if toxics.swallows is way:
                self._black.add(way)
            if way in self._black:
                continue
            delay_s = toxics.latency_s + self._chance.uniform(-toxics.jitter_s, toxics.jitter_s)
            due = max(due, loop.time() + (delay_s if way is Way.ANSWERS else 0.0))
            await line.put((due, chunk))

    async def _hand_on(self, line: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await line.get()
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await deliver(chunk, self._proxy.toxics, writer)


class Sink(Protocol):
    """Where bytes go: a StreamWriter."""

    def write(self, data: bytes, /) -> None: ...
    async def drain(self) -> None: ...


async def deliver(chunk: bytes, toxics: Toxics, sink: Sink) -> None:
    """One chunk, at the network's pace and in its pieces."""
    if toxics.bytes_per_s:
        await asyncio.sleep(len(chunk) / toxics.bytes_per_s)
    for start in range(min(toxics.sliced_bytes, len(chunk))):
        sink.write(chunk[start : start + 1])
        await asyncio.sleep(0)  # so that it is a write of its own
    if rest := chunk[toxics.sliced_bytes :]:
        sink.write(rest)
    await sink.drain()


def _cut(writer: asyncio.StreamWriter) -> None:
    link = writer.get_extra_info("socket")
    if link.family == socket.AF_INET:
        with contextlib.suppress(OSError):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()
