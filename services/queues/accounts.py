"""What waits and what runs, in requests and in tokens, and whether more may come in.

Apart from the state machine because admission is arithmetic on totals: the cap is on the tokens (prompt + max_tokens)
that wait or run, so a request that comes back from a lost worker never exceeds it, and room appears exactly when one
ends.
"""

from __future__ import annotations

from collections import Counter

from services.queues.drain_rate import DrainRate
from services.queues.entry import Entry, Status
from wire.errors import QueueFull, RequestTooLarge
from wire.queue import Depth


class Accounts:
    """Totals of all outstanding requests, by model and status."""

    def __init__(self, max_queued_tokens: int) -> None:
        self._cap = max_queued_tokens
        self._drain = DrainRate()
        # By (model, status); keys at zero are removed, so the names of models long gone take no memory.
        self._requests: Counter[tuple[str, Status]] = Counter()
        self._tokens: Counter[tuple[str, Status]] = Counter()

    def admit(self, tokens: int, now_ms: int) -> None:
        """Raise unless this many tokens more fit: RequestTooLarge if they never will, else QueueFull."""
        if tokens > self._cap:
            raise RequestTooLarge(f"prompt and max_tokens make {tokens:,} tokens; the queue holds {self._cap:,}")
        outstanding = self._tokens.total()
        if outstanding + tokens > self._cap:
            self._note(now_ms, 0)
            numbers = f"{outstanding:,} of {self._cap:,} tokens are taken, the request needs {tokens:,}"
            wait_s = self._drain.seconds_for(outstanding + tokens - self._cap)
            raise QueueFull(f"the queue is full: {numbers}", retry_after_s=wait_s)

    def enter(self, entry: Entry, now_ms: int) -> None:
        """Count a new request."""
        self._note(now_ms, 0)
        self._count(entry, 1)

    def move(self, entry: Entry, status: Status, now_ms: int) -> None:
        """Change an entry's status and the totals with it."""
        self._note(now_ms, entry.place.tokens if status is Status.ENDED else 0)
        self._count(entry, -1)
        entry.status = status
        if status is not Status.ENDED:
            self._count(entry, 1)

    def depth(self, model: str | None) -> Depth:
        """Totals of one model, or of all."""

        def total(counts: Counter[tuple[str, Status]], status: Status) -> int:
            return sum(count for (name, at), count in counts.items() if at is status and model in (None, name))

        return Depth(
            queued_requests=total(self._requests, Status.WAITING),
            queued_tokens=total(self._tokens, Status.WAITING),
            running_requests=total(self._requests, Status.RUNNING),
            running_tokens=total(self._tokens, Status.RUNNING),
        )

    def _count(self, entry: Entry, sign: int) -> None:
        key = (entry.model, entry.status)
        for counts, amount in ((self._requests, sign), (self._tokens, sign * entry.place.tokens)):
            counts[key] += amount
            if not counts[key]:
                del counts[key]

    def _note(self, now_ms: int, ended_tokens: int) -> None:
        # Under pressure: somebody waits, or the queue is half full. Only then do ends say how fast work gets done.
        is_waiting = any(status is Status.WAITING for _, status in self._requests)
        is_pressed = is_waiting or 2 * self._tokens.total() >= self._cap
        self._drain.note(now_ms, is_pressed=is_pressed, ended_tokens=ended_tokens)
