"""Clients of the gateways, patient and otherwise: one stream read to its end, over as many connections as it takes.

Sockets and lines by hand, because what is tried here no client library does: leave after any byte, read one byte a
second, come back at another gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.faults.history import Body, History

RETRY_S = 0.1
OFTEN_WITHIN_HEAD = 0.2  # of the connections that are cut, this part is cut before the first event
HEAD_BYTES = 300
MOST_BYTES = 16_000  # less than half of an answer
SMALL_BUFFER = 4096


class Refused(Exception):
    """The gateway did not take the request (yet): nothing was promised."""


class _Cut(Exception):
    """The connection ended, or was ended, before the stream."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How clients behave when connections break, and whether they break them."""

    resumes: bool = False  # come back, at any gateway, until the stream has ended
    drops: bool = False  # leave after a random byte of every answer


async def record(addresses: Callable[[], Sequence[str]], body: Body, manner: Manner, chance: random.Random) -> History:
    """Stream `body` to its end from whichever gateway answers. Raises Refused; after that all is the history's.

    A client that resumes has an Idempotency-Key, for an answer that breaks before it has an id.
    """
    history = History(body)
    key = f"{chance.getrandbits(128):x}" if manner.resumes else None
    while True:
        try:
            await _converse(chance.choice(addresses()), history, key, manner, chance)
        except (_Cut, OSError) as end:
            if not manner.resumes:
                return history
            history.resumes += not isinstance(end, ConnectionRefusedError)  # a gateway that has just died
        except Refused:
            if history.generation_id is None:
                raise
        if history.has_ended:
            return history
        await asyncio.sleep(0 if manner.drops else RETRY_S)


async def storm(addresses: Sequence[str], body: Body, key: str, count: int) -> list[History]:
    """`count` clients send `body` under one Idempotency-Key at the same time, in turn to each gateway."""
    histories = [History(body) for _ in range(count)]
    unshared = random.Random(0)  # nobody drops: nothing is drawn
    async with asyncio.TaskGroup() as group:
        for number, history in enumerate(histories):
            address = addresses[number % len(addresses)]
            group.create_task(_converse(address, history, key, Manner(), unshared))
    return histories


async def read_slowly(address: str, body: Body, seconds: float, bytes_per_s: int) -> None:
    """Ask for a stream and take `bytes_per_s` of it (0 = nothing) into the smallest buffer there is; then vanish."""
    where = urlsplit(address)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        link.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(link, (where.hostname, where.port))
        await loop.sock_sendall(link, _request(History(body), None))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    if bytes_per_s:
                        await loop.sock_recv(link, bytes_per_s)
                    await asyncio.sleep(1.0)


async def _converse(address: str, history: History, key: str | None, manner: Manner, chance: random.Random) -> None:
    """One connection: ask, or go on where the history ends. Raises Refused, _Cut, OSError."""
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(_request(history, key))
        answer = _Answer(reader, _patience(chance) if manner.drops else sys.maxsize)
        await answer.read_into(history)
    finally:
        if manner.drops and chance.random() < 0.5:
            writer.transport.abort()
        writer.close()


def _patience(chance: random.Random) -> int:
    """Bytes after which a client leaves."""
    return chance.randrange(HEAD_BYTES if chance.random() < OFTEN_WITHIN_HEAD else MOST_BYTES)


def _request(history: History, key: str | None) -> bytes:
    headers = {"Host": "localhost", "Connection": "close"}
    if history.generation_id is not None:
        line, raw = f"GET /streams/{history.generation_id}", b""
        if history.last_event_id is not None:
            headers["Last-Event-ID"] = str(history.last_event_id)
    else:
        line, raw = "POST /generate", json.dumps({**history.body, "stream": True}).encode()
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        if key is not None:
            headers["Idempotency-Key"] = key
    head = "\r\n".join([f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())])
    return head.encode() + b"\r\n\r\n" + raw


class _Answer:
    """An answer as it comes in, up to so many bytes."""

    def __init__(self, reader: asyncio.StreamReader, most_bytes: int) -> None:
        self._reader = reader
        self._left = most_bytes

    async def read_into(self, history: History) -> None:
        """To the end of the stream. An event counts when its empty line is there: half an event was not seen."""
        status = await self._line()
        if b" 503 " in status or b" 429 " in status:
            raise Refused(status.decode().strip())
        if b" 200 " not in status:
            history.error = (status + await self._reader.read()).decode()
            return
        while (line := await self._line()) != b"\r\n":
            name, _, value = line.decode().partition(":")
            if name.lower() == "x-generation-id":
                history.generation_id = value.strip()
        event: dict[bytes, bytes] = {}
        while not history.has_ended:
            line = await self._line()
            if line == b"\n":
                _note(history, event)
                event = {}
            elif not line.endswith(b"\r\n"):  # those are the lengths of HTTP's chunks, each a whole event
                field, _, content = line.partition(b": ")
                event[field] = content.rstrip()

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        self._left -= len(line)
        if self._left < 0 or not line.endswith(b"\n"):
            raise _Cut
        return line


def _note(history: History, event: dict[bytes, bytes]) -> None:
    if b"data" not in event:  # a comment: keep-alive
        return
    part = json.loads(event[b"data"])
    if "error" in part:
        history.error = json.dumps(part["error"])
        return
    if part.get("token_ids"):
        history.events.append((time.monotonic(), part["index"], part["token_ids"]))
    if b"id" in event:
        history.last_event_id = int(event[b"id"])
    history.finish_reason = part.get("finish_reason")
