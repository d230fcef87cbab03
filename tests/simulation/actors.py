"""Those who live in a world: clients behind a gateway, and workers. They know the queue by its calls alone.

Each has its world for time, chance and wires; what it does not hear of, it does again, as the real ones do
(gateway/, services/worker.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Protocol

from tests.simulation.books import answer_to, demand
from tests.simulation.calls import (
    Abandon,
    Answer,
    Call,
    Cancel,
    Logged,
    Look,
    Publish,
    Read,
    Refused,
    Release,
    Renew,
    Report,
    Submit,
    Take,
)
from wire.messages import Failed, Finished, FinishReason, Generate, Tokens, Usage, WorkerReport
from wire.queue import Append, Lease, LeaseBudget, Refusal, RefusalReason

Act = Callable[[], object]  # what it returns is of no interest
Hear = Callable[[Answer], None]
PATIENCE_MS = 700  # after which a call counts as lost
TICK_MS = 300
REPORT_MS = 2_000
DEADLY = 0.7  # of a poison, per tick
MOST_TOKENS = 4  # that a worker computes of one request in a tick


class Actor:
    """Who calls. An actor that dies and rises has another `turn`: what was meant for the last one is not heard."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = 0
        self.asleep_until_ms = 0

    def wake(self) -> None:
        self.asleep_until_ms = 0


class Surroundings(Protocol):
    """What an actor sees of its world."""

    rng: Random
    now_ms: int
    lease_ms: int

    def later(self, actor: Actor, ms: int, act: Act) -> None: ...

    def send(self, actor: Actor, call: Call, hear: Hear, lost: Act) -> None:
        """`lost` is called instead of `hear` if no answer came in time: the call may have happened, or yet happen."""
        ...

    def is_poison(self, request: Generate) -> bool: ...

    def is_sole_body(self, request: Generate) -> bool:
        """Whether nobody else uses this id for another body."""
        ...


class Client(Actor):
    """One request: submits until told, follows the log with pauses and from old indices, and may change its mind."""

    def __init__(self, world: Surroundings, name: str, request: Generate, cancels: float) -> None:
        super().__init__(name)
        rng = world.rng
        self._world = world
        self._request = request
        self._answer = answer_to(request)
        self._refusals_left = rng.randint(0, 6)
        self._is_stubborn = rng.random() < 0.9  # sends again what was lost
        self._seen: list[int] = []
        self._pace_ms = rng.randint(300, 3_000)
        self._cancels = cancels
        self.is_submitting = True

    def begin(self) -> None:
        rng = self._world.rng
        self._submit()
        if rng.random() < self._cancels:
            self._world.later(self, rng.randint(1, 8_000), self._cancel)
        elif rng.random() < self._cancels:
            self._world.later(self, rng.randint(1, 8_000), self._leave)

    def _submit(self) -> None:
        again = self._submit if self._is_stubborn else self._stop_submitting
        self._world.send(self, Submit(self._request), self._hear_submitted, again)

    def _stop_submitting(self) -> None:
        self.is_submitting = False

    def _hear_submitted(self, answer: Answer) -> None:
        if isinstance(answer, Refused) and answer.retry_after_s is not None and self._refusals_left:
            self._refusals_left -= 1
            self._world.later(self, self._world.rng.randint(200, 4_000), self._submit)
            return
        self._stop_submitting()
        if not isinstance(answer, Refused):
            self._read()

    def _read(self) -> None:
        rng, seen = self._world.rng, len(self._seen)
        start = seen if rng.random() < 0.8 else rng.randint(0, seen + 1)

        def hear(answer: Answer) -> None:
            self._hear_log(start, answer)

        self._world.send(self, Read(self._request.request_id, start), hear, self._read)

    def _hear_log(self, start: int, answer: Answer) -> None:
        world = self._world
        if not isinstance(answer, Logged):
            return  # forgotten meanwhile
        if world.is_sole_body(self._request):
            expected = self._answer[start : start + len(answer.token_ids)]
            demand(list(answer.token_ids) == expected, f"{self.name} reads {answer.token_ids} from {start}")
            self._seen[start:] = answer.token_ids if start <= len(self._seen) else ()
        if answer.terminal is None:
            world.later(self, world.rng.randint(self._pace_ms // 2, 2 * self._pace_ms), self._read)

    def _cancel(self) -> None:
        again = self._cancel if self._is_stubborn else _give_up
        self._world.send(self, Cancel(self._request.request_id), _hear_nothing, again)

    def _leave(self) -> None:
        self.turn += 1
        self._stop_submitting()
        self._world.send(self, Abandon(self._request.request_id), _hear_nothing, _give_up)
        if self._world.rng.random() < 0.3:  # and comes back
            self._world.send(self, Look(self._request.request_id), lambda _: self._read(), _give_up)


@dataclass(slots=True)
class Job:
    """A leased request at a worker."""

    request: Generate
    epoch: int
    is_suspect: bool
    answer: list[int]
    computed: int
    is_done: bool = False


class Worker(Actor):
    """Takes, computes, publishes, renews. May die, stand still, or hand back and leave."""

    def __init__(self, world: Surroundings, name: str, models: tuple[str, ...], most: int, capacity: int) -> None:
        super().__init__(name)
        self._world = world
        self._models = models
        self._most_requests = most
        self._capacity = capacity
        self._nonces = count(1)
        self.is_up = False
        self._empty()

    def _empty(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._outbox: list[Append] = []
        self._is_publishing = False
        self._is_leasing = False
        self._nonce = ""  # of a lease call that has not been answered
        self._renew_ms = 0
        self._report_ms = 0

    def start(self) -> None:
        if not self.is_up:
            self.is_up = True
            self.turn += 1
            self.wake()
            self._empty()
            self._tick()

    def crash(self) -> None:
        self.turn += 1
        self.is_up = False
        self._empty()

    def drain(self) -> None:
        """Hand back what is held and go. If that is not heard, the leases lapse."""
        leases = tuple((request_id, job.epoch) for request_id, job in self._jobs.items())
        self.crash()
        self._world.send(self, Report(self._report(is_draining=True)), _hear_nothing, _give_up)
        if leases:
            self._world.send(self, Release(leases), _hear_nothing, _give_up)

    def _tick(self) -> None:
        world = self._world
        if any(world.is_poison(job.request) for job in self._jobs.values()) and world.rng.random() < DEADLY:
            self.crash()
            world.later(self, world.rng.randint(100, 2_000), self.start)
            return
        for job in self._jobs.values():
            self._compute(job)
        self._publish()
        self._lease()
        if world.now_ms >= self._renew_ms and self._jobs:
            self._renew()
        if world.now_ms >= self._report_ms:
            self._report_ms = world.now_ms + REPORT_MS
            world.send(self, Report(self._report()), _hear_nothing, _give_up)
        world.later(self, world.rng.randint(TICK_MS // 2, TICK_MS * (1 if self._jobs else 3)), self._tick)

    def _report(self, *, is_draining: bool = False) -> WorkerReport:
        return WorkerReport(self.name, list(self._models), self._capacity, 0, len(self._jobs), is_draining)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease(self) -> None:
        jobs = self._jobs.values()
        room = 2 * self._capacity - sum(job.request.max_total_tokens for job in jobs)
        most = self._most_requests - len(jobs)
        if self._is_leasing or most < 1 or room < 1:
            return
        self._is_leasing = True
        self._nonce = self._nonce or f"{self.name}.{self.turn}.{next(self._nonces)}"
        takes_suspect = not any(job.is_suspect for job in jobs)
        budget = LeaseBudget(self.name, self._models, most, room, self._capacity, takes_suspect)
        self._world.send(self, Take(budget, self._nonce), self._hear_leases, self._hear_no_leases)

    def _hear_leases(self, answer: Answer) -> None:
        assert isinstance(answer, list)
        self._is_leasing, self._nonce = False, ""
        for lease in answer:
            assert isinstance(lease, Lease)
            request, logged = lease.request, len(lease.token_ids)
            job = Job(request, lease.epoch, lease.is_suspect, answer_to(request), logged)
            self._jobs[request.request_id] = job
            if request.max_total_tokens > self._capacity:
                self._end(job, Failed(request.request_id, "request_too_large", "it never fits", False))

    def _hear_no_leases(self) -> None:
        self._is_leasing = False

    def _renew(self) -> None:
        self._renew_ms = self._world.now_ms + self._world.lease_ms // 3
        leases = tuple((request_id, job.epoch) for request_id, job in self._jobs.items())
        self._world.send(self, Renew(leases), self._hear_refusals, _give_up)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _compute(self, job: Job) -> None:
        if job.is_done:
            return
        rng, request = self._world.rng, job.request
        tokens = job.answer[job.computed : job.computed + rng.randint(0, MOST_TOKENS)]
        if tokens:
            self._outbox.append(Append(job.epoch, Tokens(request.request_id, job.computed, tokens)))
            job.computed += len(tokens)
        if rng.random() < 0.002:
            self._end(job, Failed(request.request_id, "internal", "the engine broke", False))
        elif job.computed == len(job.answer):
            usage = Usage(len(request.prompt_ids), job.computed)
            reason: FinishReason = "length" if job.computed == request.max_tokens else "stop"
            self._end(job, Finished(request.request_id, reason, usage))

    def _end(self, job: Job, terminal: Finished | Failed) -> None:
        job.is_done = True
        self._outbox.append(Append(job.epoch, terminal))

    def _publish(self) -> None:
        """One call at a time: what is not answered is sent again before anything newer."""
        if self._outbox and not self._is_publishing:
            self._is_publishing = True
            appends = tuple(self._outbox)
            self._outbox.clear()
            self._send_appends(appends)

    def _send_appends(self, appends: tuple[Append, ...]) -> None:
        def hear(answer: Answer) -> None:
            self._is_publishing = False
            for append in appends:
                job = self._jobs.get(append.event.request_id)
                if job is not None and job.epoch == append.epoch and not isinstance(append.event, Tokens):
                    del self._jobs[append.event.request_id]
            self._hear_refusals(answer)

        self._world.send(self, Publish(appends), hear, lambda: self._send_appends(appends))

    def _hear_refusals(self, answer: Answer) -> None:
        assert isinstance(answer, list)
        for refusal in answer:
            assert isinstance(refusal, Refusal)
            job = self._jobs.get(refusal.request_id)
            if job is None or job.epoch != refusal.epoch:
                continue
            if refusal.reason is not RefusalReason.CANCELLED:
                del self._jobs[refusal.request_id]
            elif not job.is_done:
                usage = Usage(len(job.request.prompt_ids), job.computed)
                self._end(job, Finished(refusal.request_id, "cancelled", usage))


def _hear_nothing(answer: Answer) -> None:
    """Nothing depends on it."""


def _give_up() -> None:
    """The call may have happened; whoever it concerns finds out."""
