"""The requests this gateway knows: who is reading them, and what becomes of those that nobody reads.

A ticket lives from submit until some time after its end, so that a stream can be resumed. While nobody reads a
ticket its grace runs; when that is over the request is cancelled in the queue. So no path through the gateway, not
a lost client, not an exception, not a shutdown, leaves work running for nobody.

What a ticket holds beyond the wire's request (stop strings, the model's tokenizer) is known to this process only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Final

from gateway.admission import Admitted
from gateway.answers import RequestState
from gateway.limits import GatewayLimits
from gateway.telemetry import Completed, Telemetry
from wire.errors import BadRequest, QueueFull, UnknownRequest
from wire.messages import Timings, Usage
from wire.queue import Queue

logger = logging.getLogger(__name__)

ATTACH_S: Final = 1.0  # between submit and the first reader: only an exception makes it longer


class Ticket:
    """One request, mutable: what is known of it and how far it has come. Only the ledger changes it."""

    __slots__ = (
        "arrived_at",
        "expiry",
        "finish_reason",
        "forget_at",
        "id",
        "is_cancelled",
        "last_token_at",
        "max_tokens",
        "min_tokens",
        "model",
        "num_tokens",
        "prompt_tokens",
        "readers",
        "seed",
        "stop",
        "ttft_s",
    )

    def __init__(self, admitted: Admitted) -> None:
        request = admitted.request
        self.id = request.request_id
        self.model = admitted.model
        self.stop = admitted.stop
        self.seed = request.sampling.seed
        self.prompt_tokens = len(request.prompt_ids)
        self.max_tokens = request.max_tokens
        self.min_tokens = request.min_tokens
        self.arrived_at = admitted.arrived_at  # time.perf_counter(), as all times here
        self.last_token_at = admitted.arrived_at
        self.ttft_s: float | None = None
        self.num_tokens = 0  # seen by any reader
        self.readers = 0
        self.is_cancelled = False
        self.finish_reason: str | None = None  # or an error's code; None while it goes on
        self.forget_at = 0.0
        self.expiry: asyncio.TimerHandle | None = None  # when the grace ends


class Ledger:
    """Tickets by id. Everything runs on one event loop."""

    def __init__(self, queue: Queue, limits: GatewayLimits, telemetry: Telemetry) -> None:
        self.queue = queue
        self._limits = limits
        self._telemetry = telemetry
        self._live: dict[str, Ticket] = {}
        self._ended: dict[str, Ticket] = {}  # oldest first
        self._cancelling: set[asyncio.Task[None]] = set()

    # --- coming and going ---------------------------------------------------------------------------------------------

    async def submit(self, admitted: Admitted) -> Ticket:
        """Put the request into the queue. Raises QueueFull, RequestTooLarge, Unavailable; then nothing was started."""
        ticket = Ticket(admitted)
        self._live[ticket.id] = ticket
        try:
            await self.queue.submit(admitted.request)
        except (BadRequest, QueueFull):
            del self._live[ticket.id]
            raise
        except BaseException:  # nobody knows whether the queue has it
            del self._live[ticket.id]
            self._spawn(self._cancel_quietly(ticket.id))
            raise
        self._telemetry.admitted(ticket.model.model_id, ticket.prompt_tokens, ticket.max_tokens)
        self._start_grace(ticket, ATTACH_S)
        return ticket

    def find(self, request_id: str) -> Ticket:
        """Raises UnknownRequest for an id never seen here, or ended too long ago."""
        ticket = self._live.get(request_id)
        if ticket is None:
            self._forget_old()
            ticket = self._ended.get(request_id)
        if ticket is None:
            raise UnknownRequest("no such request here, or it ended too long ago")
        return ticket

    @contextmanager
    def reading(self, ticket: Ticket, grace_s: float) -> Iterator[None]:
        """Be one of the ticket's readers; when the last one leaves before the end, `grace_s` begins."""
        ticket.readers += 1
        if ticket.expiry is not None:
            ticket.expiry.cancel()
            ticket.expiry = None
        try:
            yield
        finally:
            ticket.readers -= 1
            if not ticket.readers and ticket.finish_reason is None:
                self._start_grace(ticket, grace_s)

    async def cancel(self, ticket: Ticket) -> None:
        """Ask the queue to stop the request; what has ended stays as it is."""
        if not ticket.is_cancelled and ticket.finish_reason is None:
            await self.queue.cancel(ticket.id)
            ticket.is_cancelled = True  # only now: if the queue did not hear it, the end of the grace tries again

    async def close(self) -> None:
        """Cancel whatever still runs for this gateway's clients."""
        for ticket in list(self._live.values()):
            self._abandon(ticket)
        await asyncio.gather(*self._cancelling)

    def _start_grace(self, ticket: Ticket, grace_s: float) -> None:
        if grace_s <= 0:
            self._abandon(ticket)
        else:
            ticket.expiry = asyncio.get_running_loop().call_later(grace_s, self._abandon, ticket)

    def _abandon(self, ticket: Ticket) -> None:
        if ticket.expiry is not None:
            ticket.expiry.cancel()
        already_cancelled = ticket.is_cancelled
        ticket.is_cancelled = True
        self.finished(ticket, "cancelled", Usage(ticket.prompt_tokens, ticket.num_tokens), None)
        if not already_cancelled:
            self._spawn(self._cancel_quietly(ticket.id))

    async def _cancel_quietly(self, request_id: str) -> None:
        try:
            await self.queue.cancel(request_id)
        except UnknownRequest:
            pass  # it never got in, or is long over
        except Exception as error:  # this is a task's edge: the log is all there is
            logger.warning("abandoned request not cancelled", extra={"id": request_id, "error": type(error).__name__})

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    # --- what readers saw ---------------------------------------------------------------------------------------------

    def saw(self, ticket: Ticket, num_tokens: int) -> None:
        """A reader has consumed this many tokens. Counted once, whoever was first."""
        new = num_tokens - ticket.num_tokens
        if new <= 0:
            return
        now = time.perf_counter()
        model_id = ticket.model.model_id
        if ticket.ttft_s is None:
            ticket.ttft_s = now - ticket.arrived_at
            self._telemetry.first_token(model_id, ticket.ttft_s)
            self._telemetry.tokens(model_id, new, 0.0)
        else:
            self._telemetry.tokens(model_id, new, now - ticket.last_token_at)
        ticket.num_tokens = num_tokens
        ticket.last_token_at = now

    def finished(self, ticket: Ticket, reason: str, usage: Usage, timings: Timings | None) -> None:
        """The request has ended; the first to know says so."""
        if ticket.finish_reason is not None:
            return
        ticket.finish_reason = reason
        now = time.perf_counter()
        ticket.forget_at = now + self._limits.remember_s
        self._live.pop(ticket.id, None)
        self._ended[ticket.id] = ticket
        if len(self._ended) > self._limits.remembered_requests:
            del self._ended[next(iter(self._ended))]
        self._telemetry.completed(
            Completed(
                id=ticket.id,
                model=ticket.model.model_id,
                finish_reason=reason,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                ttft_s=ticket.ttft_s,
                total_s=now - ticket.arrived_at,
                queue_s=timings.queue_ms / 1e3 if timings else None,
                prefill_s=timings.prefill_ms / 1e3 if timings else None,
                decode_s=timings.decode_ms / 1e3 if timings else None,
                preemptions=timings.preemptions if timings else 0,
            )
        )

    def failed(self, ticket: Ticket, code: str) -> None:
        """The request has ended with an error."""
        self.finished(ticket, code, Usage(ticket.prompt_tokens, ticket.num_tokens), None)

    def state(self, ticket: Ticket) -> RequestState:
        """What GET /requests/{id} says."""
        if ticket.finish_reason is None:
            status = "running" if ticket.num_tokens else "queued"
        else:
            status = "finished" if ticket.finish_reason in ("stop", "length", "cancelled") else "failed"
        return RequestState(ticket.id, ticket.model.model_id, status, ticket.num_tokens, ticket.finish_reason)

    def _forget_old(self) -> None:
        now = time.perf_counter()
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if oldest.forget_at > now:
                return
            del self._ended[oldest.id]
