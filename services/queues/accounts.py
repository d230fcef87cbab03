"""What waits and what runs, in requests and in tokens, and whether more may come in.

Apart from the state machine because admission is arithmetic on totals: the cap is on the tokens (prompt + max_tokens)
that wait or run, of all and of each tenant, so a request that comes back from a lost worker never exceeds it, and room
appears exactly when one ends.
"""

from __future__ import annotations

from collections import Counter

from services.queues.drain_rate import DrainRate
from services.queues.entry import Entry
from wire.errors import QueueFull, RequestTooLarge
from wire.queue import Depth, Status


class Accounts:
    """Totals of all outstanding requests, by model and status."""

    def __init__(self, max_queued_tokens: int, max_tenant_tokens: int) -> None:
        self._cap = max_queued_tokens
        self._tenant_cap = max_tenant_tokens
        self._drain = DrainRate()
        # By (model, status); keys at zero are removed, so the names of models long gone take no memory.
        self._requests: Counter[tuple[str, Status]] = Counter()
        self._tokens: Counter[tuple[str, Status]] = Counter()
        self._tenants: Counter[str] = Counter()  # tokens of each tenant that wait or run
        # By model: since when each request waits, in ms. Time only goes forward, so the oldest comes first.
        self._since: dict[str, dict[str, int]] = {}
        self._dead: Counter[str] = Counter()

    def admit(self, tenant: str, tokens: int, now_ms: int) -> None:
        """Raise unless this many tokens more fit: RequestTooLarge if they never will, else QueueFull."""
        tenant_cap = self._tenant_cap if tenant else self._cap
        check_size(tokens, self._cap, tenant_cap)
        outstanding, of_tenant = self._tokens.total(), self._tenants[tenant]
        over = max(outstanding + tokens - self._cap, of_tenant + tokens - tenant_cap)
        if over > 0:
            self._note(now_ms, 0)
            is_full = outstanding + tokens > self._cap
            taken, cap = (outstanding, self._cap) if is_full else (of_tenant, tenant_cap)
            raise QueueFull.of(tokens, taken, cap, self._drain.seconds_for(over), is_tenant=not is_full)

    def enter(self, entry: Entry, now_ms: int) -> None:
        """Count a new request."""
        self._note(now_ms, 0)
        self._count(entry, 1, now_ms)

    def move(self, entry: Entry, status: Status, now_ms: int) -> None:
        """Change an entry's status and the totals with it."""
        self._note(now_ms, entry.place.tokens if status is Status.ENDED else 0)
        self._count(entry, -1, now_ms)
        entry.status = status
        if status is not Status.ENDED:
            self._count(entry, 1, now_ms)

    def bury(self, model: str) -> None:
        """Count a request that was given up."""
        self._dead[model] += 1

    def depth(self, model: str | None, now_ms: int) -> Depth:
        """Totals of one model, or of all."""

        def total(counts: Counter[tuple[str, Status]], status: Status) -> int:
            return sum(count for (name, at), count in counts.items() if at is status and model in (None, name))

        oldest = [next(iter(since.values())) for name, since in self._since.items() if model in (None, name)]
        return Depth(
            queued_requests=total(self._requests, Status.WAITING),
            queued_tokens=total(self._tokens, Status.WAITING),
            running_requests=total(self._requests, Status.RUNNING),
            running_tokens=total(self._tokens, Status.RUNNING),
            oldest_ms=now_ms - min(oldest, default=now_ms),
            dead_letters=self._dead.total() if model is None else self._dead[model],
        )

    def _count(self, entry: Entry, sign: int, now_ms: int) -> None:
        key = (entry.model, entry.status)
        for counts, amount in ((self._requests, sign), (self._tokens, sign * entry.place.tokens)):
            counts[key] += amount
            if not counts[key]:
                del counts[key]
        if entry.status is Status.WAITING:
            self._wait(entry, sign, now_ms)
        tenant = entry.facts.tenant
        self._tenants[tenant] += sign * entry.place.tokens
        if not self._tenants[tenant]:
            del self._tenants[tenant]

    def _wait(self, entry: Entry, sign: int, now_ms: int) -> None:
        since = self._since.setdefault(entry.model, {})
        if sign > 0:
            since[entry.request_id] = now_ms
        else:
            del since[entry.request_id]
        if not since:
            del self._since[entry.model]

    def _note(self, now_ms: int, ended_tokens: int) -> None:
        # Under pressure: somebody waits, or the queue is half full. Only then do ends say how fast work gets done.
        is_waiting = any(status is Status.WAITING for _, status in self._requests)
        is_pressed = is_waiting or 2 * self._tokens.total() >= self._cap
        self._drain.note(now_ms, is_pressed=is_pressed, ended_tokens=ended_tokens)


def check_size(tokens: int, cap: int, tenant_cap: int) -> None:
    """Raise RequestTooLarge for what can never be held."""
    if tokens > cap:
        raise RequestTooLarge(f"prompt and max_tokens make {tokens:,} tokens; the queue holds {cap:,}")
    if tokens > tenant_cap:
        raise RequestTooLarge(f"prompt and max_tokens make {tokens:,} tokens; a tenant may have {tenant_cap:,} at once")
