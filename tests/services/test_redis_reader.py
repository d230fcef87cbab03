"""A reader of a log in Redis: news and the log's answers come over two connections, and either may be away."""

from __future__ import annotations

import asyncio

import pytest

from services.queues.redis_reader import Follower, Reader
from wire.errors import Unavailable
from wire.messages import Event, Finished, Tokens, Usage

END = Finished("r", "length", Usage(1, 5))


class Log:
    """What a reader needs of its queue; `follow` is each test's own."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.terminal: Event | None = None
        self.follower: Follower | None = None
        self.looks = 0

    def check_open(self) -> None:
        """It is."""

    def attach(self, follower: Follower) -> None:
        self.follower = follower

    def detach(self, _: Follower) -> None:
        self.follower = None


class OvertakenLog(Log):
    """It grows, and ends, between being read and the answer's arrival: the news of that are there first."""

    async def follow(self, _: str, start: int) -> tuple[list[int], Event | None]:
        self.looks += 1
        answer = self.tokens[start:], self.terminal
        if self.looks == 1:
            self.tokens += [4, 5]
            self.terminal = END
            assert self.follower is not None
            self.follower.hear(3, [4, 5], END)
        await asyncio.sleep(0)
        return answer


async def test_news_that_overtake_the_log_are_not_lost() -> None:
    log = OvertakenLog([1, 2, 3])
    async with asyncio.timeout(5):
        events = [event async for event in Reader(log, "r", 0)]
    assert [token for event in events if isinstance(event, Tokens) for token in event.token_ids] == [1, 2, 3, 4, 5]
    assert events[-1] == END
    assert log.looks == 2


class AwayLog(Log):
    """It answers with nothing, is away, and has ended when it is back."""

    async def follow(self, _: str, start: int) -> tuple[list[int], Event | None]:
        self.looks += 1
        if self.looks == 1:
            asyncio.get_running_loop().call_soon(self.lose)
            return [], None
        if self.looks == 2:
            raise Unavailable("away")
        return self.tokens[start:], END

    def lose(self) -> None:
        assert self.follower is not None
        self.follower.look_again()


async def test_a_reader_that_has_seen_its_request_waits_for_redis() -> None:
    """Also one that has no token yet: the request was accepted."""
    async with asyncio.timeout(5):
        events = [event async for event in Reader(AwayLog([1, 2, 3, 4, 5]), "r", 0)]
    assert events == [Tokens("r", 0, [1, 2, 3, 4, 5]), END]


class GoneLog(Log):
    """Never there."""

    async def follow(self, _: str, start: int) -> tuple[list[int], Event | None]:
        raise Unavailable("away")


async def test_a_reader_whose_request_nobody_has_seen_says_that_redis_is_away() -> None:
    with pytest.raises(Unavailable):
        await anext(Reader(GoneLog([]), "r", 0))
