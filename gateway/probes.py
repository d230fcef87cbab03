"""GET /livez, /readyz, /version: what an orchestrator asks.

Liveness and readiness are facts of the whole process, so the composition root answers them through `Health`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from gateway.answers import Status, Version
from gateway.models import Models
from gateway.openapi import error_responses, json_answer
from wire.errors import Unavailable
from wire.messages import WIRE_VERSION

Endpoint = Callable[[], Coroutine[None, None, Response]]


@dataclass(frozen=True, slots=True)
class Health:
    """How the process is. `reason` says what is wrong, in words for an operator."""

    is_live: bool  # steps commit, or nothing waits
    is_ready: bool  # model loaded, queue reachable, not draining
    is_draining: bool = False  # new requests are refused, those inside go on
    reason: str = ""


def json_response(answer: msgspec.Struct, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), status_code, headers, "application/json")


def add_probe_routes(app: FastAPI, health: Callable[[], Health], models: Models, version: str) -> None:
    about = Version("millrace", version, WIRE_VERSION, [model.model_id for model in models.served])

    def probe(path: str, summary: str, answer: type[msgspec.Struct]) -> Callable[[Endpoint], Endpoint]:
        responses = {200: json_answer(answer), **error_responses()}
        return app.get(path, summary=summary, tags=["operations"], response_class=Response, responses=responses)

    @probe("/livez", "Is the process making progress?", Status)
    async def livez() -> Response:
        if not (now := health()).is_live:
            raise Unavailable(now.reason or "not live")
        return json_response(Status("live"))

    @probe("/readyz", "May requests be sent here?", Status)
    async def readyz() -> Response:
        if not (now := health()).is_ready:
            raise Unavailable(now.reason or "not ready")
        return json_response(Status("ready"))

    @probe("/version", "What is running", Version)
    async def read_version() -> Response:
        return json_response(about)
