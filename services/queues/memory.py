"""The embedded queue: the state machine of protocol_core.py with an event loop around it.

For one process (laptop, tests): requests and logs live in memory and end with the process. Apart from the core because
all that is asynchronous is here, and it is little: wake those who wait, and set one timer for what is due next.
Requests and events are encoded and decoded on their way through, so what works embedded works over Redis.

Everything here runs on ONE event loop; no method may be called from another thread (an engine's thread hands its events
over with loop.call_soon_threadsafe).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from services.queues.entry import Entry
from services.queues.patience import first_of
from services.queues.protocol_core import QueueCore, QueueLimits
from wire.errors import BadRequest, Unavailable
from wire.messages import Event, Generate, Tokens, WorkerReport
from wire.queue import Append, Depth, Lease, LeaseBudget, Refusal, SeenWorker, Standing

LONGEST_TIMER_S: Final = 86_400.0  # event loops differ in what they make of longer ones; a deadline may be weeks ahead


def steady_epoch_clock() -> Callable[[], int]:
    """ms since the Unix epoch, as Redis TIME reads, but never jumping: it follows the monotonic clock."""
    started_ns = time.time_ns() - time.monotonic_ns()
    return lambda: (started_ns + time.monotonic_ns()) // 1_000_000


class MemoryQueue:
    """wire.queue.Queue for one event loop.

    `now_ms` is the queue's clock. A test that moves its own clock calls `expire()` after moving it; otherwise a timer
    does.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int] | None = None,
        lease_ms: int = 6_000,
        max_deliveries: int = 3,
        max_queued_tokens: int = 4_000_000,
        max_tenant_tokens: int = 0,
        log_ttl_ms: int = 300_000,
        background_ttl_ms: int = 3_600_000,
        max_overtakes: int = 64,
        worker_ttl_ms: int = 30_000,
        refuses_unserved: bool = False,
    ) -> None:
        """`max_tenant_tokens`: 0 = as max_queued_tokens."""
        self._now_ms = now_ms or steady_epoch_clock()
        self._core = QueueCore(
            QueueLimits(
                lease_ms=lease_ms,
                max_deliveries=max_deliveries,
                max_queued_tokens=max_queued_tokens,
                max_tenant_tokens=max_tenant_tokens or max_queued_tokens,
                log_ttl_ms=log_ttl_ms,
                background_ttl_ms=background_ttl_ms,
                max_overtakes=max_overtakes,
                worker_ttl_ms=worker_ttl_ms,
                orphan_ms=1,  # there is one gateway, in this process: it does not die alone
                refuses_unserved=refuses_unserved,
            )
        )
        # Readers at the end of a log, by request id; waiting lease() calls and their models, oldest first.
        self._readers: dict[str, set[asyncio.Future[None]]] = {}
        self._idle: dict[asyncio.Future[None], frozenset[str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._is_closed = False

    async def submit(self, request: Generate) -> bool:
        with self._turn() as now:
            return self._core.submit(request, now)

    async def standing(self, request_id: str) -> Standing:
        with self._turn() as now:
            return self._core.standing(request_id, now)

    async def cancel(self, request_id: str) -> None:
        with self._turn() as now:
            self._core.cancel(request_id, now)

    async def abandon(self, request_id: str) -> None:
        with self._turn() as now:
            self._core.abandon(request_id, now)

    def events(self, request_id: str, start: int = 0) -> AsyncIterator[Event]:
        return _Reader(self, request_id, start)

    async def lease(self, budget: LeaseBudget, wait_s: float = 0.0, until: asyncio.Event | None = None) -> list[Lease]:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + wait_s
        while True:
            with self._turn() as now:
                leases = self._core.lease(budget, now)
            if leases or loop.time() >= give_up_s:
                return leases
            await self._offer(frozenset(budget.models), until, give_up_s)
            if self._is_closed or (until is not None and until.is_set()):
                return []

    async def publish(self, appends: Sequence[Append]) -> list[Refusal]:
        with self._turn() as now:
            return self._core.publish(appends, now)

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[Refusal]:
        with self._turn() as now:
            return self._core.renew(leases, now)

    async def release(self, leases: Sequence[tuple[str, int]]) -> None:
        with self._turn() as now:
            self._core.release(leases, now)

    async def report(self, report: WorkerReport) -> None:
        with self._turn() as now:
            self._core.report(report, now)

    async def workers(self) -> list[SeenWorker]:
        with self._turn() as now:
            return self._core.workers(now)

    async def depth(self, model: str | None = None) -> Depth:
        with self._turn() as now:
            return self._core.depth(model, now)

    async def close(self) -> None:
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for reader in [each for waiting in self._readers.values() for each in waiting]:
            _wake(reader)
        for worker in self._idle:
            _wake(worker)

    def expire(self) -> None:
        """Apply what is due by the queue's clock: deadlines, lapsed leases, logs past their time."""
        with self._turn() as now:
            self._core.expire(now)

    # --- waiting and waking -------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[int]:
        """One change of state, given the time; afterwards those it concerns wake and the timer is right."""
        self.check_open()
        now = self._now_ms()
        try:
            yield now
        finally:  # also when the core refuses: what was due has been applied before
            self._wake_concerned()
            self._set_timer(now)

    def _wake_concerned(self) -> None:
        core = self._core
        if core.grown:
            for request_id in core.grown:
                for reader in self._readers.get(request_id, ()):
                    _wake(reader)
            core.grown.clear()
        if core.offered:
            for worker, models in self._idle.items():
                if not models.isdisjoint(core.offered):
                    _wake(worker)
            core.offered.clear()

    def _set_timer(self, now: int) -> None:
        due_ms = self._core.next_alarm_ms
        if due_ms is None or (self._timer is not None and self._timer_ms <= due_ms):
            return  # a timer that goes off early finds nothing due and is set again
        if self._timer is not None:
            self._timer.cancel()
        delay_s = min((due_ms - now) / 1000.0, LONGEST_TIMER_S)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)
        self._timer_ms = due_ms

    def _on_timer(self) -> None:
        self._timer = None
        self.expire()

    async def _offer(self, models: frozenset[str], until: asyncio.Event | None, give_up_s: float) -> None:
        """Wait until a request of these models waits, or `until`, or the loop's time is `give_up_s`, or it closes."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle[woken] = models
        try:
            await first_of(woken, until, give_up_s)
        finally:
            del self._idle[woken]

    # --- for readers --------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise Unavailable after close()."""
        if self._is_closed:
            raise Unavailable("the queue is closed")

    def find(self, request_id: str) -> Entry:
        """The entry whose log a reader follows. Raises UnknownRequest."""
        with self._turn() as now:
            self._core.expire(now)
            return self._core.find(request_id)

    async def growth(self, request_id: str) -> None:
        """Wait until the request's log has grown, or the queue closes."""
        grown: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._readers.setdefault(request_id, set())
        waiting.add(grown)
        try:
            await grown
        finally:
            waiting.discard(grown)
            if not waiting and self._readers.get(request_id) is waiting:
                del self._readers[request_id]


class _Reader:
    """One call of events(): a position in a log.

    A plain object and not an async generator: a reader that is dropped half way leaves nothing to finalize. It waits
    only at the end of the log, and takes all that has come meanwhile in one event, so a slow one costs no memory beyond
    the log.
    """

    def __init__(self, queue: MemoryQueue, request_id: str, start: int) -> None:
        self._queue = queue
        self._request_id = request_id
        self._next = start
        self._entry: Entry | None = None
        self._has_ended = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._has_ended:
            raise StopAsyncIteration
        if self._next < 0:
            raise BadRequest(f"start is {self._next}; the first token has index 0", param="start")
        if self._entry is None:
            self._entry = self._queue.find(self._request_id)
        while (event := self._entry.read(self._next)) is None:
            self._queue.check_open()
            await self._queue.growth(self._request_id)
        if isinstance(event, Tokens):
            self._next = event.first_index + len(event.token_ids)
        else:
            self._has_ended = True
        return event


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
