"""The requests that this gateway's clients read: who reads them, and what becomes of those that nobody reads.

A ticket lives while somebody reads it, and for a grace afterwards; then the request is abandoned in the queue. So no
path through the gateway, not a lost client, not an exception, leaves work running for nobody. What is known of a
request lies in the queue, beside its log: any gateway makes itself a ticket for a request that another took in, as
long as the log is kept. A gateway that ends abandons nothing: its clients have a while to come back to another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Final

from gateway.admission import Admitted
from gateway.caller import Caller
from gateway.door import Door
from gateway.models import Models, ServedModel
from gateway.telemetry import Completed, Telemetry
from gateway.trace import trace_id
from wire.errors import BadRequest, Conflict, QueueFull, Unavailable, UnknownRequest
from wire.messages import Facts, Timings, Usage
from wire.queue import Queue, Standing

logger = logging.getLogger(__name__)

ATTACH_S: Final = 1.0  # between submit and the first reader: only an exception makes it longer
AGAIN_S: Final = 0.5
PATIENCE_S: Final = 60.0  # how long a queue that is away is told again that nobody reads a request


class Ticket:
    """One request, mutable: what is known of it and how far it has come. Only the ledger changes it."""

    __slots__ = (
        "arrived_at",
        "expiry",
        "facts",
        "finish_reason",
        "id",
        "is_cancelled",
        "is_counted",
        "last_token_at",
        "model",
        "num_tokens",
        "readers",
        "trace_id",
        "ttft_s",
    )

    def __init__(self, request_id: str, facts: Facts, model: ServedModel, arrived_at: float) -> None:
        self.id = request_id
        self.facts = facts
        self.model = model
        self.arrived_at = arrived_at  # time.perf_counter(), as all times here
        self.trace_id = trace_id.get()
        self.is_counted = False  # in metrics: only where it was taken in
        self.last_token_at = arrived_at
        self.ttft_s: float | None = None
        self.num_tokens = 0  # seen by any reader
        self.readers = 0
        self.is_cancelled = False
        self.finish_reason: str | None = None  # or an error's code; None while it goes on
        self.expiry: asyncio.TimerHandle | None = None  # when the grace ends


class Ledger:
    """Tickets by id. Everything runs on one event loop."""

    def __init__(self, queue: Queue, models: Models, telemetry: Telemetry) -> None:
        self.queue = queue
        self.door = Door()
        self._models = models
        self._telemetry = telemetry
        self._live: dict[str, Ticket] = {}
        self._abandoning: set[asyncio.Task[None]] = set()

    @property
    def num_live(self) -> int:
        """Requests that somebody reads, or whose grace runs."""
        return len(self._live)

    # --- coming and going ---------------------------------------------------------------------------------------------

    async def submit(self, admitted: Admitted) -> Ticket:
        """Put the request into the queue, or attach to the one that has its id and body.

        Raises Conflict, QueueFull, RequestTooLarge, Unavailable; then nothing was started.
        """
        request = admitted.request
        try:
            is_new = await self.queue.submit(request)
        except QueueFull as full:
            self.door.refused(request.tenant, full)
            raise
        except (BadRequest, Conflict):
            raise
        except BaseException:  # nobody knows whether the queue has it
            if request.request_id not in self._live:
                self._spawn(self._abandon_in_queue(request.request_id))
            raise
        self.door.took(request.tenant)
        ticket = self._live.get(request.request_id)
        if ticket is None:
            ticket = Ticket(request.request_id, Facts.of(request), admitted.model, admitted.arrived_at)
            self._keep(ticket)
        if is_new:
            ticket.is_counted = True
            facts = ticket.facts
            self._telemetry.admitted(ticket.model.model_id, facts.tenant, facts.prompt_tokens, facts.max_tokens)
        return ticket

    async def find(self, request_id: str, caller: Caller) -> Ticket:
        """To read a stream again.

        Raises UnknownRequest for an id never seen, another tenant's, or ended too long ago.
        """
        ticket = self._live.get(request_id)
        if ticket is None:
            standing = await self.standing(request_id, caller)
            ticket = self._live.get(request_id) or self.ticket_for(request_id, standing)
            if ticket.id not in self._live and standing.terminal is None:
                self._keep(ticket)
        elif ticket.facts.tenant != caller.tenant:
            raise _unknown(request_id)
        self._telemetry.resumed()
        return ticket

    async def standing(self, request_id: str, caller: Caller) -> Standing:
        """What the queue knows of a request. Raises UnknownRequest."""
        standing = await self.queue.standing(request_id)
        if standing.facts.tenant != caller.tenant:
            raise _unknown(request_id)
        return standing

    def ticket_for(self, request_id: str, standing: Standing) -> Ticket:
        """To read a request that was taken in elsewhere. Raises UnknownModel if its model is not served here."""
        model = self._models.resolve(standing.facts.model)
        return Ticket(request_id, standing.facts, model, time.perf_counter())

    @contextmanager
    def reading(self, ticket: Ticket, grace_s: float) -> Iterator[None]:
        """Be one of the ticket's readers; when the last one leaves before the end, `grace_s` begins."""
        ticket.readers += 1
        self._live.setdefault(ticket.id, ticket)
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
        """Wait until the queue knows of all that was abandoned."""
        await asyncio.gather(*self._abandoning)

    def _keep(self, ticket: Ticket) -> None:
        self._live[ticket.id] = ticket
        self._start_grace(ticket, ATTACH_S)

    def _start_grace(self, ticket: Ticket, grace_s: float) -> None:
        if grace_s <= 0 or ticket.facts.background:
            self._let_go(ticket)
        else:
            ticket.expiry = asyncio.get_running_loop().call_later(grace_s, self._let_go, ticket)

    def _let_go(self, ticket: Ticket) -> None:
        """Nobody reads it here any more."""
        if ticket.facts.background:  # it runs on, and the queue knows of it
            self._live.pop(ticket.id, None)
            return
        already_cancelled = ticket.is_cancelled
        ticket.is_cancelled = True
        self.finished(ticket, "cancelled", Usage(ticket.facts.prompt_tokens, ticket.num_tokens), None)
        if not already_cancelled:
            self._spawn(self._abandon_in_queue(ticket.id))

    async def _abandon_in_queue(self, request_id: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                await self.queue.abandon(request_id)
                return
            except Unavailable as error:
                if time.monotonic() > give_up_at or self._live.get(request_id) is not None:
                    logger.warning("request not abandoned", extra={"id": request_id, "reason": error.message})
                    return
            except Exception as error:  # this is a task's edge: the log is all there is
                logger.error("request not abandoned", exc_info=error, extra={"id": request_id})
                return
            await asyncio.sleep(AGAIN_S)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    # --- what readers saw ---------------------------------------------------------------------------------------------

    def saw(self, ticket: Ticket, num_tokens: int) -> None:
        """A reader has consumed this many tokens. Counted once, whoever was first."""
        new = num_tokens - ticket.num_tokens
        if new <= 0:
            return
        now = time.perf_counter()
        since_s = 0.0 if ticket.ttft_s is None else now - ticket.last_token_at
        if ticket.ttft_s is None:
            ticket.ttft_s = now - ticket.arrived_at
            if ticket.is_counted:
                self._telemetry.first_token(ticket.model.model_id, ticket.ttft_s, ticket.trace_id)
        if ticket.is_counted:
            self._telemetry.tokens(ticket.model.model_id, new, since_s)
        ticket.num_tokens = num_tokens
        ticket.last_token_at = now

    def finished(self, ticket: Ticket, reason: str, usage: Usage, timings: Timings | None) -> None:
        """The request has ended; the first to know says so."""
        if ticket.finish_reason is not None:
            return
        ticket.finish_reason = reason
        self._live.pop(ticket.id, None)
        if not ticket.is_counted:
            return
        self._telemetry.completed(
            Completed(
                id=ticket.id,
                model=ticket.model.model_id,
                finish_reason=reason,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                ttft_s=ticket.ttft_s,
                total_s=time.perf_counter() - ticket.arrived_at,
                queue_s=timings.queue_ms / 1e3 if timings else None,
                prefill_s=timings.prefill_ms / 1e3 if timings else None,
                decode_s=timings.decode_ms / 1e3 if timings else None,
                preemptions=timings.preemptions if timings else 0,
                tenant=ticket.facts.tenant,
                trace_id=ticket.trace_id,
            )
        )

    def failed(self, ticket: Ticket, code: str) -> None:
        """The request has ended with an error."""
        self.finished(ticket, code, Usage(ticket.facts.prompt_tokens, ticket.num_tokens), None)


def _unknown(request_id: str) -> UnknownRequest:
    # The queue's own words: another tenant's request is not to be told from none.
    return UnknownRequest(f"no request {request_id!r}: never accepted, or its log has expired")
