"""The simulation's own books: what is true of each request, and so what every call must answer.

Kept from the calls alone, by the contract of wire/queue.py and apart from the core. Which requests a lease hands out is
not predicted but judged (order.py): the order is a matter of fairness, the rest of arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.queues.protocol_core import QueueLimits
from wire.messages import Event, Facts, Failed, Finished, Generate, Timings, Tokens, Usage, WorkerReport
from wire.queue import Append, Depth, Lease, Refusal, RefusalReason, SeenWorker, Standing, Status

FAR_MS = 10**18


class Violation(AssertionError):
    """Something has happened that must not happen."""


def demand(is_so: bool, words: str) -> None:
    """Raise Violation unless it is so."""
    if not is_so:
        raise Violation(words)


def answer_to(request: Generate) -> list[int]:
    """All tokens of a completion: a pure function of the request, so that any worker computes the same."""
    seed = request.sampling.seed
    return [(seed * 31 + index * 7_919) % 50_000 for index in range(1 + seed % request.max_tokens)]


@dataclass(slots=True)
class Life:
    """One request from acceptance until it is forgotten; an id may have several, one after the other."""

    request: Generate
    arrival: int
    deadline_at_ms: int
    waits_since_ms: int
    answer: list[int]
    num_tokens: int = 0  # logged
    owner: int | None = None  # the epoch that may append
    until_ms: int | None = None  # of the lease; None = waiting
    deliveries: int = 0
    losses: int = 0
    max_delivery: int = 0  # so many workers have had it
    is_cancelled: bool = False
    terminal: Finished | Failed | None = None
    ended_ms: int = 0
    forget_ms: int = FAR_MS

    @property
    def due_ms(self) -> int:
        if self.terminal is not None:
            return self.forget_ms
        return min(self.deadline_at_ms, FAR_MS if self.until_ms is None else self.until_ms)

    @property
    def status(self) -> Status:
        if self.terminal is not None:
            return Status.ENDED
        return Status.WAITING if self.until_ms is None else Status.RUNNING

    @property
    def log(self) -> list[int]:
        return self.answer[: self.num_tokens]


@dataclass
class Books:
    """Every method that takes `now` applies first what time alone has done."""

    limits: QueueLimits
    known: dict[str, Life] = field(default_factory=dict)
    live: dict[str, Life] = field(default_factory=dict)  # of them, who has not ended
    grown: set[str] = field(default_factory=set)  # since last cleared: logs that have grown or ended
    offered: set[str] = field(default_factory=set)  # the same: models with somebody newly waiting
    epochs: int = 0
    arrivals: int = 0
    dead: list[Life] = field(default_factory=list)
    reports: dict[str, tuple[int, WorkerReport]] = field(default_factory=dict)
    _due_ms: int = FAR_MS

    # --- time ---------------------------------------------------------------------------------------------------------

    def pass_time(self, now: int) -> None:
        if now < self._due_ms:
            return
        for request_id, life in list(self.known.items()):
            if life.due_ms <= now:
                if life.terminal is not None:
                    del self.known[request_id]
                elif life.deadline_at_ms <= now:
                    self._end(life, Failed(request_id, "deadline_exceeded", "", False), now)
                else:
                    self._lapse(life, now)
        self._due_ms = min((life.due_ms for life in self.known.values()), default=FAR_MS)

    def _lapse(self, life: Life, now: int) -> None:
        if life.is_cancelled:
            self._end(life, cancelled(life), now)
        elif life.deliveries >= self.limits.max_deliveries:
            self.dead.append(life)
            self._end(life, Failed(life.request.request_id, "worker_lost", "", True), now)
        else:
            life.losses += 1
            self._put_back(life, now)

    # --- the gateways' side -------------------------------------------------------------------------------------------

    def submit(self, request: Generate, now: int) -> str:
        """'accepted', 'attached', or the code of the refusal."""
        self.pass_time(now)
        life = self.known.get(request.request_id)
        if life is not None:
            return "attached" if life.request == request else "conflict"
        if self.limits.refuses_unserved and not self._is_served(request.model, now):
            return "unavailable"
        tokens, caps = request.max_total_tokens, self.limits
        if tokens > caps.max_queued_tokens or (request.tenant and tokens > caps.max_tenant_tokens):
            return "request_too_large"
        of_tenant = sum_tokens(each for each in self.live.values() if each.request.tenant == request.tenant)
        if sum_tokens(self.live.values()) + tokens > caps.max_queued_tokens:
            return "queue_full"
        if request.tenant and of_tenant + tokens > caps.max_tenant_tokens:
            return "queue_full"
        self.arrivals += 1
        deadline_ms = FAR_MS if request.deadline_ms is None else now + request.deadline_ms
        life = Life(request, self.arrivals, deadline_ms, now, answer_to(request))
        self.known[request.request_id] = self.live[request.request_id] = life
        self.offered.add(request.model)
        self._due_ms = min(self._due_ms, life.due_ms)
        return "accepted"

    def standing(self, request_id: str, now: int) -> Standing | None:
        """Its terminal's words are not ours to know: compare codes (`same_end`)."""
        self.pass_time(now)
        life = self.known.get(request_id)
        if life is None:
            return None
        return Standing(Facts.of(life.request), life.status, life.num_tokens, life.terminal)

    def cancel(self, request_id: str, now: int, *, is_for_lack_of_readers: bool = False) -> bool:
        """Whether the request is known."""
        self.pass_time(now)
        life = self.known.get(request_id)
        if life is None:
            return False
        if life.terminal is None and not (is_for_lack_of_readers and life.request.background):
            if life.until_ms is None:
                self._end(life, cancelled(life), now)
            else:
                life.is_cancelled = True
        return True

    def depth(self, model: str | None, now: int) -> Depth:
        self.pass_time(now)
        live = [life for life in self.live.values() if model in (None, life.request.model)]
        waits = [life for life in live if life.until_ms is None]
        runs = [life for life in live if life.until_ms is not None]
        oldest_ms = now - min((life.waits_since_ms for life in waits), default=now)
        dead = sum(model in (None, life.request.model) for life in self.dead)
        return Depth(len(waits), sum_tokens(waits), len(runs), sum_tokens(runs), oldest_ms, dead)

    # --- the workers' side --------------------------------------------------------------------------------------------

    def waiting(self, models: tuple[str, ...], now: int) -> list[Life]:
        self.pass_time(now)
        return [life for life in self.live.values() if life.until_ms is None and life.request.model in models]

    def is_suspect(self, life: Life) -> bool:
        """Whether somebody who waits may be handed out only once more, and workers have died of it or beside it."""
        return life.losses >= max(1, self.limits.max_deliveries - 1)

    def handed_out(self, lease: Lease, now: int) -> Life:
        """A lease under a new epoch, of somebody who waited. Judges it alone; order.py judges the choice."""
        request_id = lease.request.request_id
        life = self.live.get(request_id)
        demand(life is not None, f"{request_id} is handed out and is not there")
        assert life is not None
        demand(life.until_ms is None, f"{request_id} is handed out while epoch {life.owner} holds it")
        demand(lease.epoch > self.epochs, f"epoch {lease.epoch} of {request_id} was given out before")
        self.epochs = lease.epoch
        life.owner = lease.epoch
        life.deliveries += 1
        life.max_delivery = max(life.max_delivery, life.deliveries)
        self._hold(life, now)
        self._judge(life, lease)
        return life

    def handed_out_again(self, leases: list[Lease], now: int) -> list[Lease]:
        """Of leases whose reply was lost, those that must come again."""
        self.pass_time(now)
        standing = []
        for lease in leases:
            life = self.live.get(lease.request.request_id)
            if life is not None and life.owner == lease.epoch:
                self._hold(life, now)
                standing.append(Lease(life.request, lease.epoch, tuple(life.log), life.deliveries, lease.is_suspect))
        return standing

    def publish(self, appends: tuple[Append, ...], now: int) -> list[Refusal]:
        self.pass_time(now)
        found = [(append, self._append(append, now)) for append in appends]
        return [Refusal(append.event.request_id, why, append.epoch) for append, why in found if why is not None]

    def renew(self, leases: tuple[tuple[str, int], ...], now: int) -> list[Refusal]:
        self.pass_time(now)
        refusals = []
        for request_id, epoch in leases:
            life = self.known.get(request_id)
            reason = None
            if life is None or life.owner != epoch:
                reason = RefusalReason.FENCED
            elif life.terminal is not None:
                reason = ended_as(life)
            elif life.is_cancelled:
                reason = RefusalReason.CANCELLED
            else:
                self._hold(life, now)
            if reason is not None:
                refusals.append(Refusal(request_id, reason, epoch))
        return refusals

    def release(self, leases: tuple[tuple[str, int], ...], now: int) -> None:
        self.pass_time(now)
        for request_id, epoch in leases:
            life = self.live.get(request_id)
            if life is None or life.owner != epoch:
                continue
            life.owner = None
            life.deliveries -= 1
            if life.is_cancelled:
                self._end(life, cancelled(life), now)
            elif life.until_ms is not None:
                self._put_back(life, now)
            else:
                life.losses -= 1

    def report(self, report: WorkerReport, now: int) -> None:
        self.pass_time(now)
        self.reports[report.worker_id] = (now, report)

    def workers(self, now: int) -> list[SeenWorker]:
        recent = sorted(
            (worker_id, SeenWorker(report, now - at))
            for worker_id, (at, report) in self.reports.items()
            if now - at < self.limits.worker_ttl_ms
        )
        return [seen for _, seen in recent]

    # --- changes of one request ---------------------------------------------------------------------------------------

    def _append(self, append: Append, now: int) -> RefusalReason | None:
        event = append.event
        life = self.known.get(event.request_id)
        if life is None or life.owner != append.epoch:
            return RefusalReason.FENCED
        if life.terminal is not None:
            return None if is_repeat(life, event) else ended_as(life)
        if isinstance(event, Tokens):
            if life.is_cancelled:
                return RefusalReason.CANCELLED
            self._hold(life, now)
            end = event.first_index + len(event.token_ids)
            if end > life.num_tokens:
                life.num_tokens = end
                life.deliveries = min(life.deliveries, 1)
                self.grown.add(event.request_id)
        elif life.is_cancelled and isinstance(event, Finished):
            self._end(life, cancelled(life), now)
        else:
            self._end(life, event, now)
        return None

    def _hold(self, life: Life, now: int) -> None:
        life.until_ms = now + self.limits.lease_ms
        self._due_ms = min(self._due_ms, life.until_ms)

    def _put_back(self, life: Life, now: int) -> None:
        life.until_ms = None
        life.waits_since_ms = now
        self.offered.add(life.request.model)

    def _end(self, life: Life, terminal: Finished | Failed, now: int) -> None:
        demand(life.terminal is None, f"{life.request.request_id} ends twice: this is a bug of the books")
        life.terminal = terminal
        life.ended_ms = now
        background, limits = life.request.background, self.limits
        life.forget_ms = now + (limits.background_ttl_ms if background else limits.log_ttl_ms)
        self._due_ms = min(self._due_ms, life.forget_ms)
        del self.live[life.request.request_id]
        self.grown.add(life.request.request_id)

    def _judge(self, life: Life, lease: Lease) -> None:
        request_id, most = life.request.request_id, self.limits.max_deliveries
        demand(not life.is_cancelled, f"{request_id} is handed out and is cancelled")
        demand(lease.request == life.request, f"{request_id} is handed out with another body")
        demand(list(lease.token_ids) == life.log, f"{request_id} is handed out with {len(lease.token_ids)} tokens")
        demand(lease.delivery == life.deliveries <= most, f"{request_id}: delivery {lease.delivery} of {most}")
        is_suspect = self.is_suspect(life)
        demand(lease.is_suspect == is_suspect, f"{request_id} is {'' if is_suspect else 'not '}a suspect")

    def _is_served(self, model: str, now: int) -> bool:
        return any(model in seen.report.models and not seen.report.is_draining for seen in self.workers(now))


def cancelled(life: Life) -> Finished:
    """It bills what the log holds."""
    usage = Usage(len(life.request.prompt_ids), life.num_tokens)
    return Finished(life.request.request_id, "cancelled", usage, Timings())


def ended_as(life: Life) -> RefusalReason:
    is_late = isinstance(life.terminal, Failed) and life.terminal.code == "deadline_exceeded"
    return RefusalReason.EXPIRED if is_late else RefusalReason.FENCED


def is_repeat(life: Life, event: Event) -> bool:
    """Whether a request that has ended holds the event already."""
    if ended_as(life) is RefusalReason.EXPIRED:
        return False
    if isinstance(event, Tokens):
        return event.first_index + len(event.token_ids) <= life.num_tokens
    return life.is_cancelled or event == life.terminal


def same_end(one: Event | None, other: Event | None) -> bool:
    """Equal but for the words of a failure."""
    if isinstance(one, Failed) and isinstance(other, Failed):
        return one.code == other.code
    return one == other


def sum_tokens(lives: Iterable[Life]) -> int:
    return sum(life.request.max_total_tokens for life in lives)
