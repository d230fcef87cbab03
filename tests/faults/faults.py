"""The faults: one row each. A row says what happens, on which stage, and how clients behave meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from tests.faults.client import Manner, read_slowly, record, storm
from tests.faults.drill import BODIES, Drill, Fault
from tests.faults.proxy import Toxics, Way
from tests.faults.scene import Scene, Stage
from tests.faults.worker import POISON

HOUR_S = 3600
STORM = 100
NUM_INNOCENTS = 7
LATENT = Toxics(latency_s=0.2, jitter_s=0.05)
NARROW = Toxics(bytes_per_s=64 * 1024)
SLICED = Toxics(sliced_bytes=64)
LOSSY = Toxics(loses_answers=0.2)


# ---- workers ----


async def kill_worker(drill: Drill) -> None:
    """SIGKILL; another takes its place."""
    await another_for(drill.scene, victim_of(drill))


async def freeze_worker(drill: Drill) -> None:
    """SIGSTOP for three leases: it comes back as a zombie whose requests are another's."""
    process = drill.scene.workers[victim_of(drill)].process
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(3 * drill.scene.stage.lease_s)
    finally:
        process.send_signal(signal.SIGCONT)


async def hang_worker(drill: Drill) -> None:
    """A step that never returns, for three leases, in a process that lives; then it is killed."""
    victim = victim_of(drill)
    drill.scene.workers[victim].process.send_signal(signal.SIGUSR1)
    await asyncio.sleep(3 * drill.scene.stage.lease_s)
    await another_for(drill.scene, victim)


async def kill_all_workers(drill: Drill, least_s: float = 1.0, most_s: float = 5.0) -> None:
    """Nobody works for a while; then as many as before."""
    scene = drill.scene
    for worker in scene.workers:
        worker.kill()
    await asyncio.sleep(drill.chance.uniform(least_s, most_s))
    scene.workers = [await asyncio.to_thread(scene.new_worker) for _ in scene.workers]


async def update_worker(drill: Drill) -> None:
    """A rolling update: a new worker comes, SIGTERM ends an old one."""
    scene = drill.scene
    new = await asyncio.to_thread(scene.new_worker)
    victim = victim_of(drill)
    old, scene.workers[victim] = scene.workers[victim], new
    old.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(old.process.wait, 60)
    assert code == 0, "".join(old.output)


async def poison_workers(drill: Drill) -> None:
    """A request that kills whoever computes it, among innocents that stream: it ends, they do not notice."""
    body = {**BODIES[0], "input_ids": [*POISON, 1, 2, 3]}
    letters = drill.scene.num_dead_letters()
    async with supervised(drill.scene), asyncio.TaskGroup() as innocents:
        for which in range(NUM_INNOCENTS):
            innocents.create_task(drill.stream(which))
        await asyncio.sleep(drill.chance.uniform(0.0, 0.3))
        poison = await record(lambda: drill.scene.addresses, body, Manner(), drill.chance)
    if poison.events or '"worker_lost"' not in (poison.error or ""):
        drill.complain(f"the poison ended as {poison.error or poison.finish_reason}")
    if (more := drill.scene.num_dead_letters() - letters) != 1:
        drill.complain(f"{more} dead letters for one poison")


# ---- gateways and clients ----


async def kill_gateway(drill: Drill) -> None:
    """SIGKILL; another takes its place, at another address."""
    scene = drill.scene
    victim = drill.chance.randrange(len(scene.gateways))
    scene.gateways[victim].kill()
    scene.gateways[victim] = await asyncio.to_thread(scene.new_gateway)


async def crowd_gateway(drill: Drill) -> None:
    """While clients leave and come back: one that reads a byte a second, and one that never reads."""
    address = drill.chance.choice(drill.scene.addresses)
    await asyncio.gather(*(read_slowly(address, BODIES[0], 2.0, bytes_per_s) for bytes_per_s in (1, 0)))


async def repeat_request(drill: Drill) -> None:
    """One request, many times at once under one Idempotency-Key, at all gateways: computed once."""
    scene, which = drill.scene, drill.chance.randrange(len(BODIES))
    before = scene.num_accepted(), scene.num_leases()
    key = f"{drill.chance.getrandbits(128):x}"
    for history in await storm(scene.addresses, BODIES[which], key, STORM):
        drill.count(history, which)
    after = scene.num_accepted(), scene.num_leases()
    if after != (before[0] + 1, before[1] + 1):
        drill.complain(f"one key: {after[0] - before[0]} requests, {after[1] - before[1]} leases")


# ---- clocks ----


async def jump_clock(drill: Drill) -> None:
    """A process finds itself an hour early or late, for a while; setting it right is the second jump."""
    process = drill.chance.choice([*drill.scene.gateways, *drill.scene.workers])
    assert process.clock is not None
    process.clock.set_ahead(drill.chance.choice((-HOUR_S, HOUR_S)))
    await asyncio.sleep(drill.chance.uniform(1, 3))
    process.clock.set_ahead(0)


# ---- Redis ----


async def kill_redis(drill: Drill) -> None:
    """SIGKILL, back after a moment. Its AOF is written always: what a call has answered is on the disk."""
    redis = drill.scene.redis
    await asyncio.to_thread(redis.stop, signal.SIGKILL)
    await asyncio.sleep(drill.chance.uniform(0.2, 2))
    await asyncio.to_thread(redis.start)


async def freeze_redis(drill: Drill) -> None:
    """SIGSTOP: connections stand, nothing answers; shorter and longer than the time limit of a call."""
    redis = drill.scene.redis
    redis.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(drill.chance.uniform(1, 10))
    finally:
        redis.send_signal(signal.SIGCONT)


async def spoil_network(toxics: Toxics, drill: Drill) -> None:
    """Toxic for a while, then clean."""
    proxy = drill.scene.proxy
    assert proxy is not None
    proxy.toxics = toxics
    await asyncio.sleep(drill.chance.uniform(1, 4))
    proxy.toxics = Toxics()


async def reset_network(drill: Drill) -> None:
    """Every connection is reset, every second, three times."""
    assert drill.scene.proxy is not None
    for _ in range(3):
        drill.scene.proxy.reset()
        await asyncio.sleep(1.0)


# ---- the table ----

_NETWORK = Stage(has_proxy=True)


def _network(words: str, happen: Callable[[Drill], Awaitable[None]]) -> Fault:
    return Fault(f"the network to Redis {words}", happen, _NETWORK)


FAULTS: Mapping[str, Fault] = {
    "F1": Fault("a worker is killed", kill_worker),
    "F2": Fault("a worker stands still for three leases", freeze_worker),
    "F3": Fault("a worker's engine hangs", hang_worker, Stage(has_breakable_workers=True)),
    "F4": Fault("all workers are killed and come back", kill_all_workers),
    "F4-minute": Fault(
        "all workers are killed and come back after a minute", partial(kill_all_workers, least_s=60.0, most_s=60.0)
    ),
    "F5": Fault("a gateway is killed", kill_gateway, Stage(gateways=2), Manner(resumes=True), streams=100),
    "F6": Fault(
        "clients leave at any byte, others hardly read",
        crowd_gateway,
        Stage(gateways=2),
        Manner(resumes=True, drops=True),
    ),
    "F7": Fault("Redis is killed and comes back", kill_redis),
    "F8": Fault("Redis stands still", freeze_redis),
    "F8-latency": _network("is slow: 200 ms, 50 more or less", partial(spoil_network, LATENT)),
    "F8-bandwidth": _network("is narrow: 64 kB/s", partial(spoil_network, NARROW)),
    "F8-slicer": _network("delivers byte by byte", partial(spoil_network, SLICED)),
    "F8-resets": _network("resets every connection every second", reset_network),
    "F8-no-calls": _network("swallows what is sent to it", partial(spoil_network, Toxics(swallows=Way.CALLS))),
    "F8-no-answers": _network("swallows what it answers", partial(spoil_network, Toxics(swallows=Way.ANSWERS))),
    "F11": Fault(
        "a process's clock jumps by an hour",
        jump_clock,
        Stage(gateways=2, lease_s=6.0, has_clocks=True),
        keeps_leases=True,
    ),
    "F12": Fault(
        "a request kills its workers", poison_workers, Stage(workers=1, has_breakable_workers=True), streams=0
    ),
    "F13": Fault("workers are replaced, one by one", update_worker),
    "F15": Fault("one request comes a hundred times at once", repeat_request, Stage(gateways=2), streams=0),
    "F17": _network("loses a fifth of the answers", partial(spoil_network, LOSSY)),
}


# ---- what they share ----


def victim_of(drill: Drill) -> int:
    return drill.chance.randrange(len(drill.scene.workers))


async def another_for(scene: Scene, number: int) -> None:
    """Kill a worker and start another."""
    scene.workers[number].kill()
    scene.workers[number] = await asyncio.to_thread(scene.new_worker)


@asynccontextmanager
async def supervised(scene: Scene) -> AsyncIterator[None]:
    """Start another worker for each that dies."""
    over = asyncio.Event()

    async def supervise() -> None:
        while not over.is_set():
            await asyncio.sleep(0.05)
            for number, worker in enumerate(scene.workers):
                if worker.has_ended:
                    scene.workers[number] = await asyncio.to_thread(scene.new_worker)

    supervisor = asyncio.create_task(supervise())
    try:
        yield
    finally:
        over.set()
        await supervisor
