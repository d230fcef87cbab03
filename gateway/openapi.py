"""The OpenAPI document: what FastAPI cannot see because bodies are parsed and answers encoded by our own hands.

Bodies are pydantic models and answers msgspec structs; both know their JSON schema, so nothing is described twice.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway import answers
from gateway.keys import OPEN_PATHS
from gateway.schemas import DetokenizeBody, GenerateBody, TokenizeBody

_REF: Final = "#/components/schemas/"
_BODIES: Final = (GenerateBody, TokenizeBody, DetokenizeBody)
_ANSWERS: Final = (
    answers.Answer,
    answers.Chunk,
    answers.End,
    answers.RequestState,
    answers.Cancelled,
    answers.TokenizeAnswer,
    answers.DetokenizeAnswer,
    answers.ErrorAnswer,
    answers.Status,
    answers.Version,
)

# FastAPI's types for these are dicts of Any: it is JSON.
Json = dict[str, Any]


def _ref(schema: type[BaseModel] | type[msgspec.Struct]) -> Json:
    return {"schema": {"$ref": _REF + schema.__name__}}


def body_of(schema: type[BaseModel]) -> Json:
    """openapi_extra of a route whose body is `schema`."""
    return {"requestBody": {"required": True, "content": {"application/json": _ref(schema)}}}


def json_answer(answer: type[msgspec.Struct]) -> Json:
    """A response that is one JSON object."""
    return {"description": "The answer.", "content": {"application/json": _ref(answer)}}


def stream_answer(instead_of: type[msgspec.Struct] | None = None) -> Json:
    """A response that is a stream of Chunk events and one End; `instead_of` when a request chooses between both."""
    content: Json = {"text/event-stream": {"schema": {"type": "string"}}}
    if instead_of is not None:
        content["application/json"] = _ref(instead_of)
    return {"description": "The answer, or a stream of Chunk events that ends with an End.", "content": content}


def error_responses() -> dict[int | str, Json]:
    """Every route's errors: one shape."""
    error = {"content": {"application/json": _ref(answers.ErrorAnswer)}}
    return {"4XX": {"description": "The client's mistake.", **error}, "5XX": {"description": "Ours.", **error}}


def describe(app: FastAPI, *, needs_key: bool) -> Json:
    """The whole document."""
    document: Json = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF + "{model}")
    _, structs = msgspec.json.schema_components(_ANSWERS, ref_template=_REF + "{name}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= bodies.get("$defs", {})
    schemas |= structs
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
    return document
