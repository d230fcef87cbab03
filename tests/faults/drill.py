"""A drill: clients stream all the time while something happens to the processes, and every token is accounted for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tests.e2e.server import serve
from tests.faults.client import RETRY_S, Manner, Refused, record
from tests.faults.history import Body, History, judge
from tests.faults.scene import Scene, Stage

NEW_TOKENS = 400
STREAM_S = 120.0  # no stream may take longer
SETTLE_S = 60.0  # for what clients have left behind
LOOK_S = 0.1
# Greedy and sampled, each with a prompt of its own.
BODIES: Sequence[Body] = tuple(
    {
        "input_ids": [100 + 7 * number + 3 * position for position in range(3 + 40 * (number % 3))],
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "temperature": 0.9 * (number % 2),
        "seed": 11 + number,
        "deadline_ms": 600_000,
    }
    for number in range(8)
)


@dataclass
class Tally:
    """All streams of a drill together."""

    streams: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    worst_gap_s: float = 0.0
    resumes: int = 0
    refusals: int = 0
    takeovers: int = 0  # leases of requests that had been leased before
    exits: int = 0  # times that a process was not there though nobody had killed it
    left: int = 0  # requests that still wait or run when all is over
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.changed or self.exits or self.left or self.errors)


class Drill:
    """What a fault has at hand."""

    def __init__(self, scene: Scene, expected: Sequence[Sequence[int]], manner: Manner, seed: int) -> None:
        self.scene = scene
        self.chance = random.Random(seed)
        self.tally = Tally()
        self._expected = expected
        self._manner = manner

    async def stream(self, which: int, chance: random.Random | None = None) -> None:
        """One of BODIES, read to its end and judged. Raises Refused."""
        body = BODIES[which]
        try:
            async with asyncio.timeout(STREAM_S):
                history = await record(lambda: self.scene.addresses, body, self._manner, chance or self.chance)
        except TimeoutError:
            history = History(body, error=f"no end within {STREAM_S:.0f} s")
        self.count(history, which)

    def count(self, history: History, which: int) -> None:
        verdict, tally = judge(history, self._expected[which]), self.tally
        tally.streams += 1
        tally.lost += verdict.lost
        tally.doubled += verdict.doubled
        tally.changed += verdict.changed
        tally.worst_gap_s = max(tally.worst_gap_s, verdict.gap_s)
        tally.resumes += history.resumes
        if history.error:
            self.complain(history.error)

    def complain(self, what: str) -> None:
        self.tally.errors[what[:200]] += 1

    async def keep_streaming(self, number: int, over: asyncio.Event) -> None:
        """A client that asks for one stream after the other."""
        chance, turn = random.Random(number), number
        while not over.is_set():
            try:
                await self.stream(turn % len(BODIES), chance)
                turn += 1
            except Refused:
                self.tally.refusals += 1
                await asyncio.sleep(RETRY_S)

    def roll_call(self) -> None:
        """Whoever has ended by itself is found here, with its last words."""
        for process in self.scene.ended():
            self.tally.exits += 1
            self.complain("".join(process.output[-1:]).strip() or f"exit code {process.process.returncode}")

    async def settle(self) -> None:
        """When the clients have gone, nothing must run on."""
        for _ in range(round(SETTLE_S / LOOK_S)):
            self.tally.left = await asyncio.to_thread(self.scene.num_unfinished)
            if not self.tally.left:
                break
            await asyncio.sleep(LOOK_S)
        self.tally.takeovers = self.scene.num_leases() - self.scene.num_accepted()


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table in faults.py."""

    words: str
    happen: Callable[[Drill], Awaitable[None]]
    stage: Stage = Stage()
    manner: Manner = Manner()
    streams: int | None = None  # at a time; None = as the caller likes, 0 = the fault brings its own
    keeps_leases: bool = False  # no worker may lose a request over it


async def run_fault(
    scene: Scene,
    fault: Fault,
    expected: Sequence[Sequence[int]],
    *,
    runs: int,
    streams: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Tally:
    """`streams` clients stream without pause while the fault happens `runs` times at random moments."""
    drill, over = Drill(scene, expected, fault.manner, seed), asyncio.Event()
    async with asyncio.TaskGroup() as clients:
        for number in range(streams):
            clients.create_task(drill.keep_streaming(number, over))
        for number in range(runs):
            await asyncio.sleep(drill.chance.uniform(0.3, 1.0))
            await fault.happen(drill)
            drill.roll_call()
            progress(number + 1)
        over.set()
    await drill.settle()
    if fault.keeps_leases and drill.tally.takeovers:
        drill.complain(f"{drill.tally.takeovers} leases were lost")
    return drill.tally


@lru_cache(maxsize=1)
def tokens_without_faults(store: Path) -> list[list[int]]:
    """What BODIES give in one process, one after the other."""
    with serve(store, "up", threads="1", log_level="warning") as server, server.client() as client:
        answers = [client.post("/generate", json=dict(body)).raise_for_status().json() for body in BODIES]
    return [list(answer["token_ids"]) for answer in answers]
