"""Every error a client or another process can meet, as one tree.

MillraceError
├── BadRequest               400  a field is missing, malformed, out of bounds or not supported
│   ├── ContextLengthExceeded 413  prompt + max_tokens do not fit the model's context
│   └── RequestTooLarge       413  the request can never fit this server's KV pool, or the body is too large
├── Unauthorized             401  no key, or one that is not known here
├── Forbidden                403  a key that is known and may no longer be used
├── NotFound                 404
│   ├── UnknownModel          404
│   └── UnknownRequest        404
├── Conflict                 409  the same request id with another body
├── QueueFull                429  retryable; carries retry_after_s
├── Unavailable              503  retryable; no worker, draining, not ready
├── DeadlineExceeded         504  the deadline passed before the answer was whole
├── WorkerLost               500  retryable; deliveries used up
└── Internal                 500  a bug of ours; the message never carries exception text

Apart from everything so that gateway, batcher, queue and model store can raise the same words without knowing each
other. `error_from_code` turns the code that travelled in a `Failed` message back into its class; what travels is a
class of this file.
"""

from __future__ import annotations

from typing import ClassVar, Final


class MillraceError(Exception):
    """Base of all: `code` travels on the wire, `http_status` and `retryable` say what a client should do."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(MillraceError):
    """A field is missing, malformed, out of bounds or not supported; `param` names it."""

    code = "bad_request"
    http_status = 400


class ContextLengthExceeded(BadRequest):
    """Prompt plus requested tokens exceed the model's context."""

    code = "context_length_exceeded"
    http_status = 413


class RequestTooLarge(BadRequest):
    """The request can never fit this server: its KV pool, or the size of a body."""

    code = "request_too_large"
    http_status = 413


class Unauthorized(MillraceError):
    """No key came, or one that this server does not know."""

    code = "unauthorized"
    http_status = 401


class Forbidden(MillraceError):
    """The key is known and may no longer be used: it has expired or was revoked."""

    code = "forbidden"
    http_status = 403


class NotFound(MillraceError):
    """The named thing does not exist."""

    code = "not_found"
    http_status = 404


class UnknownModel(NotFound):
    """No such model is served here."""

    code = "unknown_model"


class UnknownRequest(NotFound):
    """No such request, or its log has expired."""

    code = "unknown_request"


class Conflict(MillraceError):
    """The request id is taken by a request with another body."""

    code = "conflict"
    http_status = 409


class QueueFull(MillraceError):
    """The queue holds its cap of tokens, waiting and running; come back after `retry_after_s`.

    `room_tokens`: what would have fitted; `cap_tokens`: what fits at all.
    """

    code = "queue_full"
    http_status = 429
    retryable = True

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.taken_tokens = 0
        self.cap_tokens = 0
        self._is_tenant = False

    @property
    def room_tokens(self) -> int:
        return max(0, self.cap_tokens - self.taken_tokens)

    @classmethod
    def of(cls, tokens: int, taken: int, cap: int, wait_s: float | None, *, is_tenant: bool) -> QueueFull:
        """The refusal of a request of `tokens`; `is_tenant`: by its tenant's part of the queue."""
        what = "this tenant's part of the queue is full" if is_tenant else "the queue is full"
        numbers = f"{taken:,} of {cap:,} tokens are taken, the request needs {tokens:,}"
        error = cls(f"{what}: {numbers}", retry_after_s=wait_s)
        error.taken_tokens, error.cap_tokens, error._is_tenant = taken, cap, is_tenant
        return error

    def again(self, tokens: int) -> QueueFull:
        """The same refusal, of another request."""
        return self.of(tokens, self.taken_tokens, self.cap_tokens, self.retry_after_s, is_tenant=self._is_tenant)


class Unavailable(MillraceError):
    """Nobody can serve this now: no worker, draining, or not ready yet."""

    code = "unavailable"
    http_status = 503
    retryable = True


class DeadlineExceeded(MillraceError):
    """The request's deadline passed before its answer was whole."""

    code = "deadline_exceeded"
    http_status = 504


class WorkerLost(MillraceError):
    """The request was delivered as often as allowed and every worker failed on it."""

    code = "worker_lost"
    retryable = True


class Internal(MillraceError):
    """A bug of ours. Details are in the log under the request id, never in the message."""

    code = "internal"


def _tree(cls: type[MillraceError]) -> list[type[MillraceError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {cls.code: cls for cls in _tree(MillraceError)[1:]}
CODES: Final = tuple(sorted(_BY_CODE))


def error_from_code(code: str) -> type[MillraceError]:
    """The class that `code` names; an unknown code is an Internal (a newer peer may know more than we do)."""
    return _BY_CODE.get(code, Internal)
