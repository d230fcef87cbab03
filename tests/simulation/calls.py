"""The calls of wire/queue.py as values, so that they can be lost, delayed, repeated, written down and made elsewhere.

`CoreQueue.answer` makes one on a QueueCore, and is the only place here that knows how the core is called;
redis_replay.py makes the same ones on Redis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from services.queues.protocol_core import QueueCore
from wire.errors import MillraceError
from wire.messages import Event, Generate, Tokens, WorkerReport, decode_generate
from wire.queue import Append, Depth, Lease, LeaseBudget, Refusal, SeenWorker, Standing, Status


@dataclass(frozen=True, slots=True)
class Submit:
    request: Generate


@dataclass(frozen=True, slots=True)
class Look:
    """standing()"""

    request_id: str


@dataclass(frozen=True, slots=True)
class Read:
    """What the log holds from `start` on."""

    request_id: str
    start: int


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Abandon:
    request_id: str


@dataclass(frozen=True, slots=True)
class Take:
    """lease(). Who has not heard the answer asks again with the same nonce."""

    budget: LeaseBudget
    nonce: str


@dataclass(frozen=True, slots=True)
class Publish:
    appends: tuple[Append, ...]


@dataclass(frozen=True, slots=True)
class Renew:
    leases: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Release:
    leases: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Report:
    report: WorkerReport


@dataclass(frozen=True, slots=True)
class Workers:
    pass


@dataclass(frozen=True, slots=True)
class Count:
    """depth()"""

    model: str | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """Nothing but time."""


Call = Submit | Look | Read | Cancel | Abandon | Take | Publish | Renew | Release | Report | Workers | Count | Sweep


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer that is an error of wire.errors."""

    code: str
    message: str
    retry_after_s: float | None = None

    @classmethod
    def by(cls, error: MillraceError) -> Refused:
        return cls(error.code, error.message, error.retry_after_s)


@dataclass(frozen=True, slots=True)
class Logged:
    """The answer to Read."""

    token_ids: tuple[int, ...]
    terminal: Event | None


Answer = bool | Standing | Logged | list[Lease] | list[Refusal] | list[SeenWorker] | Depth | Refused | None


class CoreQueue:
    """A QueueCore behind lossy wires: it knows the nonce of a lease again, as services/queues/millrace.lua does."""

    def __init__(self, core: QueueCore) -> None:
        self.core = core
        self._handed_out: dict[str, tuple[str, list[Lease]]] = {}  # by worker: its last call that found something

    def answer(self, call: Call, now: int) -> Answer:
        """Make the call. Raises what only a bug raises."""
        try:
            return self._answer(call, now)
        except MillraceError as error:
            return Refused.by(error)

    def _answer(self, call: Call, now: int) -> Answer:
        core = self.core
        match call:
            case Publish(appends):
                return core.publish(appends, now)
            case Renew(leases):
                return core.renew(leases, now)
            case Take(budget, nonce):
                return self._take(budget, nonce, now)
            case Read(request_id, start):
                core.expire(now)
                entry = core.find(request_id)
                terminal = entry.read(len(entry.tokens))
                return Logged(tuple(entry.tokens[start:]), terminal)
            case Submit(request):
                return core.submit(request, now)
            case Look(request_id):
                return core.standing(request_id, now)
            case Count(model):
                return core.depth(model, now)
            case Cancel(request_id):
                core.cancel(request_id, now)
            case Abandon(request_id):
                core.abandon(request_id, now)
            case Release(leases):
                core.release(leases, now)
            case Report(report):
                core.report(report, now)
            case Workers():
                return core.workers(now)
            case Sweep():
                core.expire(now)
            case _:
                assert_never(call)
        return None

    def _take(self, budget: LeaseBudget, nonce: str, now: int) -> list[Lease]:
        last, handed_out = self._handed_out.get(budget.worker_id, ("", []))
        if last == nonce:
            self.core.expire(now)
            return [again for lease in handed_out if (again := self._again(lease, now)) is not None]
        leases = self.core.lease(budget, now)
        if leases:
            self._handed_out[budget.worker_id] = (nonce, leases)
        return leases

    def _again(self, lease: Lease, now: int) -> Lease | None:
        """The lease as it is now, held from now on; None if it no longer stands."""
        entry = self.core._entries.get(lease.request.request_id)
        if entry is None or entry.epoch != lease.epoch or entry.status is Status.ENDED:
            return None
        self.core._hold(entry, now)
        request = decode_generate(entry.body)
        return Lease(request, lease.epoch, tuple(entry.tokens), entry.deliveries, lease.is_suspect)


def in_words(value: object) -> str:
    """A call or an answer on one line."""
    match value:
        case Submit(request):
            extras = {"tenant": request.tenant, "priority": request.priority, "deadline_ms": request.deadline_ms}
            said = " ".join(f"{name}={extra}" for name, extra in extras.items() if extra)
            return f"submit {request.request_id} {request.model} {request.max_total_tokens} tokens {said}"
        case Take(budget, nonce):
            models, suspect = ",".join(budget.models), "" if budget.takes_suspect else " no suspect"
            return f"lease {models} {budget.max_requests} requests {budget.max_tokens} tokens{suspect} ({nonce})"
        case Publish(appends):
            return "publish " + " ".join(_append_in_words(append) for append in appends)
        case Renew(leases) | Release(leases):
            return f"{type(value).__name__.lower()} " + " ".join(f"{rid}@{epoch}" for rid, epoch in leases)
        case list():
            return " ".join(in_words(each) for each in value) or "nothing"
        case Lease():
            suspect = " suspect" if value.is_suspect else ""
            logged = len(value.token_ids)
            return f"{value.request.request_id}@{value.epoch} ({logged} tokens, delivery {value.delivery}{suspect})"
        case Refusal(request_id, reason, epoch):
            return f"{request_id}@{epoch} {reason.value}"
        case Refused(code, message):
            return f"{code}: {message}"
        case Look(request_id) | Cancel(request_id) | Abandon(request_id):
            return f"{type(value).__name__.lower()} {request_id}"
        case _:
            return str(value)


def _append_in_words(append: Append) -> str:
    event = append.event
    last = f"[{event.first_index}:+{len(event.token_ids)}]" if isinstance(event, Tokens) else f" {type(event).__name__}"
    return f"{event.request_id}@{append.epoch}{last}"
