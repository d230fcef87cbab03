"""A world's history made again on Redis, call by call at the same times: every answer must be the core's.

Some calls are executed twice, as when a connection breaks before the reply: the functions must recognise what is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from math import isclose
from random import Random
from typing import Any, Final, assert_never

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from tests.redis_server import redis_socket
from tests.simulation.books import demand
from tests.simulation.calls import (
    Abandon,
    Answer,
    Call,
    Cancel,
    Count,
    Logged,
    Look,
    Publish,
    Read,
    Refused,
    Release,
    Renew,
    Report,
    Submit,
    Sweep,
    Take,
    Workers,
    in_words,
)
from tests.simulation.world import LOST, Record
from wire.errors import MillraceError
from wire.queue import Refusal

BREAKS: Final = 0.1  # probability that a call loses its reply, and is made again
# What a partition keeps when everything is forgotten: counters, the dead, and who was there of late.
KEPT: Final = {"clock", "epoch", "arrivals", "acct", "fair", "drain", "dead", "workers", "seen", "l", "s"}


class BreakingRedis(Redis):
    """Executes a call and loses its reply, now and then. The next one is answered."""

    def __init__(self, seed: int) -> None:
        super().__init__(unix_socket_path=redis_socket())
        self._rng = Random(seed)
        self._has_broken = False
        self.num_broken = 0

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        answer: Any = super().fcall(function, numkeys, *keys_and_args)
        reply = await answer
        if function.endswith("_sweep"):  # the queue's timer makes these beside the history
            return reply
        self._has_broken = not self._has_broken and self._rng.random() < BREAKS
        if self._has_broken:
            self.num_broken += 1
            raise RedisConnectionError("the reply is lost")
        return reply


async def replay(history: Sequence[Record], limits: QueueLimits, seed: int) -> int:
    """How many calls were made again. Raises Violation at the first answer that differs from the history's."""
    partition = secrets.token_hex(4)
    prefix = f"mr:{{{partition}}}:"
    executed = [record for record in history if record.fate != LOST]
    async with BreakingRedis(seed) as client:
        await client.set(prefix + "clock", executed[0].at_ms)
        queue = await RedisQueue.open(client, limits, partition=partition)
        try:
            for record in executed:
                await client.set(prefix + "clock", record.at_ms)
                before = client.num_broken
                answer = await _answer(queue, record.call)
                words = f"seed {seed}: {in_words(record.call)} -> {in_words(answer)}, but {in_words(record.answer)}"
                demand(_agree(answer, record.answer, was_repeated=client.num_broken > before), words)
            left = {key.decode().removeprefix(prefix).split(":")[0] async for key in client.scan_iter(prefix + "*")}
            demand(left <= KEPT, f"seed {seed}: Redis keeps {left - KEPT}")
        finally:
            await queue.close()
        return client.num_broken


async def _answer(queue: RedisQueue, call: Call) -> Answer:
    try:
        return await _make(queue, call)
    except MillraceError as error:
        return Refused.by(error)


async def _make(queue: RedisQueue, call: Call) -> Answer:
    match call:
        case Publish(appends):
            return await queue.publish(appends)
        case Renew(leases):
            return await queue.renew(leases)
        case Take(budget, nonce):
            queue._unanswered[budget.worker_id] = [nonce]  # the one it takes when a reply was lost
            return await queue.lease(budget)
        case Read(request_id, start):
            token_ids, terminal = await queue.follow(request_id, start)
            return Logged(tuple(token_ids), terminal)
        case Submit(request):
            return await queue.submit(request)
        case Look(request_id):
            return await queue.standing(request_id)
        case Count(model):
            return await queue.depth(model)
        case Cancel(request_id):
            await queue.cancel(request_id)
        case Abandon(request_id):
            await queue.abandon(request_id)
        case Release(leases):
            await queue.release(leases)
        case Report(report):
            await queue.report(report)
        case Workers():
            return await queue.workers()
        case Sweep():
            await queue.sweep()
        case _:
            assert_never(call)
    return None


def _agree(answer: Answer, expected: Answer, *, was_repeated: bool) -> bool:
    if isinstance(answer, Refused) and isinstance(expected, Refused):
        if {answer.code, expected.code} == {"conflict", "request_too_large"}:
            return True  # both are so; Redis is asked only for what can fit
        waits = answer.retry_after_s or 0.0, expected.retry_after_s or 0.0
        return (answer.code, answer.message) == (expected.code, expected.message) and isclose(*waits, rel_tol=1e-9)
    if answer == expected:
        return True
    if not was_repeated:
        return False
    if expected is True:  # accepted by the call whose reply was lost
        return answer is False
    if isinstance(answer, list) and isinstance(expected, list):  # a cancelled request whose end came in the same call
        return [_refused(each) for each in answer] == [_refused(each) for each in expected]
    return False


def _refused(each: object) -> object:
    return (each.request_id, each.epoch) if isinstance(each, Refusal) else each
