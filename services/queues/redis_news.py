"""What is heard over one connection: confirmed before it is relied on, asked for a sign of life when it is silent."""

from __future__ import annotations

import contextlib
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

SILENCE_S: Final = 5.0  # then Redis is asked whether it is there; after twice as long it is not


class Subscription:
    """Use `await Subscription.open(...)`. When anything fails it is over; open another."""

    def __init__(self, pubsub: PubSub, silence_s: float) -> None:
        self._pubsub = pubsub
        self._silence_s = silence_s

    @classmethod
    async def open(cls, client: Redis, *channels: str, silence_s: float = SILENCE_S) -> Subscription:
        """From its return on nothing that is published is missed. Raises RedisError or OSError."""
        subscription = cls(client.pubsub(), silence_s)
        try:
            await subscription._pubsub.subscribe(*channels)
            for _ in channels:
                if await subscription._pubsub.get_message(timeout=silence_s) is None:
                    raise RedisConnectionError(f"Redis has not confirmed a subscription within {silence_s:g} s")
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def next(self) -> tuple[bytes, bytes]:
        """(channel, message). Raises RedisError or OSError when Redis is gone, or silent for twice `silence_s`."""
        is_asked = False
        while True:
            message = await self._pubsub.get_message(timeout=self._silence_s)
            if message is None:
                if is_asked:
                    raise RedisConnectionError(f"Redis has been silent for {2 * self._silence_s:g} s")
                await self._pubsub.ping()
                is_asked = True
            elif message["type"] == "message":
                return message["channel"], message["data"]
            else:
                is_asked = False  # a pong

    async def close(self) -> None:
        """Not left to redis-py, whose pool would keep the connection, and Redis a listener whom nobody hears."""
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]
