"""Two thousand worlds of faults, and proof that they find what is broken."""

from __future__ import annotations

from collections import Counter

import pytest

from services.queues.protocol_core import QueueCore
from tests.simulation.books import Violation
from tests.simulation.broken_cores import BROKEN
from tests.simulation.calls import Answer, Logged, Refused
from tests.simulation.redis_replay import replay
from tests.simulation.weather import WEATHERS
from tests.simulation.world import World
from wire.messages import Failed, Finished
from wire.queue import Lease, Refusal

SEEDS = range(2_000)
CHUNK = 100
CAUGHT_WITHIN = 200  # seeds
REPLAYED = range(30)

# What must have happened somewhere, or the worlds are too quiet to prove anything.
TROUBLE = {
    "fates": ["the call is lost", "the reply is lost", "late, nobody listens"],
    "errors": ["conflict", "queue_full", "request_too_large", "unavailable", "unknown_request"],
    "refusals": ["fenced", "cancelled", "expired"],
    "ends": ["stop", "length", "cancelled", "internal", "worker_lost", "deadline_exceeded"],
    "deliveries": ["1", "2", "3", "4", "suspect"],
}


@pytest.mark.parametrize("first", SEEDS[::CHUNK])
def test_no_world_breaks_a_promise(first: int) -> None:
    for seed in SEEDS[first : first + CHUNK]:
        World(seed).run()


def test_the_same_seed_is_the_same_history() -> None:
    assert finished_world(7).history == finished_world(7).history


def test_worlds_are_full_of_trouble() -> None:
    worlds = [finished_world(seed) for seed in SEEDS[:CHUNK]]
    seen = Counter(each for world in worlds for record in world.history for each in marks(record.fate, record.answer))
    missing = [(kind, name) for kind, names in TROUBLE.items() for name in names if not seen[kind, name]]
    assert not missing
    assert {world.weather_name for world in worlds} == set(WEATHERS)


@pytest.mark.parametrize("core_class", BROKEN)
def test_a_broken_core_is_found(core_class: type[QueueCore]) -> None:
    assert any(breaks(seed, core_class) for seed in range(CAUGHT_WITHIN))


@pytest.mark.parametrize("first", REPLAYED[::10])
async def test_redis_answers_as_the_core_does(first: int) -> None:
    num_repeated = 0
    for seed in REPLAYED[first : first + 10]:
        world = finished_world(seed)
        num_repeated += await replay(world.history, world.limits, seed)
    assert num_repeated > 100


def finished_world(seed: int) -> World:
    world = World(seed)
    world.run()
    return world


def breaks(seed: int, core_class: type[QueueCore]) -> bool:
    try:
        World(seed, core_class).run()
    except Violation:
        return True
    return False


def marks(fate: str, answer: Answer) -> list[tuple[str, str]]:
    """What one call shows of TROUBLE."""
    found = [("fates", fate)]
    for each in answer if isinstance(answer, list) else [answer]:
        match each:
            case Refused(code):
                found.append(("errors", code))
            case Refusal(_, reason):
                found.append(("refusals", reason.value))
            case Lease():
                found += [("deliveries", str(each.delivery)), ("deliveries", "suspect" if each.is_suspect else "")]
            case Logged(_, Finished(_, reason)):
                found.append(("ends", reason))
            case Logged(_, Failed(_, code)):
                found.append(("ends", code))
    return found
