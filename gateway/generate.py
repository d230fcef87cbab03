"""POST /generate and what belongs to a request afterwards: resume its stream, see its state, cancel it."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import FastAPI, Header, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import Answer, Cancelled, RequestState
from gateway.delivery import EventStream, WholeAnswer
from gateway.lean import add_lean_route, read_object
from gateway.openapi import error_responses, json_answer, stream_answer
from gateway.probes import json_response
from gateway.room import Room
from gateway.schemas import GenerateBody, parse
from wire.errors import BadRequest

MAX_INDEX: Final = 2**31
TAG: Final = "generate"

RequestId = Annotated[str, Path(min_length=1, max_length=128)]


def add_generate_routes(app: FastAPI, room: Room) -> None:
    async def generate(request: Request) -> Response:
        if "idempotency-key" in request.headers:
            raise BadRequest("Idempotency-Key is not supported yet", param="Idempotency-Key")
        body = parse(GenerateBody, await read_object(request))
        ticket = await room.take_in(body)
        if body.stream:
            return EventStream(room.ledger, ticket, room.limits, room.telemetry)
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
        request_id: RequestId,
        start: Annotated[int, Query(alias="from", ge=0, lt=MAX_INDEX, description="First token wanted.")] = 0,
        last_event_id: Annotated[int | None, Header(ge=0, lt=MAX_INDEX, description="Last token seen.")] = None,
    ) -> Response:
        # A browser reconnects to the same URL and says in the header how far it got: the header is newer.
        first = start if last_event_id is None else last_event_id + 1
        return EventStream(room.ledger, room.ledger.find(request_id), room.limits, room.telemetry, first)

    @app.get(
        "/requests/{request_id}",
        summary="How a request is doing",
        tags=[TAG],
        response_class=Response,
        responses={200: json_answer(RequestState), **error_responses()},
    )
    async def state(request_id: RequestId) -> Response:
        return json_response(room.ledger.state(room.ledger.find(request_id)))

    @app.delete(
        "/requests/{request_id}",
        summary="Cancel a request",
        tags=[TAG],
        status_code=202,
        response_class=Response,
        responses={202: json_answer(Cancelled), **error_responses()},
    )
    async def cancel(request_id: RequestId) -> Response:
        await room.ledger.queue.cancel(request_id)  # also one that another gateway took in
        return json_response(Cancelled(request_id), status_code=202)
