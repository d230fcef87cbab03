"""A gateway, workers and Redis as real processes, clients that stream all the time, and faults among them."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.e2e.server import Server, serve
from tests.faults.history import Body, History, Refused, Verdict, judge, record
from tests.redis_server import RedisServer

LEASE_S = 1.0
NEW_TOKENS = 400
RETRY_S = 0.1
# Greedy and sampled, each with a prompt of its own.
BODIES: Sequence[Body] = tuple(
    {
        "input_ids": [100 + 7 * number + 3 * position for position in range(3 + 40 * (number % 3))],
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "temperature": 0.9 * (number % 2),
        "seed": 11 + number,
    }
    for number in range(8)
)


class Scene:
    """The processes. Faults change them from a thread or between awaits; nothing here is shared with the clients."""

    def __init__(self, store: Path, directory: Path, num_workers: int) -> None:
        self._store = store
        self._num_workers = num_workers
        self._stack = ExitStack()
        self.redis = RedisServer(directory, keeps_data=True)
        self.workers: list[Server] = []
        self.gateway: Server

    @contextmanager
    def open(self) -> Iterator[Scene]:
        with self._stack:
            self.redis.start()
            self._stack.callback(self.redis.stop)
            self.gateway = self._stack.enter_context(serve(self._store, "gateway", **self._settings()))
            self.workers = [self.new_worker() for _ in range(self._num_workers)]
            yield self

    def new_worker(self) -> Server:
        return self._stack.enter_context(serve(self._store, "worker", **self._settings()))

    def pids(self) -> set[int]:
        return {server.process.pid for server in (self.gateway, *self.workers) if server.process.poll() is None}

    def _settings(self) -> dict[str, str]:
        return {"redis_url": self.redis.url, "lease_s": str(LEASE_S), "threads": "1", "log_level": "warning"}


async def kill_worker(scene: Scene, chance: random.Random) -> None:
    """SIGKILL; another takes its place."""
    victim = chance.randrange(len(scene.workers))
    scene.workers[victim].process.send_signal(signal.SIGKILL)
    scene.workers[victim] = await asyncio.to_thread(scene.new_worker)


async def freeze_worker(scene: Scene, chance: random.Random) -> None:
    """SIGSTOP for three leases: it comes back as a zombie whose requests are another's."""
    process = chance.choice(scene.workers).process
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(3 * LEASE_S)
    finally:
        process.send_signal(signal.SIGCONT)


async def kill_redis(scene: Scene, chance: random.Random) -> None:
    """SIGKILL with AOF everysec, back after a moment: the kernel has what the process wrote."""
    await asyncio.to_thread(scene.redis.stop, signal.SIGKILL)
    await asyncio.sleep(chance.uniform(0.2, 2))
    await asyncio.to_thread(scene.redis.start)


FAULTS: Mapping[str, tuple[str, Callable[[Scene, random.Random], Awaitable[None]]]] = {
    "F1": ("a worker is killed", kill_worker),
    "F2": ("a worker stands still for three leases", freeze_worker),
    "F7": ("Redis is killed and comes back", kill_redis),
}


@dataclass
class Tally:
    """All streams of a run together."""

    streams: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    worst_gap_s: float = 0.0
    refusals: int = 0
    exits: int = 0  # processes that ended though nobody killed them
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.changed or self.exits or self.errors)

    def add(self, history: History, verdict: Verdict) -> None:
        self.streams += 1
        self.lost += verdict.lost
        self.doubled += verdict.doubled
        self.changed += verdict.changed
        self.worst_gap_s = max(self.worst_gap_s, verdict.gap_s)
        if history.error:
            self.errors[history.error[:200]] += 1


async def run_fault(
    scene: Scene, name: str, *, runs: int, streams: int, seed: int, progress: Callable[[int], None] = lambda _: None
) -> Tally:
    """`streams` clients stream without pause while the fault happens `runs` times at random moments."""
    chance, tally, over = random.Random(seed), Tally(), asyncio.Event()
    expected = await asyncio.to_thread(_without_faults, scene.gateway.address)
    clients = [asyncio.create_task(_client(scene.gateway.address, n, expected, tally, over)) for n in range(streams)]
    alive = scene.pids()
    for number in range(runs):
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        await FAULTS[name][1](scene, chance)
        progress(number + 1)
    over.set()
    await asyncio.gather(*clients)
    if name != "F1":
        tally.exits = len(alive - scene.pids())
    return tally


async def _client(address: str, number: int, expected: Sequence[list[int]], tally: Tally, over: asyncio.Event) -> None:
    turn = number
    while not over.is_set():
        which = turn % len(BODIES)
        try:
            async with asyncio.timeout(120):
                history = await record(address, BODIES[which])
        except Refused:
            tally.refusals += 1
            await asyncio.sleep(RETRY_S)
            continue
        except TimeoutError:
            history = History(BODIES[which], error="no end within 120 s")
        tally.add(history, judge(history, expected[which]))
        turn += 1


def _without_faults(address: str) -> list[list[int]]:
    with httpx.Client(base_url=address, timeout=60) as client:
        answers = [client.post("/generate", json=dict(body)).raise_for_status().json() for body in BODIES]
    return [list(answer["token_ids"]) for answer in answers]
