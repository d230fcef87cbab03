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

    def ended(self) -> int:
        """Processes that are not there though they should be."""
        return sum(server.process.poll() is not None for server in (self.gateway, *self.workers))

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
    """SIGKILL, back after a moment. Its AOF is written always: what a call has answered is on the disk."""
    await asyncio.to_thread(scene.redis.stop, signal.SIGKILL)
    await asyncio.sleep(chance.uniform(0.2, 2))
    await asyncio.to_thread(scene.redis.start)


async def kill_all_workers(scene: Scene, chance: random.Random) -> None:
    """Nobody works for a few seconds; then as many as before."""
    for worker in scene.workers:
        worker.process.send_signal(signal.SIGKILL)
    await asyncio.sleep(chance.uniform(1, 5))
    scene.workers = [await asyncio.to_thread(scene.new_worker) for _ in scene.workers]


async def freeze_redis(scene: Scene, chance: random.Random) -> None:
    """SIGSTOP: connections stand, nothing answers; shorter and longer than the time limit of a call."""
    scene.redis.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(chance.uniform(1, 10))
    finally:
        scene.redis.send_signal(signal.SIGCONT)


async def replace_worker(scene: Scene, chance: random.Random) -> None:
    """A rolling update: a new worker comes, SIGTERM ends an old one."""
    new = await asyncio.to_thread(scene.new_worker)
    victim = chance.randrange(len(scene.workers))
    old, scene.workers[victim] = scene.workers[victim], new
    old.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(old.process.wait, 60)
    assert code == 0, "".join(old.output)


FAULTS: Mapping[str, tuple[str, Callable[[Scene, random.Random], Awaitable[None]]]] = {
    "F1": ("a worker is killed", kill_worker),
    "F2": ("a worker stands still for three leases", freeze_worker),
    "F4": ("all workers are killed and come back", kill_all_workers),
    "F7": ("Redis is killed and comes back", kill_redis),
    "F8": ("Redis stands still", freeze_redis),
    "F13": ("workers are replaced, one by one", replace_worker),
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
    for number in range(runs):
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        await FAULTS[name][1](scene, chance)
        tally.exits += scene.ended()
        progress(number + 1)
    over.set()
    await asyncio.gather(*clients)
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
