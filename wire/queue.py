"""The queue's contract: what gateways and workers may rely on, whoever implements it.

Promise: once `submit` has returned, the request reaches exactly one terminal event; each token index is appended once
and delivered in order. Implementations: services/queues/memory.py (one process), services/queues/redis.py (many). Both
pass the suites tests/contracts/test_queue*.py.

Leases fence: `lease` hands a request to one worker with a new `epoch`; an append that carries another epoch is refused
with FENCED and changes nothing. A lease that is not renewed (publishing renews) lapses, and the request is handed out
again with the tokens logged so far, so that the next worker continues at the next index. Until somebody takes it over,
an owner that was merely late has its lease back with its next append or renewal. When the lease of delivery
`max_deliveries` lapses, the request ends as Failed(worker_lost); a delivery that logs a token counts as the first
again: what makes progress is not what kills its workers. A request that passes its deadline, waiting or running, ends
as Failed(deadline_exceeded).

A call whose reply was lost may be repeated: what has been done already is recognised and not done twice. An epoch is
never given out twice, not even to a later request of the same id.

Order: priority 1 first; within a priority tenants share by weight, in tokens (start-time fair queueing: Goyal, Vin and
Cheng, 1996); within a tenant oldest first. A request that has lost `max_deliveries` - 1 workers is a *suspect*: they
died, perhaps of it. A worker holds one suspect at a time, so what kills a worker for the last time takes no other
suspect with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from wire.messages import Event, Facts, Failed, Finished, Generate, WorkerReport


@dataclass(frozen=True, slots=True)
class LeaseBudget:
    """What a worker can take now; `lease` returns only requests that fit, in the queue's order.

    A request that fits into capacity_tokens but not into max_tokens now may be overtaken by younger ones that fit, a
    bounded number of times; then it blocks the line for this worker until it fits. So an idle worker's max_tokens must
    not be less than its capacity_tokens.
    """

    worker_id: str
    models: tuple[str, ...]
    max_requests: int
    max_tokens: int  # sum of max_total_tokens of the leased requests (their KV, in tokens)
    # A request larger than this can never fit: it is handed out all the same, to be refused in words. It takes one of
    # max_requests and nothing of max_tokens.
    capacity_tokens: int
    takes_suspect: bool = True  # False: the worker holds one


@dataclass(frozen=True, slots=True)
class Lease:
    """One request, ours until the lease lapses. `token_ids` are already in the log: continue after them."""

    request: Generate
    epoch: int
    token_ids: tuple[int, ...]
    delivery: int  # 1 = first
    is_suspect: bool = False  # so many workers have died with it


@dataclass(frozen=True, slots=True)
class Append:
    """One event of a leased request, under the epoch of its lease."""

    epoch: int
    event: Event


class RefusalReason(Enum):
    """Why an append or a renewal was refused; the worker drops the sequence in every case."""

    FENCED = "fenced"  # another epoch owns the request, or it has already ended, or it is unknown
    CANCELLED = "cancelled"  # the client cancelled; the worker answers with Finished("cancelled")
    EXPIRED = "expired"  # its deadline has passed; the queue has already published Failed(deadline_exceeded)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to one refused append or renewal."""

    request_id: str
    reason: RefusalReason
    epoch: int  # that was refused: who has leased the request again must not drop the new lease for the old one


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits and what runs, in requests and in tokens (prompt + max_tokens)."""

    queued_requests: int
    queued_tokens: int
    running_requests: int
    running_tokens: int
    oldest_ms: int = 0  # how long the one that waits longest has waited, since it came or came back; 0 = nobody waits
    dead_letters: int = 0  # given up after the last delivery, since the queue was created


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Standing:
    """A request as the queue knows it."""

    facts: Facts
    status: Status
    num_tokens: int  # in the log
    terminal: Finished | Failed | None


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker's last report, and how long ago it came."""

    report: WorkerReport
    age_ms: int


class Queue(Protocol):
    """Requests in, events out, each exactly once."""

    async def submit(self, request: Generate) -> bool:
        """Accept the request; whether it is new. Idempotent by id: the same body attaches, while the log is kept.

        Raises Conflict for another body, QueueFull (with retry_after_s from the measured rate) over the cap of tokens
        that wait or run (of all, or of its tenant), RequestTooLarge if it exceeds the whole cap, BadRequest if it
        cannot travel, and, of a queue that refuses what nobody serves, Unavailable.
        """
        ...

    async def standing(self, request_id: str) -> Standing:
        """What is known of a request, while there is a log. Raises UnknownRequest."""
        ...

    async def cancel(self, request_id: str) -> None:
        """Ask that the request stops. Waiting: ends at once. Running: its worker learns at its next append or renewal.

        It ends as Finished("cancelled") with the usage of what was logged. Cancelling what has ended is not an error;
        raises UnknownRequest for an id never seen or expired.
        """
        ...

    async def abandon(self, request_id: str) -> None:
        """Cancel for lack of readers: done unless it is a background request, or another gateway reads it.

        A gateway that dies abandons what it read, after a time in which another may take over. Not an error for an
        unknown id.
        """
        ...

    def events(self, request_id: str, start: int = 0) -> AsyncIterator[Event]:
        """Replay from token index `start`, then follow; ends after the terminal event. Any number of readers.

        The first Tokens event starts exactly at `start`. Logged events may come cut or joined: indices are the truth,
        and a reader that has fallen behind gets more tokens an event, not more events. A start beyond the end of a
        finished log yields the terminal alone. When iterated: raises UnknownRequest, BadRequest for a negative start,
        and Unavailable if the queue is closed before the terminal.
        """
        ...

    async def lease(self, budget: LeaseBudget, wait_s: float = 0.0, until: asyncio.Event | None = None) -> list[Lease]:
        """Take what fits. Waits up to `wait_s` for the first request that does when there is none (no polling).

        `until`: when it is set the wait is over: the caller's budget is another.
        """
        ...

    async def publish(self, appends: Sequence[Append]) -> list[Refusal]:
        """Log these events, one write for all; duplicates (indices or a terminal already logged) are dropped.

        Every accepted append renews its lease. A terminal event ends the request. A cancelled request's Tokens are
        refused with CANCELLED; its Finished is accepted, and logged as "cancelled" with the usage of what was logged.
        Raises ValueError, having logged nothing, for what only a bug can send: an event that cannot travel, a gap in
        indices, a Finished whose usage.completion_tokens is not what the log holds. Where the log may lose its end (a
        failover, a power cut) the last two are no bug: the append is FENCED, and the request is handed out again.
        """
        ...

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[Refusal]:
        """Keep (request_id, epoch) leases alive through steps that emit nothing (prefill)."""
        ...

    async def release(self, leases: Sequence[tuple[str, int]]) -> None:
        """Hand requests back at once, without counting the delivery (drain). What is no longer ours is left alone."""
        ...

    async def report(self, report: WorkerReport) -> None:
        """Be known as a worker; without a new report for some time, no longer."""
        ...

    async def workers(self) -> list[SeenWorker]:
        """Who has reported of late, by worker id."""
        ...

    async def depth(self, model: str | None = None) -> Depth:
        """Outstanding work, of one model or of all. A request whose lease has lapsed waits."""
        ...

    async def close(self) -> None:
        """End all readers (Unavailable) and waiting lease() calls (nothing leased). Later calls raise Unavailable."""
        ...
