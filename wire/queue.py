"""The queue's contract: what gateways and workers may rely on, whoever implements it.

Promise: once `submit` has returned, the request reaches exactly one terminal event; each token index is appended once and
delivered in order. Implementations: services/queues/memory.py (one process), services/queues/redis.py (many). Both pass
tests/contracts/test_queue.py.

Leases fence: `lease` hands a request to one worker with a new `epoch`; an append that carries another epoch is refused with
FENCED and changes nothing. A lease that is not renewed (publishing renews) lapses, and the request is handed out again with
the tokens logged so far, so that the next worker continues at the next index. After `max_deliveries` the request ends as
Failed(worker_lost).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from wire.messages import Event, Generate


@dataclass(frozen=True, slots=True)
class LeaseBudget:
    """What a worker can take now; `lease` returns only requests that fit, oldest first within a priority."""

    worker_id: str
    models: tuple[str, ...]
    max_requests: int
    max_tokens: int  # sum of max_total_tokens of the leased requests (their KV, in tokens)
    capacity_tokens: int  # a request larger than this can never fit: it is handed out all the same, to be refused in words


@dataclass(frozen=True, slots=True)
class Lease:
    """One request, ours until the lease lapses. `token_ids` are already in the log: continue after them."""

    request: Generate
    epoch: int
    token_ids: tuple[int, ...]
    delivery: int  # 1 = first


@dataclass(frozen=True, slots=True)
class Append:
    """One event of a leased request, under the epoch of its lease."""

    epoch: int
    event: Event


class RefusalReason(Enum):
    """Why an append or a renewal was refused; the worker drops the sequence in every case."""

    FENCED = "fenced"  # another epoch owns the request, or it has already ended
    CANCELLED = "cancelled"  # the client cancelled; the worker answers with Finished("cancelled")
    EXPIRED = "expired"  # its deadline has passed; the queue has already published Failed(deadline_exceeded)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to one refused append or renewal."""

    request_id: str
    reason: RefusalReason


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits and what runs, in requests and in tokens (prompt + max_tokens)."""

    queued_requests: int
    queued_tokens: int
    running_requests: int
    running_tokens: int


class Queue(Protocol):
    """Requests in, events out, each exactly once."""

    async def submit(self, request: Generate) -> None:
        """Accept the request. Idempotent by request id; raises Conflict for another body, QueueFull over the cap."""
        ...

    async def cancel(self, request_id: str) -> None:
        """Ask that the request stops. Waiting: it ends at once. Running: its worker learns at its next append or renewal.

        Cancelling what has ended is not an error; raises UnknownRequest for an id never seen or expired.
        """
        ...

    def events(self, request_id: str, start: int = 0) -> AsyncIterator[Event]:
        """Replay from token index `start`, then follow; ends after the terminal event. Any number of readers.

        The first Tokens event starts exactly at `start` (a longer logged event is cut). Raises UnknownRequest.
        """
        ...

    async def lease(self, budget: LeaseBudget, wait_s: float = 0.0) -> list[Lease]:
        """Take what fits. Waits up to `wait_s` for the first request when there is none (no polling)."""
        ...

    async def publish(self, appends: Sequence[Append]) -> list[Refusal]:
        """Log these events, one write for all; duplicates (indices already logged under this epoch) are dropped.

        Every accepted append renews its lease. A terminal event ends the request. A cancelled request's Tokens are
        refused with CANCELLED (its Finished is accepted). A gap in indices raises ValueError: this is a bug.
        """
        ...

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[Refusal]:
        """Keep (request_id, epoch) leases alive through steps that emit nothing (prefill)."""
        ...

    async def release(self, leases: Sequence[tuple[str, int]]) -> None:
        """Hand requests back at once, without counting the delivery (drain)."""
        ...

    async def depth(self, model: str | None = None) -> Depth:
        """Outstanding work, of one model or of all."""
        ...

    async def close(self) -> None:
        """End all readers and waiters; nothing may be called afterwards."""
        ...
