"""How an answer reaches an HTTP client: whole, or as server-sent events.

Both are ASGI responses that read the same chunks (completion.py). Each is a reader of its ticket from its first to
its last line, so a client that leaves is noticed at once, and what it asked for does not run on.

An event is `id: <index of its last token>` and one `data:` line of JSON. A client that resumes with Last-Event-ID
gets the next token. The last `data:` line has the finish reason; an error after the stream has begun is an `event:
error`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.answers import Chunk, End, ErrorAnswer
from gateway.completion import fold, follow
from gateway.connection import ClientGone, Outlet, disconnected, while_present
from gateway.ledger import Ledger, Ticket
from gateway.limits import GatewayLimits
from gateway.problems import REQUEST_ID, error_detail, problem_of
from gateway.telemetry import Telemetry

logger = logging.getLogger(__name__)

GENERATION_ID: Final = "x-generation-id"  # what /streams/{id} and /requests/{id} take
KEEP_ALIVE: Final = b": keep-alive\n\n"

_json = msgspec.json.Encoder()


class Delivery(Response):
    """A response made of a ticket's chunks."""

    def __init__(self, ledger: Ledger, ticket: Ticket, limits: GatewayLimits) -> None:
        self.ledger = ledger
        self.ticket = ticket
        self.limits = limits
        self.background = None

    def start_message(self, content_type: bytes, *headers: tuple[bytes, bytes]) -> dict[str, object]:
        own = (
            (b"content-type", content_type),
            (b"cache-control", b"no-store"),
            (GENERATION_ID.encode(), self.ticket.id.encode()),
        )
        return {"type": "http.response.start", "status": 200, "headers": [*own, *headers]}


class WholeAnswer(Delivery):
    """One JSON object at the end. A client that leaves has no way back, so its request is cancelled at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.ledger.reading(self.ticket, grace_s=0.0):
                async with while_present(disconnected(receive)), aclosing(follow(self.ledger, self.ticket)) as parts:
                    answer = await fold(self.ticket, parts)
        except ClientGone:
            return
        body = _json.encode(answer)
        await send(self.start_message(b"application/json", (b"content-length", b"%d" % len(body))))
        await send({"type": "http.response.body", "body": body})


class EventStream(Delivery):
    """Server-sent events from token `start`. A client that leaves has `cancel_grace_s` to come back."""

    def __init__(
        self, ledger: Ledger, ticket: Ticket, limits: GatewayLimits, telemetry: Telemetry, start: int = 0
    ) -> None:
        super().__init__(ledger, ticket, limits)
        self._telemetry = telemetry
        self._start = start
        self._has_begun = False
        self._outlet: Outlet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._outlet = Outlet(send)
        try:
            with self.ledger.reading(self.ticket, self.limits.cancel_grace_s):
                async with while_present(self._watch(receive)):
                    await self._deliver(scope[REQUEST_ID])
        except ClientGone as gone:
            logger.info("stream cut", extra={"id": self.ticket.id, "reason": gone.reason})

    async def _deliver(self, request_id: str) -> None:
        try:
            async with aclosing(follow(self.ledger, self.ticket, self._start)) as parts:
                async for part in parts:
                    await self._write(_end_line(part) if isinstance(part, End) else _chunk_event(part))
        except Exception as error:
            if not self._has_begun:
                raise  # it can still be an HTTP status
            await self._write(_error_event(error, request_id, self._telemetry))
        await self._outlet.send({"type": "http.response.body", "body": b""})

    async def _write(self, event: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            # x-accel-buffering: nginx would collect events before it passes them on.
            await self._outlet.send(
                self.start_message(b"text/event-stream; charset=utf-8", (b"x-accel-buffering", b"no"))
            )
        await self._outlet.send({"type": "http.response.body", "body": event, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        """Wait for the client to leave; break long silences, also before the first token; cut who does not read."""
        while True:
            now = time.monotonic()
            cut_at = self._outlet.cut_at(self.limits.max_stall_s)
            speak_at = self._outlet.last_sent + self.limits.keep_alive_s
            if cut_at is None and now >= speak_at:
                await self._keep_alive()
            elif cut_at is not None and now >= cut_at:
                raise ClientGone("slow reader")
            else:
                # What gets stuck right after this look is found at the next, and cut on time.
                look_at = cut_at or min(speak_at, now + self.limits.max_stall_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(look_at - now):
                        await disconnected(receive)

    async def _keep_alive(self) -> None:
        try:
            async with asyncio.timeout(self.limits.max_stall_s):
                await self._write(KEEP_ALIVE)
        except TimeoutError:
            raise ClientGone("slow reader") from None


def _chunk_event(chunk: Chunk) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (chunk.index + len(chunk.token_ids) - 1, _json.encode(chunk))


def _end_line(end: End) -> bytes:
    return b"data: %b\n\n" % _json.encode(end)


def _error_event(error: Exception, request_id: str, telemetry: Telemetry) -> bytes:
    problem = problem_of(error, request_id)
    telemetry.refused(problem.error.code)
    return b"event: error\ndata: %b\n\n" % _json.encode(ErrorAnswer(error_detail(problem.error, request_id)))
