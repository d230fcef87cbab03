"""Random histories of calls, retries, zombies and clocks, each compared with the model of queue_model.py step by step.

Every token carries the epoch of the worker that computed it, so a token that is logged under the wrong lease, lost,
doubled or changed is seen as a difference. At the end everything must have reached exactly one terminal, and the
queue be empty.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from tests.contracts.queue_model import DELIVERIES, LEASE_MS, TTL_MS, Life, QueueModel
from tests.contracts.queues import (
    PATIENCE_S,
    QueueFactory,
    QueueOptions,
    QueueRig,
    budget,
    completion,
    finished,
    fold,
    generate,
    read,
    tokens,
)
from wire.errors import Conflict, UnknownRequest
from wire.messages import Event, Facts, Failed, Finished, Generate, Tokens, Usage
from wire.queue import Lease, Refusal, RefusalReason, Status

OPTIONS = QueueOptions(lease_ms=LEASE_MS, max_deliveries=DELIVERIES, log_ttl_ms=TTL_MS)
# Calls happen at multiples of 10 ms and deadlines 5 ms beside them: no two things fall due in the same tick.
TICK_MS = 5

request_ids = st.sampled_from(["a", "b", "c", "d"])
requests = st.builds(
    generate,
    request_ids,
    max_tokens=st.sampled_from([50, 60]),
    priority=st.sampled_from([-1, 0, 0, 1]),
    deadline_ms=st.sampled_from([None, None, None, 55, 205]),
)


class History(RuleBasedStateMachine):
    """One queue and its model. Every lease ever given out stays in the bundle: the old ones are the zombies."""

    factory: QueueFactory
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.model = QueueModel()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.epochs: set[int] = set()
        self.watching: list[tuple[Life, asyncio.Task[list[Event]]]] = []
        self.rig: QueueRig = self.runner.run(self.stack.enter_async_context(type(self).factory(OPTIONS)))
        self.queue = self.rig.queue

    # --- gateways -----------------------------------------------------------------------------------------------------

    @rule(request=requests)
    def submit(self, request: Generate) -> None:
        expected = self.model.submit(request)
        try:
            self.runner.run(self.queue.submit(request))
        except Conflict:
            assert expected == "conflict"
            return
        assert expected != "conflict"
        if expected == "accepted":
            self.runner.run(self._watch(self.model.known[request.request_id]))

    async def _watch(self, life: Life) -> None:
        self.watching.append((life, asyncio.create_task(read(self.queue, life.request.request_id))))
        await asyncio.sleep(0)

    @rule(request_id=request_ids)
    def submit_again(self, request_id: str) -> None:
        if request_id in self.model.known:
            self.runner.run(self.queue.submit(self.model.known[request_id].request))

    @rule(request_id=request_ids)
    def cancel(self, request_id: str) -> None:
        if request_id in self.model.known:
            self.runner.run(self.queue.cancel(request_id))
            self.model.cancel(request_id)
        else:
            with pytest.raises(UnknownRequest):
                self.runner.run(self.queue.cancel(request_id))

    @rule(request_id=request_ids)
    def look(self, request_id: str) -> None:
        life = self.model.known.get(request_id)
        if life is None:
            with pytest.raises(UnknownRequest):
                self.runner.run(self.queue.standing(request_id))
            return
        standing = self.runner.run(self.queue.standing(request_id))
        status = Status.ENDED if life.end else Status.WAITING if life.running_until_ms is None else Status.RUNNING
        assert (standing.facts, standing.status) == (Facts.of(life.request), status)
        assert standing.num_tokens == len(life.log)
        assert (standing.terminal is not None) == bool(life.end)

    @rule(request_id=request_ids, start=st.integers(0, 6))
    def read_from(self, request_id: str, start: int) -> None:
        life = self.model.known.get(request_id)
        if life is None:
            with pytest.raises(UnknownRequest):
                self.runner.run(read(self.queue, request_id, start))
        elif life.end:
            answer = self.runner.run(completion(self.queue, request_id, start))
            self._compare(life, answer.token_ids, answer.terminal, start)
        elif start < len(life.log):
            event = self.runner.run(self._next_event(request_id, start))
            assert isinstance(event, Tokens)
            assert event.first_index == start
            assert event.token_ids == life.log[start : start + len(event.token_ids)]

    async def _next_event(self, request_id: str, start: int) -> Event:
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self.queue.events(request_id, start))

    # --- workers ------------------------------------------------------------------------------------------------------

    @rule(target=leases, max_requests=st.integers(1, 3), takes_suspect=st.booleans())
    def lease(self, max_requests: int, takes_suspect: bool):  # type: ignore[no-untyped-def]  # multiple() has no type
        expected = self.model.handed_out(max_requests, takes_suspect=takes_suspect)
        given = self.runner.run(self.queue.lease(budget(max_requests=max_requests, takes_suspect=takes_suspect)))
        assert [lease.request for lease in given] == [life.request for life in expected]
        for life, lease in zip(expected, given, strict=True):
            assert lease.is_suspect == life.is_suspect
            assert lease.epoch not in self.epochs
            self.epochs.add(lease.epoch)
            self.model.lease(life, lease.epoch)
            assert (list(lease.token_ids), lease.delivery) == (life.log, life.deliveries)
        return multiple(*given)

    @rule(lease=leases, back=st.integers(0, 3), count=st.integers(1, 4), is_last=st.booleans(), times=st.integers(1, 2))
    def publish(self, lease: Lease, back: int, count: int, is_last: bool, times: int) -> None:
        """`back` tokens that were sent before, then new ones, perhaps the end; the reply may be lost (twice)."""
        request_id = lease.request.request_id
        life = self.model.known.get(request_id)
        logged = len(life.log) if life is not None else len(lease.token_ids)
        first = max(0, logged - back)
        token_ids = [1000 * lease.epoch + index for index in range(first, first + count)]
        appends = [tokens(lease, first, *token_ids)]
        for _ in range(times):
            expected = [self.model.tokens(request_id, lease.epoch, first, token_ids)]
            if is_last:
                length = max(logged, first + count)
                appends = [appends[0], finished(lease, length)]
                expected.append(self.model.finish(request_id, lease.epoch, length))
            refusals = self.runner.run(self.queue.publish(appends))
            assert refusals == self._refusals(lease, expected)

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        request_id = lease.request.request_id
        refusals = self.runner.run(self.queue.renew([(request_id, lease.epoch)]))
        assert refusals == self._refusals(lease, [self.model.renew(request_id, lease.epoch)])

    @rule(lease=leases, times=st.integers(1, 2))
    def release(self, lease: Lease, times: int) -> None:
        request_id = lease.request.request_id
        for _ in range(times):
            self.runner.run(self.queue.release([(request_id, lease.epoch)]))
            self.model.release(request_id, lease.epoch)

    @rule(lease=consumes(leases))
    def bury(self, lease: Lease) -> None:
        """A worker dies: its lease is never used again."""

    def _refusals(self, lease: Lease, reasons: list[RefusalReason | None]) -> list[Refusal]:
        request_id = lease.request.request_id
        return [Refusal(request_id, reason, lease.epoch) for reason in reasons if reason is not None]

    # --- time ---------------------------------------------------------------------------------------------------------

    @rule(ticks=st.sampled_from([2, 2, 4, 10, 22, 62]))
    def pass_time(self, ticks: int) -> None:
        self.runner.run(self._pass(ticks))

    async def _pass(self, ticks: int) -> None:
        for _ in range(ticks):
            await self.rig.advance(TICK_MS)
            self.model.tick(TICK_MS)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def depth_is_what_waits_and_runs(self) -> None:
        assert self.runner.run(self.queue.depth()) == self.model.depth()

    @invariant()
    def nobody_ends_before_the_log_does(self) -> None:
        for life, reading in self.watching:
            assert life.end or not reading.done()

    def teardown(self) -> None:
        """Workers die for ever: even so everything accepted must end, once, and leave nothing behind."""
        try:
            self.runner.run(self._wind_up())
        finally:
            for _, reading in self.watching:
                reading.cancel()
            self.runner.run(self.stack.aclose())
            self.runner.close()

    async def _wind_up(self) -> None:
        for _ in range(DELIVERIES + 4):  # of suspects only one at a time
            given = await self.queue.lease(budget())
            for life, lease in zip(self.model.handed_out(100, takes_suspect=True), given, strict=True):
                self.model.lease(life, lease.epoch)
            await self._pass(LEASE_MS // TICK_MS)
        assert await self.queue.depth() == self.model.depth()
        assert all(life.end for life in self.model.known.values())
        for life, reading in self.watching:
            answer = fold(await asyncio.wait_for(reading, PATIENCE_S))
            self._compare(life, answer.token_ids, answer.terminal, 0)
        await self._pass(TTL_MS // TICK_MS)
        for request_id in ("a", "b", "c", "d"):
            with pytest.raises(UnknownRequest):
                await read(self.queue, request_id)

    def _compare(self, life: Life, token_ids: list[int], terminal: Finished | Failed, start: int) -> None:
        assert token_ids == life.log[start:]
        if isinstance(terminal, Finished):
            assert terminal.reason == life.end
            assert terminal.usage == Usage(len(life.request.prompt_ids), len(life.log))
        else:
            assert terminal.code == life.end


def test_random_histories_agree_with_the_model(queue_factory: QueueFactory) -> None:
    machine = type("History", (History,), {"factory": staticmethod(queue_factory)})
    run_machine(
        machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )
