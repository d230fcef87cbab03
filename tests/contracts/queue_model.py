"""The queue in a few lines: what the contract says must come of each call, for the random histories to compare with.

Deliberately naive, so that it can be seen to be right: it keeps everything for ever, looks at every request at every
tick, and knows nothing of readers, bytes or wake-ups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wire.messages import Generate
from wire.queue import Depth, RefusalReason

LEASE_MS = 100
DELIVERIES = 3
TTL_MS = 300


@dataclass
class Life:
    """One request from acceptance until it is forgotten. An id may have several lives, one after the other."""

    request: Generate
    arrival: int
    deadline_at_ms: int | None
    log: list[int] = field(default_factory=list)
    owner: int | None = None  # the epoch that may append
    running_until_ms: int | None = None  # None = waiting
    waits_since_ms: int = 0
    deliveries: int = 0
    losses: int = 0
    cancelled: bool = False
    end: str = ""  # a finish reason, or the code of a failure
    forget_at_ms: int = 0
    readers_saw: list[int] = field(default_factory=list)

    @property
    def is_suspect(self) -> bool:
        return self.losses >= DELIVERIES - 1

    @property
    def place(self) -> tuple[int, int]:
        return -self.request.priority, self.arrival


class QueueModel:
    def __init__(self) -> None:
        self.now_ms = 0
        self.arrivals = 0
        self.known: dict[str, Life] = {}
        self.past: list[Life] = []

    def submit(self, request: Generate) -> str:
        """What must happen: accepted, attached or conflict."""
        life = self.known.get(request.request_id)
        if life is not None:
            return "attached" if life.request == request else "conflict"
        self.arrivals += 1
        deadline = None if request.deadline_ms is None else self.now_ms + request.deadline_ms
        self.known[request.request_id] = Life(request, self.arrivals, deadline, waits_since_ms=self.now_ms)
        return "accepted"

    def waiting(self) -> list[Life]:
        return sorted(
            (life for life in self.known.values() if not life.end and life.running_until_ms is None),
            key=lambda life: life.place,
        )

    def handed_out(self, max_requests: int, *, takes_suspect: bool) -> list[Life]:
        """Who is leased next: a worker takes one that may not be delivered again, or none if it holds one."""
        chosen: list[Life] = []
        for life in self.waiting():
            if len(chosen) < max_requests and (takes_suspect or not life.is_suspect):
                chosen.append(life)
                takes_suspect = takes_suspect and not life.is_suspect
        return chosen

    def lease(self, life: Life, epoch: int) -> None:
        life.owner = epoch
        life.deliveries += 1
        life.running_until_ms = self.now_ms + LEASE_MS

    def stands(self, request_id: str, epoch: int) -> Life | RefusalReason:
        """The life that this lease owns, or why it owns nothing."""
        life = self.known.get(request_id)
        if life is None or life.owner != epoch:
            return RefusalReason.FENCED
        if life.end:
            return RefusalReason.EXPIRED if life.end == "deadline_exceeded" else RefusalReason.FENCED
        return life

    def tokens(self, request_id: str, epoch: int, first_index: int, token_ids: list[int]) -> RefusalReason | None:
        life = self.stands(request_id, epoch)
        if isinstance(life, RefusalReason):
            known = self.known.get(request_id)
            is_repeat = known is not None and known.owner == epoch and first_index + len(token_ids) <= len(known.log)
            return None if life is RefusalReason.FENCED and is_repeat else life
        if life.cancelled:
            return RefusalReason.CANCELLED
        life.running_until_ms = self.now_ms + LEASE_MS
        fresh = token_ids[len(life.log) - first_index :]
        if fresh:
            life.log += fresh
            life.deliveries = min(life.deliveries, 1)
        return None

    def finish(self, request_id: str, epoch: int, length: int) -> RefusalReason | None:
        life = self.stands(request_id, epoch)
        if isinstance(life, RefusalReason):
            known = self.known.get(request_id)
            owned = known if known is not None and known.owner == epoch else None
            is_repeat = owned and (owned.cancelled or (owned.end == "stop" and len(owned.log) == length))
            return None if life is RefusalReason.FENCED and is_repeat else life
        self._end(life, "cancelled" if life.cancelled else "stop")
        return None

    def renew(self, request_id: str, epoch: int) -> RefusalReason | None:
        life = self.stands(request_id, epoch)
        if isinstance(life, RefusalReason):
            return life
        if life.cancelled:
            return RefusalReason.CANCELLED
        life.running_until_ms = self.now_ms + LEASE_MS
        return None

    def release(self, request_id: str, epoch: int) -> None:
        life = self.stands(request_id, epoch)
        if isinstance(life, RefusalReason):
            return
        life.owner = None
        life.deliveries -= 1
        if life.running_until_ms is not None:
            life.waits_since_ms = self.now_ms
        else:  # it has lapsed, and waits already
            life.losses -= 1
        life.running_until_ms = None
        if life.cancelled:
            self._end(life, "cancelled")

    def cancel(self, request_id: str) -> None:
        life = self.known[request_id]
        if life.end:
            return
        if life.running_until_ms is None:
            self._end(life, "cancelled")
        else:
            life.cancelled = True

    def tick(self, ms: int) -> None:
        """Let time pass, by less than the distance of any two moments that matter."""
        self.now_ms += ms
        for request_id, life in list(self.known.items()):
            if life.end:
                if life.forget_at_ms <= self.now_ms:
                    self.past.append(self.known.pop(request_id))
            elif life.deadline_at_ms is not None and life.deadline_at_ms <= self.now_ms:
                self._end(life, "deadline_exceeded")
            elif life.running_until_ms is not None and life.running_until_ms <= self.now_ms:
                life.running_until_ms = None
                life.waits_since_ms = self.now_ms
                if life.cancelled:
                    self._end(life, "cancelled")
                elif life.deliveries == DELIVERIES:
                    self._end(life, "worker_lost")
                else:
                    life.losses += 1

    def depth(self) -> Depth:
        live = [life for life in self.known.values() if not life.end]
        waits = [life.request.max_total_tokens for life in live if life.running_until_ms is None]
        runs = [life.request.max_total_tokens for life in live if life.running_until_ms is not None]
        since = [life.waits_since_ms for life in live if life.running_until_ms is None]
        dead = sum(life.end == "worker_lost" for life in (*self.known.values(), *self.past))
        return Depth(len(waits), sum(waits), len(runs), sum(runs), self.now_ms - min(since, default=self.now_ms), dead)

    def _end(self, life: Life, how: str) -> None:
        life.end = how
        life.forget_at_ms = self.now_ms + TTL_MS
