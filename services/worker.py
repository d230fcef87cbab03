"""A worker: takes work from the queue, runs the engine on a thread of its own, puts events back.

    queue --lease--> inbox --> [engine thread: step, step, step] --> outbox --publish--> queue

The engine is synchronous and its step blocks in the model, so it owns a thread; asyncio owns the queue. Between them
are two deques: commands one way, events the other. Nothing waits on the queue inside a step, and one publish carries
all events that have gathered since the last. Leases are renewed only while steps commit: a hung engine loses its work
to a living one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from batcher.backend import BackendError, BackendLimits
from batcher.engine import Engine
from services.telemetry.worker import EngineSource, LeaseMetrics
from wire.errors import Unavailable
from wire.messages import Failed, Finished, Generate, WorkerReport
from wire.queue import Append, Lease, LeaseBudget, Queue, Refusal, RefusalReason

logger = logging.getLogger(__name__)

# How far beyond the KV pool a worker takes work. Requests rarely use all of max_tokens, and when they do the batcher
# preempts; a few waiting ones keep the batch full when others end.
OVERCOMMIT = 2.0
# An engine that has work and has not committed a step for this long is hung: liveness fails and its leases lapse.
HUNG_AFTER_S = 30.0
# Renewals also carry cancellations to requests that emit nothing yet (a long prefill), so they are not rare.
RENEW_AT_MOST_S = 0.5
REPORT_S = 2.0
AWAY_RETRY_S = 0.2


@dataclass(slots=True)
class _Owned:
    """A leased request that has not reached its terminal event."""

    request: Generate
    epoch: int
    is_suspect: bool


class Worker:
    """One engine's place in the fleet: make it, `await run()` until `stop()`."""

    def __init__(
        self,
        worker_id: str,
        model_id: str,
        engine: Engine,
        limits: BackendLimits,
        queue: Queue,
        *,
        lease_s: float,
        metrics: LeaseMetrics | None = None,
    ) -> None:
        self._worker_id = worker_id
        self.model_id = model_id
        self._engine = engine
        self._queue = queue
        self._lease_s = lease_s
        self.limits = limits
        self._metrics = metrics or LeaseMetrics(CollectorRegistry())
        self._metrics.serves(model_id)
        self.load = engine.load  # as of the last step; any thread may read it
        self._owned: dict[str, _Owned] = {}
        self._inbox: deque[Callable[[], object]] = deque()
        self._outbox: deque[Append] = deque()
        self._wake_engine = threading.Event()
        self._work_changed = asyncio.Event()
        self._outbox_filled = asyncio.Event()
        self._stopping = False
        self._draining = False
        self._fatal: BaseException | None = None
        self._last_step = time.monotonic()
        self._step_began: float | None = None  # None between steps
        self._is_idle = True
        self._was_away = False

    @property
    def is_alive(self) -> bool:
        """Steps commit, or nothing waits."""
        return self._fatal is None and (self._is_idle or time.monotonic() - self._last_step < HUNG_AFTER_S)

    @property
    def _is_stalled(self) -> bool:
        """A step takes so long that it may never end. What this worker loses by it, it must not lease again.

        A quarter of a lease, and calls of `lease` wait for half of one: the last has ended before a lease lapses.
        """
        began = self._step_began
        return began is not None and time.monotonic() - began > self._lease_s / 4

    @property
    def is_ready(self) -> bool:
        return self.is_alive and not self._draining

    @property
    def source(self) -> EngineSource:
        """What metrics read of this worker."""
        return EngineSource(self.model_id, lambda: self.load, lambda: self.is_alive)

    @property
    def running_requests(self) -> int:
        return len(self._owned)

    async def run(self) -> None:
        """Serve until `stop()`. Raises BackendError when the backend is lost; what was leased is handed back first."""
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._run_engine, args=(loop,), name=f"engine-{self.model_id}", daemon=True)
        thread.start()
        loops = (self._lease_loop, self._publish_loop, self._renew_loop, self._report_loop)
        tasks = [asyncio.create_task(each()) for each in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop ends only by stop() or by an error
        finally:
            self._stopping = True
            self._wake_engine.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(thread.join, 10.0)
            with contextlib.suppress(Unavailable):  # they lapse
                await self._queue.release([(rid, owned.epoch) for rid, owned in self._owned.items()])
            self._owned.clear()
        if self._fatal is not None:
            raise self._fatal

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish for `timeout_s`, then stop; what is left is handed back by `run`."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        goodbye = asyncio.create_task(self.report())  # not awaited: the queue may be away
        while self._owned and time.monotonic() < deadline and self._fatal is None:
            self._work_changed.clear()
            try:
                await asyncio.wait_for(self._work_changed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
        goodbye.cancel()
        self.stop()

    def stop(self) -> None:
        """End `run` now."""
        self._stopping = True
        self._wake_engine.set()
        self._work_changed.set()
        self._outbox_filled.set()

    # --- the asyncio side ---------------------------------------------------------------------------------------------

    async def _lease_loop(self) -> None:
        while not self._stopping:
            self._work_changed.clear()
            if self._is_stalled:
                await asyncio.sleep(self._lease_s / 4)
                continue
            budget = self._budget()
            if self._draining or budget.max_requests < 1 or budget.max_tokens < 1:
                await self._work_changed.wait()
                continue
            try:
                # What waits may be too large for what is free: then room that appears is a reason to ask again.
                is_tight = budget.max_tokens < budget.capacity_tokens or not budget.takes_suspect
                until = self._work_changed if is_tight else None
                leases = await self._queue.lease(budget, self._lease_s / 2, until)
            except Unavailable as error:
                await self._queue_is_away(error)
                continue
            if self._draining:  # the call was waiting when the drain began
                with contextlib.suppress(Unavailable):  # they lapse
                    await self._queue.release([(lease.request.request_id, lease.epoch) for lease in leases])
                continue
            self._was_away = False
            for lease in leases:
                self._accept(lease)

    def _budget(self) -> LeaseBudget:
        limits = self.limits
        capacity = limits.num_blocks * limits.block_size
        taken = sum(owned.request.max_total_tokens for owned in self._owned.values())
        return LeaseBudget(
            worker_id=self._worker_id,
            models=(self.model_id,),
            max_requests=2 * limits.max_batch_seqs - len(self._owned),
            max_tokens=int(OVERCOMMIT * capacity) - taken,
            capacity_tokens=capacity,
            takes_suspect=not any(owned.is_suspect for owned in self._owned.values()),
        )

    def _accept(self, lease: Lease) -> None:
        request = lease.request
        self._metrics.leased(self.model_id, lease)
        self._owned[request.request_id] = _Owned(request, lease.epoch, lease.is_suspect)
        self._command(partial(self._engine.add, request, lease.token_ids, lease.epoch))

    def _command(self, command: Callable[[], object]) -> None:
        self._inbox.append(command)
        self._is_idle = False
        self._wake_engine.set()

    async def _publish_loop(self) -> None:
        while not self._stopping:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            appends = [self._outbox.popleft() for _ in range(len(self._outbox))]
            if not appends:
                continue
            refusals = await self._publish(appends)
            for append in appends:
                event = append.event
                if isinstance(event, Finished | Failed):
                    self._forget(event.request_id, append.epoch)
                else:
                    self._acquit(event.request_id, append.epoch)
            for refusal in refusals:
                self._refused(refusal)

    async def _publish(self, appends: Sequence[Append]) -> list[Refusal]:
        """Publish, however long the queue is away: what comes late is fenced if somebody else has taken over."""
        while True:
            started_s = time.monotonic()
            try:
                refusals = await self._queue.publish(appends)
                self._metrics.published(self.model_id, time.monotonic() - started_s)
                return refusals
            except Unavailable as error:
                if self._stopping:
                    return []
                await self._queue_is_away(error)

    async def _queue_is_away(self, error: Unavailable) -> None:
        if not self._was_away:
            logger.warning("the queue is away", extra={"reason": error.message})
        self._was_away = True
        await asyncio.sleep(AWAY_RETRY_S)

    def _acquit(self, request_id: str, epoch: int) -> None:
        """It has computed a token: no suspect any more, so the next may come."""
        owned = self._owned.get(request_id)
        if owned is not None and owned.epoch == epoch and owned.is_suspect:
            owned.is_suspect = False
            self._work_changed.set()

    def _forget(self, request_id: str, epoch: int) -> None:
        owned = self._owned.get(request_id)
        if owned is not None and owned.epoch == epoch:
            del self._owned[request_id]
            self._work_changed.set()

    def _refused(self, refusal: Refusal) -> None:
        owned = self._owned.get(refusal.request_id)
        if owned is None or owned.epoch != refusal.epoch:  # we lost it, and hold it again under a newer lease
            return
        if refusal.reason is RefusalReason.CANCELLED:  # the engine ends it with Finished("cancelled")
            self._command(partial(self._engine.cancel, refusal.request_id))
            return
        if refusal.reason is RefusalReason.FENCED:
            self._metrics.fenced(self.model_id)
        # Somebody else's now, or ended: free its blocks in silence.
        del self._owned[refusal.request_id]
        self._command(partial(self._engine.drop, refusal.request_id))
        self._work_changed.set()

    async def _renew_loop(self) -> None:
        seen = -1.0
        while not self._stopping:
            await asyncio.sleep(min(self._lease_s / 3, RENEW_AT_MOST_S))
            # A lease is kept by progress, not by this timer: renew only if a step has been committed since the last
            # time.
            if self._owned and (self._last_step != seen or self._is_idle):
                seen = self._last_step
                leases = [(rid, owned.epoch) for rid, owned in self._owned.items()]
                with contextlib.suppress(Unavailable):  # the next time, or the lease lapses
                    for refusal in await self._queue.renew(leases):
                        self._refused(refusal)

    async def _report_loop(self) -> None:
        while not self._stopping:
            if self.is_alive:  # a hung engine is not there
                await self.report()
            await asyncio.sleep(REPORT_S)

    async def report(self) -> None:
        """Be known to the queue; if it is away, the next time."""
        load = self.load
        report = WorkerReport(
            worker_id=self._worker_id,
            models=[self.model_id],
            capacity_tokens=load.capacity_tokens,
            free_tokens=load.free_tokens,
            running_requests=len(self._owned),
            is_draining=self._draining,
        )
        with contextlib.suppress(Unavailable):
            await self._queue.report(report)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while not self._stopping:
                self._wake_engine.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if not self._engine.has_work:
                    self._is_idle = not self._inbox
                    self._wake_engine.wait(timeout=1.0)
                    continue
                self._step_began = time.monotonic()
                appends = self._engine.step()
                self._last_step = time.monotonic()
                self._step_began = None
                self.load = self._engine.load
                if appends:
                    self._outbox.extend(appends)
                    loop.call_soon_threadsafe(self._outbox_filled.set)
        except BaseException as error:  # the thread's edge: whatever it is, the worker must stop and say so
            self._fatal = error
            logger.error("engine stopped", exc_info=not isinstance(error, BackendError), extra={"reason": str(error)})
            loop.call_soon_threadsafe(self._fail)

    def _fail(self) -> None:
        self._draining = True
        self.stop()
