"""What clients get: chunks, the end of a stream, the whole answer, and the frames of a socket.

msgspec structs, because one is encoded for every token. Field names and meanings are the API's.
"""

from __future__ import annotations

import msgspec

from wire.messages import FinishReason, Usage


class Timings(msgspec.Struct, frozen=True):
    """Where the time went, in ms: the first three as the worker saw them, the last two as this gateway did."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float | None  # arrival -> first token; null if there was none
    total_ms: float


class Chunk(msgspec.Struct, frozen=True):
    """Some tokens of a completion and the text they complete. `index` is the first token's."""

    index: int
    text: str
    token_ids: list[int]


class End(msgspec.Struct, frozen=True):
    """The last part of every completion. `text` was held back until it was sure that nothing follows."""

    index: int
    text: str
    token_ids: list[int]  # always empty: one shape for all parts
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int


class Answer(msgspec.Struct, frozen=True):
    """A whole completion."""

    id: str
    model: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int


class RequestState(msgspec.Struct, frozen=True):
    """GET /requests/{id}: as the queue knows it."""

    id: str
    model: str
    status: str  # "queued", "running", "finished" or "failed"
    completion_tokens: int
    finish_reason: str | None  # an error's code if it failed
    answer: Answer | None  # once it has finished


class Cancelled(msgspec.Struct, frozen=True):
    """DELETE /requests/{id}: the queue has been told."""

    id: str


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """POST /tokenize."""

    model: str
    token_ids: list[int]
    num_tokens: int
    max_model_len: int


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """POST /detokenize."""

    model: str
    text: str


class Version(msgspec.Struct, frozen=True):
    """GET /version."""

    name: str
    version: str
    wire_version: int
    models: list[str]


class Status(msgspec.Struct, frozen=True):
    """GET /livez and /readyz, when all is well."""

    status: str


class AcceptedFrame(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is in the queue. `stream` names it everywhere: GET /streams/{stream}, a resume frame."""

    id: str
    stream: str
    model: str
    seed: int


class TokensFrame(msgspec.Struct, frozen=True, tag="tokens"):
    """A chunk, on a socket."""

    id: str
    index: int
    text: str
    token_ids: list[int]


class DoneFrame(msgspec.Struct, frozen=True, tag="done"):
    """The end, on a socket. `text` as in End."""

    id: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int


class ErrorFrame(msgspec.Struct, frozen=True, tag="error", omit_defaults=True):
    """A request's end as an error if `id` names it, else an answer to a frame that made no sense."""

    code: str
    message: str
    retryable: bool
    id: str | None = None
    param: str | None = None
    retry_after_s: float | None = None


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """The inside of an error."""

    code: str
    message: str
    retryable: bool
    request_id: str
    param: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every error over HTTP."""

    error: ErrorDetail
