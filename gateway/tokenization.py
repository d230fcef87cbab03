"""POST /tokenize and /detokenize: the model's tokenizer, as the server uses it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import DetokenizeAnswer, TokenizeAnswer
from gateway.generate import LeanRoute, read_object
from gateway.openapi import body_of, error_responses, json_answer
from gateway.probes import json_response
from gateway.prompts import check_ids
from gateway.room import Room
from gateway.schemas import DetokenizeBody, TokenizeBody, parse


def tokenize_routes(room: Room) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=error_responses(), route_class=LeanRoute)

    @router.post(
        "/tokenize",
        summary="The token ids of a prompt or a conversation",
        responses={200: json_answer(TokenizeAnswer)},
        openapi_extra=body_of(TokenizeBody),
    )
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await read_object(request))
        model = room.models.resolve(body.model)
        ids = await room.prompts.ids(body, model)
        return json_response(TokenizeAnswer(model.model_id, ids, len(ids), model.max_model_len))

    @router.post(
        "/detokenize",
        summary="The text of token ids",
        responses={200: json_answer(DetokenizeAnswer)},
        openapi_extra=body_of(DetokenizeBody),
    )
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_object(request))
        model = room.models.resolve(body.model)
        check_ids(body.token_ids, "token_ids", model)
        ids = body.token_ids
        text = await room.prompts.apart(len(ids), lambda: model.tokenizer.decode(ids, skip_special_tokens=False))
        return json_response(DetokenizeAnswer(model.model_id, text))

    return router
