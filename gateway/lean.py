"""The short way through FastAPI for routes with a body: one read, one parse, one validation.

Apart from the routes because /generate and the tokenizer routes share it. FastAPI's own way parses the body leniently
(NaN, a key twice) and solves dependencies that these routes do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from gateway.json_body import decode_object
from gateway.openapi import Json, body_of, error_responses
from wire.errors import BadRequest

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


class LeanRoute(APIRoute):
    """A route whose endpoint takes the Request as it is (FastAPI's own extension point)."""

    def get_route_handler(self) -> Endpoint:
        endpoint: Endpoint = self.endpoint
        return endpoint


def add_lean_route(
    app: FastAPI, path: str, endpoint: Endpoint, *, body: type[BaseModel], answer: Json, summary: str, tag: str
) -> None:
    """POST `path`, described in the OpenAPI document by the schema of its body and its answer.

    On the app itself: every router that is included is one more step of routing for every request.
    """
    app.router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        summary=summary,
        tags=[tag],
        responses={200: answer, **error_responses()},
        response_class=Response,
        openapi_extra=body_of(body),
        route_class_override=LeanRoute,
    )


async def read_object(request: Request) -> dict[str, object]:
    """The JSON object in a request's body. Raises BadRequest.

    The content type must say JSON: other types are what a web page can send to any host without asking first.
    """
    content_type = request.headers.get("content-type", "")
    if content_type != "application/json" and content_type.partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("Content-Type must be application/json", param="Content-Type")
    return decode_object(await request.body())
