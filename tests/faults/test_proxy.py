"""Each toxic does to bytes what its name says, and nothing when it is taken away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.proxy import Proxy, Toxics, Way, deliver

GREETING = b"news "  # that nobody has called for
PATIENCE_S = 20.0


@dataclass
class Upstream:
    """Greets who connects, echoes what it reads, and remembers it."""

    socket: str
    reads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        try:
            while chunk := await reader.read(65536):
                self.reads.append(chunk)
                writer.write(chunk)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    @property
    def heard(self) -> bytes:
        return b"".join(self.reads)


class Caller:
    """A connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def call(self, message: bytes) -> bytes:
        self.writer.write(message)
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readexactly(len(message))

    async def hears(self) -> bool:
        """Whether anything comes within a moment."""
        try:
            async with asyncio.timeout(0.3):
                return bool(await self.reader.read(1))
        except TimeoutError:
            return False


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Upstream]:
    found = Upstream(str(tmp_path / "upstream.sock"))
    async with await asyncio.start_unix_server(found.serve, found.socket):
        yield found


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readexactly(len(GREETING)) == GREETING
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()
        await asyncio.sleep(0.05)  # for the upstream to hear of it


async def test_a_clean_network_changes_nothing(upstream: Upstream) -> None:
    message = bytes(range(256)) * 400
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as caller:
            assert await caller.call(message) == message


@pytest.mark.parametrize(
    ("toxics", "message", "least_s"),
    [
        (Toxics(latency_s=0.2, jitter_s=0.05), b"ping", 0.15),
        (Toxics(bytes_per_s=64_000), bytes(16_000), 0.25),  # each way
    ],
)
async def test_slow_networks_deliver_later_what_was_sent(
    upstream: Upstream, toxics: Toxics, message: bytes, least_s: float
) -> None:
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as caller:
            proxy.toxics = toxics
            start = time.monotonic()
            assert await caller.call(message) == message
            assert time.monotonic() - start >= least_s


async def test_late_answers_do_not_overtake_each_other(upstream: Upstream) -> None:
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as caller:
            proxy.toxics = Toxics(latency_s=0.05, jitter_s=0.05)
            for number in range(100):
                caller.writer.write(b"%03d" % number)
                await asyncio.sleep(0.001)
            async with asyncio.timeout(PATIENCE_S):
                assert await caller.reader.readexactly(300) == b"".join(b"%03d" % number for number in range(100))


class Recorder:
    """A sink that remembers its writes."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes, /) -> None:
        self.writes.append(data)

    async def drain(self) -> None:
        pass


@pytest.mark.parametrize(
    ("chunk", "writes"),
    [(b"abcdef", [b"a", b"b", b"c", b"def"]), (b"abc", [b"a", b"b", b"c"]), (b"a", [b"a"])],
)
async def test_the_slicer_writes_byte_by_byte_up_to_a_bound(chunk: bytes, writes: list[bytes]) -> None:
    sink = Recorder()
    await deliver(chunk, Toxics(sliced_bytes=3), sink)
    assert sink.writes == writes


async def test_slices_arrive_whole(upstream: Upstream) -> None:
    message = bytes(range(200))
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as caller:
            proxy.toxics = Toxics(sliced_bytes=64)
            assert await caller.call(message) == message


@pytest.mark.parametrize(("way", "is_heard"), [(Way.CALLS, False), (Way.ANSWERS, True)])
async def test_what_a_blackhole_has_touched_stays_black(upstream: Upstream, way: Way, is_heard: bool) -> None:
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as caller:
            proxy.toxics = Toxics(swallows=way)
            caller.writer.write(b"one")
            assert not await caller.hears()
            proxy.toxics = Toxics()
            caller.writer.write(b"two")
            assert not await caller.hears()
            assert upstream.heard == (b"onetwo" if is_heard else b"")
            async with connected(proxy) as other:
                assert await other.call(b"three") == b"three"


async def test_a_lost_answer_was_executed_and_resets_the_connection(upstream: Upstream) -> None:
    with Proxy.open(upstream.socket) as proxy:
        proxy.toxics = Toxics(loses_answers=1.0)
        async with connected(proxy) as caller:  # its greeting is no answer
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await caller.call(b"once")
    assert upstream.heard == b"once"


async def test_a_reset_ends_every_connection(upstream: Upstream) -> None:
    with Proxy.open(upstream.socket) as proxy:
        async with connected(proxy) as one, connected(proxy) as other:
            proxy.reset()
            for caller in (one, other):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await caller.call(b"ping")


async def test_without_an_upstream_connections_are_reset(tmp_path: Path) -> None:
    async def call() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)  # it may be reset as early as here
        try:
            async with asyncio.timeout(PATIENCE_S):
                await reader.readexactly(1)
        finally:
            writer.transport.abort()

    with Proxy.open(str(tmp_path / "nobody.sock")) as proxy, pytest.raises(ConnectionError):
        await call()
