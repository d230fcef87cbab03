"""The ways to load a system: a closed loop, whose clients wait for their answers, and an open one, that does not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.serve.client import Answer, Client
from bench.serve.figures import milliseconds, percentile, rate_within
from bench.serve.workload import stop

RETRY_S = 0.1
SPREAD_S = 2.0
END_S = 60.0
MOST_IN_FLIGHT = 4_000  # an open loop's; more is not sent, and counted


@dataclass(slots=True)
class Outcomes:
    """Every answer of a load, beside when its request was due: before it was sent, if the client was late."""

    answers: list[tuple[float, Answer]] = field(default_factory=list)
    unsent: int = 0
    unfinished: int = 0  # cancelled, as no end came

    def report(self, deadline_s: float, start: float, end: float) -> dict[str, Any]:
        """Of all answers; the rate is of those that were good and ended from `start` to `end`.

        Good: whole, within `deadline_s` from when it was due.
        """
        answers = [answer for _, answer in self.answers]
        good = [each for due, each in self.answers if each.is_whole and each.ended_at - due <= deadline_s]
        first_s = [each.times[0] - due for due, each in self.answers if each.is_whole]
        refusal_s = [each.ended_at - due for due, each in self.answers if each.is_refused]
        failed = [each for each in answers if not each.is_whole and not each.is_refused]
        return {
            "sent": len(answers),
            "unsent": self.unsent,
            "unfinished": self.unfinished,
            "good": len(good),
            "good_per_s": round(rate_within([each.ended_at for each in good], start, end), 2),
            "late": sum(each.is_whole for each in answers) - len(good),
            "refused": dict(Counter(str(each.status) for each in answers if each.is_refused)),
            "errors": dict(Counter(each.error or f"status {each.status}" for each in failed)),
            "ttft_ms_p50": milliseconds(percentile(first_s, 50)),
            "ttft_ms_p99": milliseconds(percentile(first_s, 99)),
            "refusal_ms_p50": milliseconds(percentile(refusal_s, 50)),
            "refusal_ms_p99": milliseconds(percentile(refusal_s, 99)),
            "sent_late_ms_p99": milliseconds(percentile([each.sent_at - due for due, each in self.answers], 99)),
        }


async def closed_loop(
    client: Client, requests: Iterator[bytes], clients: int, seconds: float
) -> tuple[Outcomes, float, float]:
    """`clients` that ask again as soon as they are answered; when it began, and when no more was asked.

    They begin one after the other, within SPREAD_S: all at once their answers would come in waves, and how many waves
    end within the time would decide the rate.
    """
    outcomes = Outcomes()
    start = time.perf_counter()
    end = start + seconds

    async def one(number: int) -> None:
        await asyncio.sleep(min(SPREAD_S, seconds) * number / clients)
        while time.perf_counter() < end:
            answer = await client.ask(next(requests))
            outcomes.answers.append((answer.sent_at, answer))
            if not answer.is_whole:
                await asyncio.sleep(RETRY_S)

    outcomes.unfinished = await stop([asyncio.create_task(one(number)) for number in range(clients)], seconds + END_S)
    return outcomes, start, end


class OpenLoop:
    """Requests at their times, however long answers take."""

    def __init__(self, client: Client, requests: Iterator[bytes]) -> None:
        self._client = client
        self._requests = requests
        self._tasks: set[asyncio.Task[None]] = set()
        self.outcomes = Outcomes()

    async def run(self, arrivals: Sequence[float]) -> tuple[float, float]:
        """Send each when it is due (s from now on); when that began and when the last was sent."""
        start = time.perf_counter()
        for arrival in arrivals:
            wait_s = start + arrival - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if len(self._tasks) >= MOST_IN_FLIGHT:
                self.outcomes.unsent += 1
                continue
            task = asyncio.create_task(self._one(start + arrival))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return start, time.perf_counter()

    async def finish(self, patience_s: float) -> None:
        """Wait for the answers that are still to come."""
        self.outcomes.unfinished = await stop(list(self._tasks), patience_s)

    async def _one(self, due: float) -> None:
        self.outcomes.answers.append((due, await self._client.ask(next(self._requests))))
