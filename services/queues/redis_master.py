"""Where the master is now, and connections that go there.

Asked of a sentinel, or of a node of the cluster, whenever a connection must be made, and once a second. A queue lives
in one hash slot, so in a cluster too it has one master at a time, and a plain client that finds it serves all kinds of
Redis. redis-py's own cluster client would not do. It follows ASK, where a function runs on half of its keys; and its
news may come from any node, while PUBLISH counts only who listens at its own: by a count of nought dead gateways show.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

Address = tuple[str, int]

CHECK_EVERY_S: Final = 1.0


class WrongAddress(RedisConnectionError):
    """What answers is not what the address says it is."""


MISTAKES: Final = (WrongAddress, AuthenticationError)  # in the settings: no waiting mends them


@dataclass(frozen=True, slots=True)
class Found:
    """`others`: nodes that can be asked the next time."""

    master: Address
    others: tuple[Address, ...] = ()


Question = Callable[[Redis, Address], Awaitable[Found]]


def of_sentinels(name: str) -> Question:
    """The question to a sentinel: where is the master that it watches by this name?"""

    async def ask(seed: Redis, address: Address) -> Found:
        reply: list[bytes] | None = await _execute(seed, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
        if reply is None:
            raise WrongAddress(f"the sentinel at {_text(address)} knows no master {name!r}")
        return Found((reply[0].decode(), int(reply[1])))

    return ask


def of_cluster(slot: int) -> Question:
    """The question to a node of a cluster: who is the master of this hash slot?"""

    async def ask(seed: Redis, address: Address) -> Found:
        ranges: list[Any] = await _execute(seed, "CLUSTER", "SLOTS")
        others = tuple({_node(node, address) for each in ranges for node in each[2:]})
        for first, last, master, *_ in ranges:
            if first <= slot <= last:
                return Found(_node(master, address), others)
        raise RedisConnectionError(f"nobody serves hash slot {slot}, says {_text(address)}")

    return ask


class Finder:
    """Asks one seed after the other. A seed that failed or misled is asked last from then on."""

    def __init__(self, seeds: Sequence[Address], question: Question, options: dict[str, Any]) -> None:
        """`options`: of connections to seeds."""
        self._given = tuple(seeds)
        self._seeds = deque(seeds)
        self._question = question
        self._options = options
        self._lock = asyncio.Lock()
        self._num_asked = 0
        self._outcome: Address | RedisError = RedisConnectionError("nobody was asked")

    def doubt(self) -> None:
        """The last answer has led nowhere."""
        self._seeds.rotate(-1)

    async def find(self) -> Address:
        """Host and port. Raises RedisConnectionError if nobody knows, or one of MISTAKES."""
        num_asked = self._num_asked
        async with self._lock:
            if self._num_asked == num_asked:  # else somebody has asked while this one waited
                self._outcome = await self._ask_all()
                self._num_asked += 1
            if isinstance(self._outcome, RedisError):
                raise self._outcome
            return self._outcome

    async def _ask_all(self) -> Address | RedisError:
        errors: list[Exception] = []
        for _ in range(len(self._seeds)):
            try:
                found = await self._ask(self._seeds[0])
            except (RedisError, OSError) as error:
                errors.append(error)
                self._seeds.rotate(-1)
            else:
                self._learn(found.others)
                return found.master
        mistakes = [each for each in errors if isinstance(each, MISTAKES)]
        if mistakes:
            return mistakes[0]
        return RedisConnectionError("no master is known: " + "; ".join(str(each) for each in errors))

    async def _ask(self, address: Address) -> Found:
        host, port = address
        async with Redis.from_pool(ConnectionPool(host=host, port=port, **self._options)) as seed:
            try:
                return await self._question(seed, address)
            except ResponseError as error:
                raise WrongAddress(f"{_text(address)} cannot say where the master is: {error}") from error

    def _learn(self, others: Sequence[Address]) -> None:
        known = dict.fromkeys([*self._given, *others])
        kept = [seed for seed in self._seeds if seed in known]
        self._seeds = deque([*kept, *(seed for seed in known if seed not in kept)])


class MasterPool(ConnectionPool):
    """Connections that go where the finder says; when that is somewhere else than before, the old ones are closed.

    Also while they work it asks, now and then: sentinels leave a superseded master alone for ten seconds, which takes
    writes that are lost afterwards.
    """

    def __init__(self, finder: Finder, **options: Any) -> None:
        super().__init__(**options)
        self._finder = finder
        self._master: Address | None = None
        self._check: asyncio.Task[None] | None = None
        self._check_s = 0.0  # the loop's time of the next

    def doubt(self) -> None:
        """Somebody who was taken for the master is not."""
        self._finder.doubt()

    async def ensure_connection(self, connection: Any) -> None:
        """Connected, with nothing left to read; a new connection first asks where to."""
        self._check_sometimes()
        if connection.is_connected and not await _is_spent(connection):
            return
        await connection.disconnect()
        address = await self._find()
        connection.host, connection.port = address
        try:
            await connection.connect()
        except (RedisError, OSError):
            self._finder.doubt()
            raise
        if self._master != address:  # it was found elsewhere meanwhile
            await connection.disconnect()
            raise RedisConnectionError(f"{_text(address)} is the master no longer")

    async def aclose(self) -> None:
        if self._check is not None:
            self._check.cancel()
            await asyncio.gather(self._check, return_exceptions=True)
        await super().aclose()

    async def _find(self) -> Address:
        address = await self._finder.find()
        before, self._master = self._master, address
        if before not in (None, address):
            await self.disconnect()
        return address

    def _check_sometimes(self) -> None:
        """In a task of its own: no call waits for seeds while there is a master that answers."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._check_s and (self._check is None or self._check.done()):
            self._check_s = loop.time() + CHECK_EVERY_S
            self._check = loop.create_task(self._find_quietly())

    async def _find_quietly(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._find()


async def _execute(seed: Redis, *words: str) -> Any:
    return await seed.execute_command(*words)  # type: ignore[no-untyped-call]


async def _is_spent(connection: Any) -> bool:
    """Closed by the other side, or with a reply that nobody has read."""
    try:
        return bool(await connection.can_read_destructive())
    except (RedisError, OSError):
        return True


def _node(node: Sequence[Any], asked: Address) -> Address:
    """A node that does not know its own host is where it was asked."""
    host = (node[0] or b"?").decode()
    return (asked[0] if host == "?" else host), int(node[1])


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
