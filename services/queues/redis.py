"""wire.queue.Queue over Redis or Valkey: what many gateways and workers share.

State changes are Redis Functions (millrace.lua), one call each; this file carries arguments there and news back. News
come over one Pub/Sub channel of this object's own: tokens and terminals of the requests it submitted or follows, one
message for all that one call has changed. The log in Redis is the truth: a reader that finds a gap, or lost the
connection, reads it.

Redis away: calls raise Unavailable, readers wait, and everything goes on when it is back. A call whose reply was lost
is sent again, because functions recognise what is done (a `lease` by its nonce).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import fields
from typing import Any, Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.queues.accounts import check_size
from services.queues.drain_rate import seconds_to_drain
from services.queues.patience import first_of
from services.queues.protocol_core import QueueLimits, sealed, taken, unknown, unserved
from services.queues.redis_codec import append_arguments, read_leases, read_refusals, token_ids, unframed
from services.queues.redis_facts import RedisFacts, redis_facts
from services.queues.redis_library import Client, call_function, load_library
from services.queues.redis_news import Subscription
from services.queues.redis_reader import Follower, Reader
from wire.errors import QueueFull, Unavailable
from wire.messages import (
    Event,
    Facts,
    Generate,
    Tokens,
    WorkerReport,
    decode_event,
    decode_facts,
    decode_report,
    encode,
    fingerprint,
)
from wire.queue import (
    Append,
    Depth,
    Lease,
    LeaseBudget,
    Refusal,
    SeenWorker,
    Standing,
    Status,
)

logger = logging.getLogger(__name__)

RECONNECT_S: Final = 0.2
LONGEST_TIMER_S: Final = 3600.0
_STATUS: Final = {b"w": Status.WAITING, b"r": Status.RUNNING, b"e": Status.ENDED}
_LOST: Final = (RedisConnectionError, RedisTimeoutError, OSError)


class RedisQueue:
    """Use `await RedisQueue.open(...)`. One event loop owns it."""

    def __init__(self, client: Client, limits: QueueLimits, partition: str) -> None:
        self._client = client
        self._limits = limits
        self._prefix = f"mr:{{{partition}}}:"
        self._channel = f"{self._prefix}ev:{secrets.token_hex(8)}"
        self._limit_text = ",".join(str(int(getattr(limits, limit.name))) for limit in fields(limits))
        self._pubsub: Subscription | None = None
        self._listener: asyncio.Task[None] | None = None
        self._followers: dict[str, set[Follower]] = {}
        self._unread: dict[str, Follower] = {}  # of requests submitted here that nobody has come to read yet
        self._unanswered: dict[str, list[str]] = {}  # nonces of lease calls, by worker
        self._idle: dict[asyncio.Future[None], frozenset[str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._answers = True

    @classmethod
    async def open(cls, client: Client, limits: QueueLimits, *, partition: str = "0") -> RedisQueue:
        """Load the functions and begin to listen; the client is this queue's from now on, and closed with it.

        Raises Unavailable if Redis cannot be reached.
        """
        queue = cls(client, limits, partition)
        try:
            await load_library(client)
            queue._pubsub = await queue._subscribe()
            await queue.sweep()  # what fell due while nobody was connected; and shows that calls are served here
        except BaseException as error:
            await queue.close()
            if isinstance(error, _LOST):
                raise Unavailable(f"Redis cannot be reached: {error}") from error
            raise
        queue._listener = asyncio.create_task(queue._listen(), name="queue-news")
        return queue

    @property
    def is_connected(self) -> bool:
        """Whether Redis answered last time and news come in."""
        return self._answers and self._pubsub is not None

    # ---- the gateways' side ----

    async def submit(self, request: Generate) -> bool:
        request, body = sealed(request)
        tokens, cap = request.max_total_tokens, self._limits.max_queued_tokens
        tenant_cap = self._limits.max_tenant_tokens if request.tenant else cap
        check_size(tokens, cap, tenant_cap)
        deadline = "" if request.deadline_ms is None else request.deadline_ms
        # Before the call: who has heard of a request from its beginning need not look at its log.
        first = Follower(request.request_id, 0, must_look=self._pubsub is None)
        self.attach(first)
        outcome: bytes = b""
        try:
            outcome, *numbers = await self._call(
                "submit",
                *(request.request_id, fingerprint(request), body, encode(Facts.of(request)), request.model, tokens),
                *(len(request.prompt_ids), -request.priority, deadline, self._channel),
                *(request.tenant, request.weight, "1" if request.background else ""),
            )
        finally:
            if outcome == b"accepted":
                self._unread[request.request_id] = first
            else:
                self.detach(first)
        if outcome == b"conflict":
            raise taken(request.request_id)
        if outcome == b"unserved":
            raise unserved(request.model)
        if outcome in (b"full", b"tenant"):
            is_tenant = outcome == b"tenant"
            occupied, over, pressed, ended = int(numbers[0]), int(numbers[1]), float(numbers[2]), float(numbers[3])
            full = tenant_cap if is_tenant else cap
            raise QueueFull.of(tokens, occupied, full, seconds_to_drain(over, pressed, ended), is_tenant=is_tenant)
        return bool(outcome == b"accepted")

    async def standing(self, request_id: str) -> Standing:
        outcome, *found = await self._call("standing", request_id)
        if outcome == b"unknown":
            raise unknown(request_id)
        facts, status, num_tokens, terminal = found
        event = decode_event(terminal) if terminal else None
        if isinstance(event, Tokens):
            raise ValueError(f"request {request_id!r} ended with tokens; this is a bug")
        return Standing(decode_facts(facts), _STATUS[status], int(num_tokens), event)

    async def cancel(self, request_id: str) -> None:
        (outcome,) = await self._call("cancel", request_id)
        if outcome == b"unknown":
            raise unknown(request_id)

    async def abandon(self, request_id: str) -> None:
        self._forget_unread(request_id)
        await self._call("abandon", request_id, self._channel)

    def events(self, request_id: str, start: int = 0) -> AsyncIterator[Event]:
        return Reader(self, request_id, start, self._unread.pop(request_id, None) if start == 0 else None)

    async def report(self, report: WorkerReport) -> None:
        await self._call("report", report.worker_id, encode(report), int(report.is_draining), *report.models)

    async def workers(self) -> list[SeenWorker]:
        (found,) = await self._call("workers")
        seen = [SeenWorker(decode_report(raw), int(age_ms)) for raw, age_ms in found]
        return sorted(seen, key=lambda each: each.report.worker_id)

    async def depth(self, model: str | None = None) -> Depth:
        return Depth(*(int(number) for number in await self._call("depth", model or "")))

    async def redis(self) -> RedisFacts | None:
        """How Redis is; None if it does not say (where INFO is not allowed). Raises Unavailable."""
        self.check_open()
        try:
            answer: Any = self._client.info("memory", "persistence", "replication")
            return redis_facts(await answer)
        except ResponseError:
            return None
        except _LOST as error:
            self._note_away()
            raise Unavailable(f"Redis cannot be reached: {error}") from error

    # ---- the workers' side ----

    async def lease(self, budget: LeaseBudget, wait_s: float = 0.0, until: asyncio.Event | None = None) -> list[Lease]:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + wait_s
        while True:
            offered = self._await_offer(frozenset(budget.models))  # before the call: what comes meanwhile is not missed
            try:
                leases = await self._lease_once(budget)
                if leases or loop.time() >= give_up_s:
                    return leases
                await first_of(offered, until, give_up_s)
            finally:
                self._idle.pop(offered, None)
                offered.cancel()
            if self._is_closed or (until is not None and until.is_set()):
                return []

    async def _lease_once(self, budget: LeaseBudget) -> list[Lease]:
        # A call whose reply was lost is made again, by its nonce: the next call returns what it has handed out.
        nonces = self._unanswered.setdefault(budget.worker_id, [])
        nonce = nonces.pop() if nonces else secrets.token_hex(8)
        try:
            (found,) = await self._call(
                "lease",
                *(budget.worker_id, nonce, budget.max_requests, budget.max_tokens, budget.capacity_tokens),
                *(int(budget.takes_suspect), *budget.models),
            )
        except BaseException:
            nonces.append(nonce)
            raise
        return read_leases(found)

    async def publish(self, appends: Sequence[Append]) -> list[Refusal]:
        if not appends:
            return []
        arguments: list[object] = []
        for append in appends:
            arguments += append_arguments(append)
        (found,) = await self._call("publish", *arguments)
        return read_refusals(found)

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[Refusal]:
        if not leases:
            return []
        (found,) = await self._call("renew", *(part for lease in leases for part in lease))
        return read_refusals(found)

    async def release(self, leases: Sequence[tuple[str, int]]) -> None:
        if leases:
            await self._call("release", *(part for lease in leases for part in lease))

    async def sweep(self) -> None:
        """Apply what is due by Redis' clock: deadlines, lapsed leases, logs past their time."""
        await self._call("sweep")

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, *self._tasks, return_exceptions=True)
        for waiting in [*self._idle, *(each.woken for some in self._followers.values() for each in some)]:
            _wake(waiting)
        with contextlib.suppress(RedisError, OSError):
            if self._pubsub is not None:
                await self._pubsub.close()
            await self._client.aclose()

    # ---- for readers ----

    def check_open(self) -> None:
        """Raise Unavailable after close()."""
        if self._is_closed:
            raise Unavailable("the queue is closed")

    async def follow(self, request_id: str, start: int) -> tuple[list[int], Event | None]:
        """The log from `start` on and the terminal, if it is there; news of the request come from now on."""
        outcome, *found = await self._call("follow", request_id, start, self._channel)
        if outcome == b"unknown":
            raise unknown(request_id)
        log, terminal = found
        return token_ids(log), decode_event(terminal) if terminal else None

    def attach(self, follower: Follower) -> None:
        self._followers.setdefault(follower.request_id, set()).add(follower)

    def detach(self, follower: Follower) -> None:
        some = self._followers.get(follower.request_id)
        if some is not None:
            some.discard(follower)
            if not some:
                del self._followers[follower.request_id]

    # ---- calls ----

    async def _call(self, function: str, *arguments: object) -> list[Any]:
        self.check_open()
        for is_last in (False, True):
            try:
                reply = await call_function(self._client, function, self._prefix, self._limit_text, *arguments)
                self._answers = True
                break
            except _LOST as error:
                self._note_away()
                if is_last:
                    raise Unavailable(f"Redis cannot be reached: {error}") from error
        self._set_timer(int(reply[0]), int(reply[1]))
        rest: list[Any] = reply[2:]
        return rest

    def _note_away(self) -> None:
        """Not ready until Redis answers a ping again."""
        if self._answers:
            self._answers = False
            self._spawn(self._await_answer())

    async def _await_answer(self) -> None:
        while not self._answers and not self._is_closed:
            await asyncio.sleep(RECONNECT_S)
            with contextlib.suppress(RedisError, OSError):
                answer: Any = self._client.ping()
                await answer
                self._answers = True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set_timer(self, due_ms: int, now_ms: int) -> None:
        """Sweep when the next thing is due. All who are connected do; it is one cheap call that finds nothing twice."""
        if due_ms < 0 or self._is_closed or (self._timer is not None and self._timer_ms <= due_ms):
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = min(max(0.0, (due_ms - now_ms) / 1000 + 0.001), LONGEST_TIMER_S)
        self._timer_ms = due_ms
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._spawn(self._sweep_quietly())

    async def _sweep_quietly(self) -> None:
        with contextlib.suppress(Unavailable):
            await self.sweep()

    # ---- news ----

    async def _subscribe(self) -> Subscription:
        return await Subscription.open(self._client, self._channel, self._prefix + "work")

    async def _listen(self) -> None:
        """Hand out news until closed; after a lost connection, let every reader look at its log again."""
        while True:
            try:
                if self._pubsub is None:
                    self._pubsub = await self._subscribe()
                    self._wake_all()
                self._hear(*await self._pubsub.next())
            except Exception as error:  # a message that cannot be read must not leave every reader deaf either
                is_expected = isinstance(error, RedisError | OSError)
                logger.warning("queue news are interrupted", exc_info=not is_expected, extra={"reason": str(error)})
                lost, self._pubsub = self._pubsub, None
                if lost is not None:
                    await lost.close()
                await asyncio.sleep(RECONNECT_S)

    def _hear(self, channel: bytes, data: bytes) -> None:
        if channel.endswith(b":work"):
            model = data.decode()
            for waiting, models in self._idle.items():
                if model in models:
                    _wake(waiting)
            return
        for request_id, first_index, log, terminal in unframed(data):
            for follower in self._followers.get(request_id, ()):
                follower.hear(first_index, token_ids(log), decode_event(terminal) if terminal else None)
            if terminal:  # who comes now reads the log
                self._forget_unread(request_id)

    def _forget_unread(self, request_id: str) -> None:
        follower = self._unread.pop(request_id, None)
        if follower is not None:
            self.detach(follower)

    def _wake_all(self) -> None:
        for some in self._followers.values():
            for follower in some:
                follower.look_again()
        for waiting in self._idle:
            _wake(waiting)

    def _await_offer(self, models: frozenset[str]) -> asyncio.Future[None]:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle[woken] = models
        return woken


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
