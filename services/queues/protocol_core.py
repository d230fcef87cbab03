"""The queue's state machine: what each call does to the requests, given the time.

Pure and synchronous: no asyncio, no clock of its own, no I/O. services/queues/memory.py puts an event loop around it,
the Redis library mirrors it, and a simulation can drive it with any clock. The contract is wire/queue.py.

    submit --> WAITING --lease--> RUNNING --terminal--> ENDED --log_ttl_ms--> forgotten
                  ^                  |
                  +-- lapse, release +          (deadline, cancel, deliveries used up: ENDED from either side)

An epoch is drawn for every lease from one counter of the whole queue, so that not even a worker that slept through the
end, the forgetting and the rebirth of a request id can write into it. A lapse leaves the epoch alone: an owner that was
merely slow takes its lease back with its next append if nobody has taken the request over. A release withdraws it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from services.queues.accounts import Accounts
from services.queues.entry import Entry
from services.queues.roster import Roster
from services.queues.waiting_line import Place, WaitingLine
from wire.errors import BadRequest, Conflict, DeadlineExceeded, Unavailable, UnknownRequest, WorkerLost
from wire.messages import (
    Event,
    Facts,
    Failed,
    Finished,
    Generate,
    Tokens,
    WorkerReport,
    decode_event,
    decode_generate,
    encode,
    fingerprint,
)
from wire.queue import Append, Depth, Lease, LeaseBudget, Refusal, RefusalReason, SeenWorker, Standing, Status

UNSERVED_RETRY_S: Final = 5.0  # a worker loads its model in about this time


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What a queue allows. Times in ms of the queue's clock, sizes in tokens (prompt + max_tokens)."""

    lease_ms: int
    max_deliveries: int
    max_queued_tokens: int  # waiting and running together
    max_tenant_tokens: int  # the same, of one tenant
    log_ttl_ms: int  # how long an ended request and its log are kept
    background_ttl_ms: int  # the same, of a background request
    max_overtakes: int
    worker_ttl_ms: int  # a worker that has not reported for this long is none
    orphan_ms: int  # a request whose gateways have died runs on for this long
    refuses_unserved: bool  # requests of a model that no worker serves: refused, or waiting

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1 and limit.name != "refuses_unserved":
                raise ValueError(f"{limit.name} is {getattr(self, limit.name)}; it must be at least 1")

    def is_suspect(self, losses: int) -> bool:
        """Whether so many workers have died on a request, or beside it, that the next must hold no other such one."""
        return losses >= max(1, self.max_deliveries - 1)

    def ttl_ms(self, facts: Facts) -> int:
        """How long an ended request is kept."""
        return self.background_ttl_ms if facts.background else self.log_ttl_ms


class QueueCore:
    """All requests. Every call takes `now` in ms and first applies what is due by then."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._entries: dict[str, Entry] = {}
        self._line = WaitingLine(limits.max_overtakes)
        self._accounts = Accounts(limits.max_queued_tokens, limits.max_tenant_tokens)
        self._roster = Roster(limits.worker_ttl_ms)
        self._arrivals = 0
        self._epochs = 0
        self._alarms: list[tuple[int, str]] = []  # heap; an alarm that is not its entry's alarm_ms is void
        # News for whoever waits; the caller reads and clears.
        self.grown: set[str] = set()  # requests whose log has grown
        self.offered: set[str] = set()  # models with requests newly waiting

    # --- the gateways' side -------------------------------------------------------------------------------------------

    def submit(self, request: Generate, now: int) -> bool:
        """Accept the request, or attach to the one that has its id and body; whether it is new."""
        self.expire(now)
        request, body = sealed(request)
        print_of_body = fingerprint(request)
        known = self._entries.get(request.request_id)
        if known is not None:
            if known.fingerprint != print_of_body:
                raise taken(request.request_id)
            return False
        if self._limits.refuses_unserved and not self._roster.serves(request.model, now):
            raise unserved(request.model)
        tokens = request.max_total_tokens
        self._accounts.admit(request.tenant, tokens, now)
        self._arrivals += 1
        tag = self._line.share.stamp(request.tenant, request.weight, tokens)
        entry = Entry(
            request_id=request.request_id,
            model=request.model,
            place=Place(-request.priority, tag, self._arrivals, tokens, request.request_id),
            facts=Facts.of(request),
            deadline_ms=None if request.deadline_ms is None else now + request.deadline_ms,
            fingerprint=print_of_body,
            body=body,
        )
        self._entries[entry.request_id] = entry
        self._accounts.enter(entry, now)
        self._offer(entry)
        self._set_alarm(entry)
        return True

    def standing(self, request_id: str, now: int) -> Standing:
        """What is known of a request."""
        self.expire(now)
        return self.find(request_id).standing()

    def cancel(self, request_id: str, now: int) -> None:
        """End a waiting request; mark a running one, whose worker is told at its next append or renewal."""
        self.expire(now)
        entry = self.find(request_id)
        if entry.status is Status.WAITING:
            self._end(entry, entry.cancelled(), now)
        elif entry.status is Status.RUNNING:
            entry.is_cancelled = True

    def abandon(self, request_id: str, now: int) -> None:
        """Cancel for lack of readers. There is one gateway: nobody else can be reading."""
        self.expire(now)
        entry = self._entries.get(request_id)
        if entry is not None and not entry.facts.background:
            self.cancel(request_id, now)

    def find(self, request_id: str) -> Entry:
        """The entry to read from. Raises UnknownRequest."""
        entry = self._entries.get(request_id)
        if entry is None:
            raise unknown(request_id)
        return entry

    def depth(self, model: str | None, now: int) -> Depth:
        """Outstanding work of one model, or of all."""
        self.expire(now)
        return self._accounts.depth(model, now)

    # --- the workers' side --------------------------------------------------------------------------------------------

    def lease(self, budget: LeaseBudget, now: int) -> list[Lease]:
        """Hand out what fits, each under a new epoch."""
        self.expire(now)
        leases = []
        for request_id in self._line.pick(budget):
            entry = self._entries[request_id]
            is_suspect = self._limits.is_suspect(entry.losses)
            self._epochs += 1
            entry.epoch = self._epochs
            entry.deliveries += 1
            self._line.share.handed_out(entry.place.tag)
            self._hold(entry, now)
            request = decode_generate(entry.body)
            leases.append(Lease(request, entry.epoch, tuple(entry.tokens), entry.deliveries, is_suspect))
        return leases

    def publish(self, appends: Sequence[Append], now: int) -> list[Refusal]:
        """Log the events. Raises ValueError, and logs none, if one breaks the contract (a bug of its worker)."""
        self.expire(now)
        events = self._checked(appends)
        refusals = []
        for append, event in zip(appends, events, strict=True):
            reason = self._append(append.epoch, event, now)
            if reason is not None:
                refusals.append(Refusal(event.request_id, reason, append.epoch))
        return refusals

    def renew(self, leases: Sequence[tuple[str, int]], now: int) -> list[Refusal]:
        """Keep leases for another lease_ms from now."""
        self.expire(now)
        refusals = []
        for request_id, epoch in leases:
            entry = self._entries.get(request_id)
            reason: RefusalReason | None = None
            if entry is None or entry.epoch != epoch:
                reason = RefusalReason.FENCED
            elif entry.status is Status.ENDED:
                reason = entry.ended_as
            elif entry.is_cancelled:
                reason = RefusalReason.CANCELLED
            else:
                self._hold(entry, now)
            if reason is not None:
                refusals.append(Refusal(request_id, reason, epoch))
        return refusals

    def release(self, leases: Sequence[tuple[str, int]], now: int) -> None:
        """Put requests back as if this delivery had not been; their tokens stay. What is not ours is left alone."""
        self.expire(now)
        for request_id, epoch in leases:
            entry = self._entries.get(request_id)
            if entry is None or entry.epoch != epoch or entry.status is Status.ENDED:
                continue
            entry.epoch = None
            entry.deliveries -= 1
            if entry.is_cancelled:
                self._end(entry, entry.cancelled(), now)
            elif entry.status is Status.RUNNING:
                self._put_back(entry, now)
            else:  # it had lapsed: its worker was late, and is not lost
                entry.losses -= 1
                if not self._limits.is_suspect(entry.losses):
                    self._line.acquit(entry.request_id)

    def report(self, report: WorkerReport, now: int) -> None:
        """A worker says that it is there."""
        self.expire(now)
        self._roster.note(report, now)

    def workers(self, now: int) -> list[SeenWorker]:
        """Who has reported of late."""
        self.expire(now)
        return self._roster.seen(now)

    # --- time ---------------------------------------------------------------------------------------------------------

    @property
    def next_alarm_ms(self) -> int | None:
        """When `expire` will next have something to look at (it may then find that the lease has been renewed)."""
        return self._alarms[0][0] if self._alarms else None

    def expire(self, now: int) -> None:
        """Apply deadlines, lapses and forgetting that are due at `now`."""
        while self._alarms and self._alarms[0][0] <= now:
            at_ms, request_id = heapq.heappop(self._alarms)
            entry = self._entries.get(request_id)
            if entry is not None and entry.alarm_ms == at_ms:
                entry.alarm_ms = None
                self._on_alarm(entry, now)

    def _on_alarm(self, entry: Entry, now: int) -> None:
        if entry.status is Status.ENDED and entry.forget_ms <= now:
            del self._entries[entry.request_id]
            return
        if entry.status is not Status.ENDED and entry.deadline_ms is not None and entry.deadline_ms <= now:
            entry.ended_as = RefusalReason.EXPIRED
            self._fail(entry, DeadlineExceeded(f"the deadline passed after {len(entry.tokens)} tokens"), now)
        elif entry.status is Status.RUNNING and entry.lease_until_ms <= now:
            self._lapse(entry, now)
        self._set_alarm(entry)

    def _lapse(self, entry: Entry, now: int) -> None:
        if entry.is_cancelled:
            self._end(entry, entry.cancelled(), now)
        elif entry.deliveries >= self._limits.max_deliveries:
            self._accounts.bury(entry.model)
            self._fail(entry, WorkerLost(f"given up: {entry.deliveries} workers were lost while serving this"), now)
        else:
            entry.losses += 1
            self._put_back(entry, now)

    def _set_alarm(self, entry: Entry) -> None:
        # A later due time needs no new alarm: the one that stands goes off early, finds nothing due and is set again.
        # Renewing a lease therefore costs one assignment.
        due_ms = entry.due_ms()
        if due_ms is None or (entry.alarm_ms is not None and entry.alarm_ms <= due_ms):
            return
        entry.alarm_ms = due_ms
        heapq.heappush(self._alarms, (due_ms, entry.request_id))
        if len(self._alarms) > 2 * len(self._entries) + 64:  # mostly void ones, of far deadlines of forgotten requests
            self._alarms = [(each.alarm_ms, rid) for rid, each in self._entries.items() if each.alarm_ms is not None]
            heapq.heapify(self._alarms)

    # --- changes of one entry -----------------------------------------------------------------------------------------

    def _append(self, epoch: int, event: Event, now: int) -> RefusalReason | None:
        entry = self._entries.get(event.request_id)
        if entry is None or entry.epoch != epoch:
            return RefusalReason.FENCED
        if entry.status is Status.ENDED:
            is_repeat = entry.ended_as is not RefusalReason.EXPIRED and entry.has_logged(event)
            return None if is_repeat else entry.ended_as
        if isinstance(event, Tokens):
            if entry.is_cancelled:
                return RefusalReason.CANCELLED
            self._hold(entry, now)
            fresh = event.token_ids[len(entry.tokens) - event.first_index :]  # the rest is logged already
            if fresh:
                entry.tokens.extend(fresh)
                entry.deliveries = min(entry.deliveries, 1)  # what makes progress does not kill its workers
                self.grown.add(entry.request_id)
        elif entry.is_cancelled and isinstance(event, Finished):
            self._end(entry, entry.cancelled(event.usage.cached_tokens, event.timings), now)
        else:
            self._end(entry, event, now)
        return None

    def _checked(self, appends: Sequence[Append]) -> list[Event]:
        """The events as they would arrive over a wire, each known to continue its log."""
        events: list[Event] = []
        lengths: dict[str, int] = {}  # of the logs, with the appends looked at so far
        for append in appends:
            try:
                event = decode_event(encode(append.event))
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{append.event!r:.200} cannot travel: {error}; this is a bug") from error
            events.append(event)
            entry = self._entries.get(event.request_id)
            if entry is None or entry.epoch != append.epoch or entry.status is Status.ENDED or entry.is_cancelled:
                continue  # refused or a repeat: it changes no log
            length = lengths.get(event.request_id, len(entry.tokens))
            if isinstance(event, Tokens):
                if event.first_index > length:
                    gap = f"tokens from index {event.first_index} after {length} logged"
                    raise ValueError(f"request {event.request_id!r}: {gap}; this is a bug")
                lengths[event.request_id] = max(length, event.first_index + len(event.token_ids))
            elif isinstance(event, Finished) and event.usage.completion_tokens != length:
                bill = f"usage says {event.usage.completion_tokens} completion tokens, the log holds {length}"
                raise ValueError(f"request {event.request_id!r}: {bill}; this is a bug")
        return events

    def _hold(self, entry: Entry, now: int) -> None:
        """Lease or keep: the request runs, until lease_ms from now."""
        entry.lease_until_ms = now + self._limits.lease_ms
        if entry.status is Status.WAITING:
            self._line.remove(entry.model, entry.place)
            self._accounts.move(entry, Status.RUNNING, now)
            self._set_alarm(entry)

    def _put_back(self, entry: Entry, now: int) -> None:
        self._accounts.move(entry, Status.WAITING, now)
        self._offer(entry)

    def _offer(self, entry: Entry) -> None:
        self._line.add(entry.model, entry.place, is_suspect=self._limits.is_suspect(entry.losses))
        self.offered.add(entry.model)

    def _fail(self, entry: Entry, error: DeadlineExceeded | WorkerLost, now: int) -> None:
        self._end(entry, Failed(entry.request_id, error.code, error.message, error.retryable), now)

    def _end(self, entry: Entry, terminal: Event, now: int) -> None:
        if entry.status is Status.WAITING:
            self._line.remove(entry.model, entry.place)
        self._accounts.move(entry, Status.ENDED, now)
        entry.terminal = encode(terminal)
        entry.body = b""
        entry.forget_ms = now + self._limits.ttl_ms(entry.facts)
        self.grown.add(entry.request_id)
        self._set_alarm(entry)


def sealed(request: Generate) -> tuple[Generate, bytes]:
    """The request as the other end will read it, and its bytes. Raises BadRequest if it cannot travel."""
    try:
        body = encode(request)
        return decode_generate(body), body
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"the request cannot travel: {error}") from error


def taken(request_id: str) -> Conflict:
    return Conflict(f"request id {request_id!r} is taken by a request with another body")


def unknown(request_id: str) -> UnknownRequest:
    return UnknownRequest(f"no request {request_id!r}: never accepted, or its log has expired")


def unserved(model: str) -> Unavailable:
    return Unavailable(f"no worker serves {model} at present", retry_after_s=UNSERVED_RETRY_S)
