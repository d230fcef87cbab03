"""POST /tokenize and /detokenize: the model's tokenizer, as the server uses it."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import DetokenizeAnswer, TokenizeAnswer
from gateway.lean import add_lean_route, read_object
from gateway.openapi import json_answer
from gateway.probes import json_response
from gateway.prompts import check_ids
from gateway.room import Room
from gateway.schemas import DetokenizeBody, TokenizeBody, parse

TAG: Final = "tokens"


def add_tokenizer_routes(app: FastAPI, room: Room) -> None:
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await read_object(request))
        model = room.models.resolve(body.model)
        ids = await room.prompts.ids(body, model)
        return json_response(TokenizeAnswer(model.model_id, ids, len(ids), model.max_model_len))

    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_object(request))
        model = room.models.resolve(body.model)
        check_ids(body.token_ids, "token_ids", model)
        ids = body.token_ids
        text = await room.prompts.apart(len(ids), lambda: model.tokenizer.decode(ids, skip_special_tokens=False))
        return json_response(DetokenizeAnswer(model.model_id, text))

    add_lean_route(
        app,
        "/tokenize",
        tokenize,
        body=TokenizeBody,
        answer=json_answer(TokenizeAnswer),
        summary="The token ids of a prompt or a conversation",
        tag=TAG,
    )
    add_lean_route(
        app,
        "/detokenize",
        detokenize,
        body=DetokenizeBody,
        answer=json_answer(DetokenizeAnswer),
        summary="The text of token ids",
        tag=TAG,
    )
