"""What goes wrong in a world, as a table: every kind of world is a row, every seed draws its numbers from one row.

Probabilities are per call; times are virtual ms between two events of that kind in the whole world, 0 = never.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from services.queues.protocol_core import QueueLimits


@dataclass(frozen=True, slots=True)
class Wires:
    """How calls go wrong."""

    lost_calls: float = 0.0  # never arrive
    lost_replies: float = 0.0  # arrive, are executed, and nobody hears of it
    late_calls: float = 0.0  # arrive when their caller has given up on them, up to three leases later


GOOD: Final = Wires()
BAD: Final = Wires(lost_calls=0.03, lost_replies=0.05, late_calls=0.04)
FORGETFUL: Final = Wires(lost_replies=0.03)


@dataclass(frozen=True, slots=True)
class Weather:
    """One kind of world."""

    wires: Wires = GOOD
    crash_ms: int = 0  # a worker dies
    stall_ms: int = 0  # a worker stands still, often beyond its lease, and goes on as if nothing had been
    drain_ms: int = 0  # a worker hands back what it holds and leaves
    fleet_gone_ms: int = 0  # all workers die
    jump_ms: int = 0  # the queue's clock jumps
    is_lost_for_good: float = 0.0  # probability that no worker comes back at the end
    poisons: int = 0  # requests that crash who computes them
    requests: tuple[int, int] = (10, 30)
    models: int = 2
    tenants: int = 3
    priorities: tuple[int, ...] = (-1, 0, 0, 1)
    cancels: float = 0.15  # probability that a client cancels; as many abandon
    deadlines: float = 0.3
    is_roomy: bool = False  # every worker takes every request at once: what it does not take is not the order's doing
    is_pressed: bool = False  # small caps: the queue is full, a tenant's part is full
    refuses_unserved: bool = False
    loses_leases: bool = True  # for other reasons than a crash by poison


WEATHERS: Final[dict[str, Weather]] = {
    "fair": Weather(is_roomy=True, loses_leases=False),
    "lossy": Weather(BAD, drain_ms=6_000),
    "crashes": Weather(BAD, crash_ms=3_000, stall_ms=5_000, poisons=1),
    "stalls": Weather(BAD, stall_ms=2_000, drain_ms=8_000, jump_ms=15_000),
    "disasters": Weather(BAD, fleet_gone_ms=8_000, jump_ms=8_000, is_lost_for_good=0.5, refuses_unserved=True),
    "poison": Weather(poisons=1, requests=(8, 16), deadlines=0.1, loses_leases=False),
    "poisons": Weather(BAD, poisons=3, drain_ms=6_000),
    "pressed": Weather(BAD, crash_ms=6_000, is_pressed=True, requests=(16, 30)),
    # One model, one priority, a backlog: what is shared fairly can be counted.
    "backlog": Weather(
        FORGETFUL, drain_ms=9_000, requests=(20, 32), models=1, priorities=(0,), is_roomy=True, cancels=0.05
    ),
    "ranks": Weather(BAD, crash_ms=8_000, stall_ms=4_000, drain_ms=4_000, models=1, is_roomy=True),
}


def draw_limits(weather: Weather, rng: Random) -> QueueLimits:
    """Limits of one world's queue."""
    lease_ms = rng.choice([2_000, 3_000, 6_000])
    log_ttl_ms = rng.choice([1_000, 8_000, 60_000])
    cap = rng.choice([150, 300]) if weather.is_pressed else 100_000
    return QueueLimits(
        lease_ms=lease_ms,
        max_deliveries=3 if weather.poisons == 1 else rng.choice([1, 2, 3, 3, 4]),
        max_queued_tokens=cap,
        max_tenant_tokens=cap // 2 if weather.is_pressed else cap,
        log_ttl_ms=log_ttl_ms,
        background_ttl_ms=4 * log_ttl_ms,
        max_overtakes=rng.choice([1, 4, 64]),
        worker_ttl_ms=5_000,
        orphan_ms=5_000,
        refuses_unserved=weather.refuses_unserved,
    )
