"""Errors to answers: the one table from exceptions to HTTP.

Whatever goes wrong, a client gets {"error": {code, message, param?, retryable, request_id}}. Exception text never
leaves: an exception that is not ours becomes `internal`, and its traceback goes to the log under the request id.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import ErrorAnswer, ErrorDetail, ErrorFrame
from gateway.schemas import field_path
from gateway.telemetry import Telemetry
from wire.errors import BadRequest, Internal, MillraceError, NotFound, QueueFull, RequestTooLarge, Unavailable

logger = logging.getLogger(__name__)

REQUEST_ID: Final = "millrace.request_id"  # in the ASGI scope
DEFAULT_RETRY_AFTER_S: Final = 1.0

# What the framework raises by itself, by status.
_FRAMEWORK: Final[Mapping[int, tuple[type[MillraceError], str]]] = {
    404: (NotFound, "no such route"),
    405: (BadRequest, "this route does not answer that method"),
    413: (RequestTooLarge, "the body is too large"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it."""

    error: MillraceError
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


def problem_of(error: Exception, request_id: str) -> Problem:
    """What to answer for `error`; logs those that are not ours."""
    match error:
        case MillraceError():
            return Problem(error, error.http_status, _retry_after(error))
        case RequestValidationError():
            return _validation_problem(error)
        case HTTPException():
            return _framework_problem(error)
    logger.error("unexpected error", exc_info=error, extra={"request_id": request_id})
    return Problem(internal(), Internal.http_status)


def internal() -> Internal:
    return Internal("something went wrong on our side; the log has it under this request id")


def _retry_after(error: MillraceError) -> Mapping[str, str]:
    if not isinstance(error, QueueFull | Unavailable):
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S)))}


def _validation_problem(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    param = field_path(tuple(first["loc"][1:]))  # without "body", "query", "path"
    return Problem(BadRequest(f"{param}: {first['msg']}", param=param), BadRequest.http_status)


def _framework_problem(error: HTTPException) -> Problem:
    kind, message = _FRAMEWORK.get(error.status_code, (BadRequest, "the request cannot be answered"))
    if error.status_code >= 500:
        kind, message = Internal, "the request cannot be answered"
    return Problem(kind(message), error.status_code, error.headers or {})


def error_response(error: Exception, request_id: str, telemetry: Telemetry) -> Response:
    """The HTTP answer for any exception."""
    problem = problem_of(error, request_id)
    telemetry.refused(problem.error.code)
    return Response(
        msgspec.json.encode(ErrorAnswer(error_detail(problem.error, request_id))),
        status_code=problem.status,
        headers=dict(problem.headers),
        media_type="application/json",
    )


def error_detail(error: MillraceError, request_id: str) -> ErrorDetail:
    return ErrorDetail(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        request_id=request_id,
        param=error.param,
    )


def error_frame(error: MillraceError, frame_id: str | None) -> ErrorFrame:
    """The same on a socket."""
    return ErrorFrame(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        id=frame_id,
        param=error.param,
        retry_after_s=error.retry_after_s,
    )


def exception_handler(telemetry: Telemetry) -> Callable[[Request, Exception], Awaitable[Response]]:
    """FastAPI's exception handler, one for every class."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(error, request.scope[REQUEST_ID], telemetry)

    return answer
