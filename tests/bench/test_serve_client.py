"""The load's client against servers that answer byte for byte what a test says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_sockets

from bench.serve.client import Client, request_bytes
from bench.serve.idle import IdleLinks, IdleSocket
from bench.serve.loops import OpenLoop, closed_loop

REQUEST = request_bytes({"input_ids": [1, 2], "stream": True})
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b'data: {"index":3,"text":"","token_ids":[],"finish_reason":"length","usage":{"prompt_tokens":2}}\n\n'


def chunk(index: int, *token_ids: int) -> bytes:
    part = {"index": index, "text": "x", "token_ids": token_ids}
    return b"id: %d\ndata: %b\n\n" % (index + len(token_ids) - 1, json.dumps(part).encode())


def chunked(*events: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


def whole(status: str, body: str) -> bytes:
    raw = body.encode()
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


STREAM = chunked(b": keep-alive\n\n", chunk(0, 7), chunk(1, 8, 9), END)


class Server:
    """Answers every request with `answer`, in pieces; with None it hangs up."""

    def __init__(self) -> None:
        self.answer: bytes | None = STREAM
        self.piece = 1 << 20
        self.connections = 0
        self.requests = 0

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                self.requests += 1
                if self.answer is None:
                    return
                for start in range(0, len(self.answer), self.piece):
                    writer.write(self.answer[start : start + self.piece])
                    await writer.drain()
                    if self.piece < len(self.answer):
                        await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[int]:
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()


@asynccontextmanager
async def clients(server: Server, patience_s: float = 30) -> AsyncIterator[Client]:
    async with listening(server.converse) as port:
        client = Client(port, patience_s)
        try:
            yield client
        finally:
            client.close()
            await asyncio.sleep(0.01)  # the server's side of the connections ends


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
async def test_a_stream_is_read_whole_however_it_is_cut(piece: int) -> None:
    server = Server()
    server.piece = piece
    async with clients(server) as client:
        answer = await client.ask(REQUEST)
    assert answer.is_whole
    assert (answer.token_ids, len(answer.times), answer.comments) == ([7, 8, 9], 2, 1)
    assert answer.ttft_s is not None
    assert answer.sent_at < answer.times[0] <= answer.times[1] <= answer.ended_at


async def test_a_connection_is_used_again_and_each_request_has_its_own_answer() -> None:
    server = Server()
    async with clients(server) as client:
        first = await client.ask(REQUEST)
        server.answer = whole("429 Too Many Requests", '{"error": {"code": "queue_full", "message": "full"}}')
        second = await client.ask(REQUEST)
        server.answer = whole("200 OK", '{"text": "x", "token_ids": [4, 5], "finish_reason": "stop"}')
        third = await client.ask(REQUEST)
    assert (first.is_whole, first.is_refused, first.error) == (True, False, None)
    assert (second.is_whole, second.is_refused, second.error) == (False, True, "queue_full")
    assert (third.is_whole, third.token_ids) == (True, [4, 5])
    assert (server.requests, server.connections) == (3, 1)


@pytest.mark.parametrize(
    ("answer", "tokens", "error"),
    [
        (None, [], "connection closed"),
        (chunked(chunk(0, 7), chunk(2, 9), END), [7, 9], "token 2 came after 1 tokens"),
        (chunked(chunk(0, 7), b'event: error\ndata: {"error": {"code": "deadline_exceeded"}}\n\n'), [7], "deadline_"),
        (chunked(chunk(0, 7)), [7], None),  # no end: it is not whole all the same
        (b"what is this\r\n\r\n", [], "unreadable"),
        (chunked(b"data: no JSON\n\n"), [], "unreadable"),
        (chunked(b"x" * (2 << 20)), [], "unreadable"),
    ],
)
async def test_a_broken_answer_is_an_answer_that_says_so(answer: bytes | None, tokens: list[int], error: str) -> None:
    server = Server()
    server.answer = answer
    async with clients(server) as client:
        found = await client.ask(REQUEST)
    assert not found.is_whole
    assert found.token_ids == tokens
    assert found.ended_at > found.sent_at
    assert (found.error or "").startswith(error or "")
    assert (found.error is None) == (error is None)


async def test_an_answer_that_does_not_end_is_given_up_and_its_connection_with_it() -> None:
    server = Server()
    server.answer = STREAM[:-5]
    async with clients(server, patience_s=1.0) as client:
        late = await client.ask(REQUEST)
        server.answer = STREAM
        again = await client.ask(REQUEST)
    assert (late.error, late.token_ids) == ("no end within 1 s", [7, 8, 9])
    assert not late.is_whole
    assert again.is_whole
    assert server.connections == 2


async def test_nobody_listening_is_an_answer_too() -> None:
    async with listening(Server().converse) as port:
        pass
    answer = await Client(port).ask(REQUEST)
    assert (answer.error or "").startswith("no connection")


async def test_an_open_loop_sends_every_request_at_its_time_and_waits_for_none() -> None:
    server = Server()
    server.answer = STREAM[:-5]
    async with clients(server) as client:
        loop = OpenLoop(client, endless_requests())
        start, end = await loop.run([0.0, 0.05, 0.1])
        await until(lambda: server.requests == 3)
        assert loop.outcomes.answers == []  # all were sent, none has ended
        client.close()
        await loop.finish(30)
    assert end - start >= 0.1
    answers = loop.outcomes.answers
    assert sorted(round(due - start, 6) for due, _ in answers) == [0.0, 0.05, 0.1]
    assert all(answer.sent_at >= due for due, answer in answers)
    assert (loop.outcomes.unsent, loop.outcomes.unfinished) == (0, 0)


async def test_a_closed_loop_has_as_many_requests_at_once_as_clients() -> None:
    server = Server()
    async with clients(server) as client:
        outcomes, start, end = await closed_loop(client, endless_requests(), 3, 1.0)
    assert server.connections == 3
    assert len(outcomes.answers) == server.requests >= 3
    assert end - start == pytest.approx(1.0)
    assert all(answer.is_whole for _, answer in outcomes.answers)


async def test_an_idle_socket_answers_pings_and_says_when_it_is_closed() -> None:
    server_side: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def talk(socket: ServerConnection) -> None:
        server_side.put_nowait(socket)
        await socket.wait_closed()

    async with serve_sockets(talk, "127.0.0.1", 0, ping_interval=None) as server:
        socket = await IdleSocket.open(next(iter(server.sockets)).getsockname()[1])
        peer = await server_side.get()
        async with asyncio.timeout(30):
            for payload in (b"", b"four", b"x" * 125):
                await (await peer.ping(payload))
        assert (socket.pings, socket.lost) == (3, None)
        await peer.close()
        assert socket.lost == "closed by the server"


async def test_a_socket_that_is_refused_cannot_be_opened() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with listening(refuse) as port:
        with pytest.raises(ConnectionError, match="403"):
            await IdleSocket.open(port)


async def test_idle_links_count_what_is_open_and_what_was_lost() -> None:
    server = Server()
    server.answer = STREAM[: len(HEAD) + 20]  # a keep-alive, and no end
    async with listening(server.converse) as port:
        links = IdleLinks(port)
        await links.open(0, 3)
        await until(lambda: links.report()["keep_alives"] == 3)
        assert links.report() == {"open_sockets": 0, "waiting_streams": 3, "pings": 0, "keep_alives": 3, "lost": {}}
        await links.close()
        assert links.report()["lost"] == {"connection closed": 3}
        await asyncio.sleep(0.01)


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def endless_requests() -> Iterator[bytes]:
    while True:
        yield REQUEST
