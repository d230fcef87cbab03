"""The client of a queue over any kind of Redis: few connections for many calls, and it goes on after a failover.

A reply that says "not here" or "not now" counts as a Redis that is away, so who called tries again, over a new
connection and with it at the new master.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from services.queues.redis_address import RedisAddress, parse_address
from services.queues.redis_master import Finder, MasterPool, WrongAddress, of_cluster, of_sentinels

CONNECTIONS: Final = 16  # with calls on them at the same time; Redis executes one after the other
CALL_TIMEOUT_S: Final = 5.0  # for a reply, and for a free connection
CONNECT_TIMEOUT_S: Final = 2.0

_NOT_HERE: Final = (ReadOnlyError, MovedError)
_NOT_NOW: Final = (AskError, TryAgainError, ClusterDownError, OutOfMemoryError)
_NOT_NOW_WORDS: Final = ("NOREPLICAS ", "MISCONF ", "BUSY ")  # redis-py has no classes for these


class MasterClient(Redis):
    """Every call waits for its turn at a connection; news have one of their own."""

    def __init__(self, pool: ConnectionPool, num_connections: int) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._turns = asyncio.Semaphore(num_connections)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Raises RedisConnectionError also for want of a free connection within CALL_TIMEOUT_S."""
        # Not redis-py's blocking pool, which loses a connection for good if its user is cancelled while returning it.
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S if self._turns.locked() else None):
                await self._turns.acquire()
        except TimeoutError:
            raise RedisConnectionError(f"no connection has come free within {CALL_TIMEOUT_S:g} s") from None
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            # uvloop's word, which redis-py lets through, for a connection that was reset just before it was written to.
            raise RedisConnectionError(f"the connection has closed: {error}") from error
        finally:
            self._turns.release()

    async def parse_response(self, connection: Any, command_name: str | bytes, **options: Any) -> Any:
        try:
            return await super().parse_response(connection, command_name, **options)
        except _NOT_HERE as error:
            await self._leave(error)
            raise RedisConnectionError(f"this Redis is not the master: {error}") from error
        except ResponseError as error:
            if isinstance(error, _NOT_NOW) or str(error).startswith(_NOT_NOW_WORDS):
                raise RedisConnectionError(f"Redis does not serve this now: {error}") from error
            raise

    async def _leave(self, error: ResponseError) -> None:
        """Close every connection, that of news too: a demoted master lives on, and has none."""
        pool = self.connection_pool
        if isinstance(pool, MasterPool):
            pool.doubt()
        elif isinstance(error, MovedError):
            raise WrongAddress("this Redis is a node of a cluster: the address must begin with redis+cluster://")
        await pool.disconnect()


def redis_client(url: str, partition: str = "0") -> MasterClient:
    """A client that has not connected yet. Raises ValueError that says what is wrong with the address."""
    address = parse_address(url)
    options = {"socket_timeout": CALL_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S, **address.options}
    num_connections = options.pop("max_connections", CONNECTIONS)
    if num_connections < 1:
        raise ValueError(f"max_connections is {num_connections}; expected at least 1")
    pool = _pool(address, partition, options)
    try:
        # Connects to nobody; but an option that is none shows here and not at the first call.
        pool.make_connection()  # type: ignore[no-untyped-call]
    except TypeError as error:
        raise ValueError(f"one of its options is unknown: {error}") from None
    return MasterClient(pool, num_connections)


def _pool(address: RedisAddress, partition: str, options: dict[str, Any]) -> ConnectionPool:
    if not address.seeds:
        return ConnectionPool(**options)
    times = {"socket_timeout": CONNECT_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    question = of_sentinels(address.master) if address.master else of_cluster(key_slot(partition.encode()))
    return MasterPool(Finder(address.seeds, question, {**times, **address.seed_options}), **options)
