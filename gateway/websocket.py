"""WS /generate/stream: many requests on one socket.

The client sends frames `generate`, `cancel` and `resume`; it gets `accepted`, `tokens`, `done` and `error`. One
task per running request reads its chunks and sends them; all share one outlet, so a reader that is slow slows its
own requests only. A frame that makes no sense is answered and counted, and the socket lives on; when it closes, its
requests lose their reader.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import ClassVar, Final

import msgspec
from fastapi import FastAPI, WebSocket
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from gateway.answers import AcceptedFrame, Chunk, DoneFrame, End, ErrorFrame, TokensFrame
from gateway.caller import caller_of
from gateway.completion import follow
from gateway.connection import ClientGone, Outlet, watch_reader, while_present
from gateway.json_body import decode_object
from gateway.ledger import Ticket
from gateway.problems import REQUEST_ID, error_frame, problem_of
from gateway.room import Room
from gateway.schemas import CancelFrame, GenerateBody, ResumeFrame, parse
from wire.errors import BadRequest, Conflict, MillraceError, QueueFull, RequestTooLarge, UnknownRequest

logger = logging.getLogger(__name__)

POLICY_VIOLATION: Final = 1008
MESSAGE_TOO_BIG: Final = 1009
MAX_ID_CHARS: Final = 128

_json = msgspec.json.Encoder()


class _BadFrame(Exception):
    """A frame that is not one of ours: answered, and counted against the socket."""

    def __init__(self, error: MillraceError, frame_id: str | None = None, close_code: int | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.frame_id = frame_id
        self.close_code = close_code


class Conversation:
    """One socket, from accept to close."""

    def __init__(self, room: Room, socket: WebSocket) -> None:
        self._room = room
        self._socket = socket
        self._outlet = Outlet(socket.send)
        self._request_id: str = socket.scope[REQUEST_ID]
        self._caller = caller_of(socket.scope)
        self._tickets: dict[str, Ticket] = {}  # running, by the client's id
        self._tasks: set[asyncio.Task[None]] = set()
        self._bad_frames = 0

    async def run(self) -> None:
        """Accept, answer frames until the client leaves or is sent away, and leave nothing behind."""
        await self._socket.accept(headers=[(b"x-request-id", self._request_id.encode())])
        self._room.telemetry.sockets(1)
        reason = "disconnected"
        try:
            async with while_present(watch_reader(self._outlet, self._room.limits.max_stall_s)):
                close_code = await self._converse()
                await self._stop()
                if close_code is not None:
                    reason = f"closed with {close_code}"
                    await self._put({"type": "websocket.close", "code": close_code})
        except ClientGone as gone:
            reason = gone.reason
        finally:
            await self._stop()
            self._room.telemetry.sockets(-1)
            logger.info("socket closed", extra={"request_id": self._request_id, "reason": reason})

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- frames in ----------------------------------------------------------------------------------------------------

    async def _converse(self) -> int | None:
        """Answer frames until the client leaves (None), or return the code to close with."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return None
            try:
                await self._answer(message.get("text"))
            except _BadFrame as bad:
                await self._send_error(bad.error, bad.frame_id)
                self._bad_frames += 1
                if bad.close_code is not None:
                    return bad.close_code
                if self._bad_frames > self._room.limits.ws_max_bad_frames:
                    return POLICY_VIOLATION

    async def _answer(self, text: str | None) -> None:
        """Act on one frame; what goes wrong with its request is an error frame. Raises _BadFrame, ClientGone."""
        members = self._read(text)
        frame_type = members.pop("type", None)
        frame_id = members.get("id")
        if not isinstance(frame_id, str) or not 0 < len(frame_id) <= MAX_ID_CHARS:
            error = BadRequest(f"id must be a string of 1 to {MAX_ID_CHARS} characters", param="id")
            raise _BadFrame(error)
        act = self._acts.get(frame_type) if isinstance(frame_type, str) else None
        if act is None:
            error = BadRequest("type must be one of generate, cancel, resume", param="type")
            raise _BadFrame(error, frame_id)
        try:
            await act(self, frame_id, members)
        except ClientGone:
            raise
        except Exception as error:
            await self._send_error(problem_of(error, self._request_id).error, frame_id)

    def _read(self, text: str | None) -> dict[str, object]:
        if text is None:
            raise _BadFrame(BadRequest("binary frames are not accepted"))
        limit = self._room.limits.ws_max_frame_bytes
        if len(text) > limit or (len(text) * 4 > limit and len(text.encode("utf-8")) > limit):
            raise _BadFrame(RequestTooLarge(f"the frame has more than {limit:,} bytes"), close_code=MESSAGE_TOO_BIG)
        try:
            return decode_object(text, "the frame")
        except BadRequest as error:
            raise _BadFrame(error) from error

    async def _generate(self, frame_id: str, members: dict[str, object]) -> None:
        self._check_free(frame_id)
        del members["id"]
        if members.get("stream") is False:
            raise BadRequest("a socket always streams: stream cannot be false here", param="stream")
        ticket = await self._room.take_in(parse(GenerateBody, members), self._caller)
        self._start(frame_id, ticket, start=0)

    async def _cancel(self, frame_id: str, members: dict[str, object]) -> None:
        parse(CancelFrame, members)
        ticket = self._tickets.get(frame_id)
        if ticket is None:
            raise UnknownRequest("no request with this id runs on this socket", param="id")
        await self._room.ledger.cancel(ticket)  # its stream ends with done, as any other

    async def _resume(self, frame_id: str, members: dict[str, object]) -> None:
        frame = parse(ResumeFrame, members)
        self._check_free(frame_id)
        ticket = await self._room.ledger.find(frame.id, self._caller)
        self._check_free(frame_id)  # again: another frame may have been answered meanwhile
        self._start(frame_id, ticket, frame.from_)

    def _check_free(self, frame_id: str) -> None:
        if frame_id in self._tickets:
            raise Conflict("a request with this id runs on this socket already", param="id")
        if len(self._tickets) >= (limit := self._room.limits.ws_max_requests):
            raise QueueFull(f"{limit} requests run on this socket already, the most that may", retry_after_s=1.0)

    _acts: ClassVar[Mapping[str, Callable[[Conversation, str, dict[str, object]], Awaitable[None]]]] = {
        "generate": _generate,
        "cancel": _cancel,
        "resume": _resume,
    }

    # --- frames out ---------------------------------------------------------------------------------------------------

    def _start(self, frame_id: str, ticket: Ticket, start: int) -> None:
        self._tickets[frame_id] = ticket
        task = asyncio.get_running_loop().create_task(self._deliver(frame_id, ticket, start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, frame_id: str, ticket: Ticket, start: int) -> None:
        """One request's frames, to its end. The id is free again before the last of them is sent."""
        ledger = self._room.ledger
        try:
            with ledger.reading(ticket, self._room.limits.cancel_grace_s):
                await self._send(AcceptedFrame(frame_id, ticket.id, ticket.model.model_id, ticket.facts.seed))
                async with aclosing(follow(ledger, ticket, start)) as parts:
                    async for part in parts:
                        if isinstance(part, Chunk):
                            await self._send(TokensFrame(frame_id, part.index, part.text, part.token_ids))
                        else:
                            del self._tickets[frame_id]
                            await self._send(_done(frame_id, part))
        except ClientGone:
            pass  # run() learns it from the socket
        except Exception as error:
            self._tickets.pop(frame_id, None)
            with suppress(ClientGone):
                await self._send_error(problem_of(error, self._request_id).error, frame_id)

    async def _send_error(self, error: MillraceError, frame_id: str | None) -> None:
        self._room.telemetry.refused(error.code)
        await self._send(error_frame(error, frame_id))

    async def _send(self, frame: AcceptedFrame | TokensFrame | DoneFrame | ErrorFrame) -> None:
        await self._put({"type": "websocket.send", "text": _json.encode(frame).decode()})

    async def _put(self, message: Message) -> None:
        try:
            await self._outlet.send(message)
        except (WebSocketDisconnect, RuntimeError) as error:
            # Messages go out in the order ASGI wants, so a RuntimeError says that the server has closed the socket.
            raise ClientGone("disconnected") from error


def _done(frame_id: str, end: End) -> DoneFrame:
    return DoneFrame(frame_id, end.text, end.finish_reason, end.usage, end.timings, end.seed)


def add_socket_route(app: FastAPI, room: Room) -> None:
    @app.websocket("/generate/stream")
    async def generate_stream(websocket: WebSocket) -> None:
        await Conversation(room, websocket).run()
