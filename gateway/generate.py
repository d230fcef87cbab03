"""POST /generate and what belongs to a request afterwards: resume its stream, see its state, cancel it."""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Annotated, Final

from fastapi import FastAPI, Header, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import Answer, Cancelled, RequestState
from gateway.caller import caller_of
from gateway.completion import fold, follow
from gateway.delivery import GENERATION_ID, EventStream, WholeAnswer
from gateway.lean import add_lean_route, read_object
from gateway.openapi import error_responses, json_answer, stream_answer
from gateway.probes import json_response
from gateway.room import Room
from gateway.schemas import GenerateBody, parse
from wire.errors import BadRequest
from wire.messages import Failed
from wire.queue import Standing, Status

MAX_INDEX: Final = 2**31
MAX_KEY_CHARS: Final = 255
_KEY: Final = re.compile(rf"[!-~]{{1,{MAX_KEY_CHARS}}}")
TAG: Final = "generate"

RequestId = Annotated[str, Path(min_length=1, max_length=128)]


def add_generate_routes(app: FastAPI, room: Room) -> None:
    async def generate(request: Request) -> Response:
        key = _idempotency_key(request)
        body = parse(GenerateBody, await read_object(request))
        ticket = await room.take_in(body, caller_of(request.scope), key)
        if body.stream:
            return EventStream(room.ledger, ticket, room.limits, room.telemetry)
        if body.background:
            state = RequestState(ticket.id, ticket.model.model_id, "queued", 0, None, None)
            return json_response(state, status_code=202, headers={GENERATION_ID: ticket.id})
        return WholeAnswer(room.ledger, ticket, room.limits)

    add_lean_route(
        app,
        "/generate",
        generate,
        body=GenerateBody,
        answer=stream_answer(instead_of=Answer),
        summary="Complete a prompt or a conversation",
        tag=TAG,
    )

    @app.get(
        "/streams/{request_id}",
        summary="Read a stream again from any token",
        tags=[TAG],
        response_class=Response,
        responses={200: stream_answer(), **error_responses()},
    )
    async def resume(
        request: Request,
        request_id: RequestId,
        start: Annotated[int, Query(alias="from", ge=0, lt=MAX_INDEX, description="First token wanted.")] = 0,
        last_event_id: Annotated[int | None, Header(ge=0, lt=MAX_INDEX, description="Last token seen.")] = None,
    ) -> Response:
        # A browser reconnects to the same URL and says in the header how far it got: the header is newer.
        first = start if last_event_id is None else last_event_id + 1
        ticket = await room.ledger.find(request_id, caller_of(request.scope))
        return EventStream(room.ledger, ticket, room.limits, room.telemetry, first)

    @app.get(
        "/requests/{request_id}",
        summary="How a request is doing",
        tags=[TAG],
        response_class=Response,
        responses={200: json_answer(RequestState), **error_responses()},
    )
    async def state(request: Request, request_id: RequestId) -> Response:
        standing = await room.ledger.standing(request_id, caller_of(request.scope))
        return json_response(await _state(room, request_id, standing))

    @app.delete(
        "/requests/{request_id}",
        summary="Cancel a request",
        tags=[TAG],
        status_code=202,
        response_class=Response,
        responses={202: json_answer(Cancelled), **error_responses()},
    )
    async def cancel(request: Request, request_id: RequestId) -> Response:
        await room.ledger.standing(request_id, caller_of(request.scope))  # is it theirs?
        await room.ledger.queue.cancel(request_id)
        return json_response(Cancelled(request_id), status_code=202)


async def _state(room: Room, request_id: str, standing: Standing) -> RequestState:
    """In the gateway's words: an answer may end earlier than its log, at a stop string."""
    model_id, terminal = standing.facts.model, standing.terminal
    if terminal is None:
        status = {Status.WAITING: "queued", Status.RUNNING: "running"}[standing.status]
        return RequestState(request_id, model_id, status, standing.num_tokens, None, None)
    if isinstance(terminal, Failed):
        return RequestState(request_id, model_id, "failed", standing.num_tokens, terminal.code, None)
    ticket = room.ledger.ticket_for(request_id, standing)
    async with aclosing(follow(room.ledger, ticket)) as parts:
        answer = await fold(ticket, parts)
    tokens = answer.usage.completion_tokens
    return RequestState(request_id, model_id, "finished", tokens, answer.finish_reason, answer)


def _idempotency_key(request: Request) -> str | None:
    """Raises BadRequest if it is empty, too long, not plain or given twice."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        what = f"one value of 1 to {MAX_KEY_CHARS} visible ASCII characters"
        raise BadRequest(f"Idempotency-Key must be {what}", param="Idempotency-Key")
    return given[0]
