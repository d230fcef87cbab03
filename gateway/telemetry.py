"""What the gateway tells whoever measures it: a protocol owned by this side, with an implementation that does
nothing.

The composition root passes one that feeds its metrics. All methods are called on the event loop and must return at
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Completed:
    """One request, ended: what a log line and every latency histogram need. Times in seconds since it arrived."""

    id: str  # of the request: for logs, never a label
    model: str
    finish_reason: str  # "stop", "length", "cancelled", or the code of an error
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft_s: float | None  # arrival (before tokenizing) -> first token seen here; None if there was none
    total_s: float
    queue_s: float | None  # as the worker saw them; None if it never said
    prefill_s: float | None
    decode_s: float | None
    preemptions: int
    tenant: str = ""
    trace_id: str = ""  # 32 hex digits; empty unless it is part of a sampled trace


class Telemetry(Protocol):
    """Hooks. `model` is a served model's id; `route` and `method` are known ones or "other": all bounded."""

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered, or its client left (status 499); a stream counts when it ends."""
        ...

    def refused(self, code: str) -> None:
        """A request, frame or stream got an error with this code."""
        ...

    def admitted(self, model: str, tenant: str, prompt_tokens: int, max_tokens: int) -> None:
        """The queue has accepted a request."""
        ...

    def first_token(self, model: str, seconds: float, trace_id: str) -> None:
        """Time from arrival to the first token. `trace_id`: as in Completed."""
        ...

    def tokens(self, model: str, count: int, seconds: float) -> None:
        """`count` tokens arrived, `seconds` after those before them (0 for the first). Each token is counted once."""
        ...

    def completed(self, completed: Completed) -> None:
        """A request has ended, one way or another; once for each admitted request."""
        ...

    def resumed(self) -> None:
        """A stream is read again, from some token: one taken in here or at another gateway."""
        ...

    def sockets(self, change: int) -> None:
        """A WebSocket was opened (+1) or closed (-1)."""
        ...


class NoTelemetry:
    """Measures nothing."""

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None: ...

    def refused(self, code: str) -> None: ...

    def admitted(self, model: str, tenant: str, prompt_tokens: int, max_tokens: int) -> None: ...

    def first_token(self, model: str, seconds: float, trace_id: str) -> None: ...

    def tokens(self, model: str, count: int, seconds: float) -> None: ...

    def completed(self, completed: Completed) -> None: ...

    def resumed(self) -> None: ...

    def sockets(self, change: int) -> None: ...
