"""Overload: three times as many requests as the system can answer, then none. What becomes of those it takes?

First the capacity is found on a system with its default limits: a few numbers of clients, each asking again as soon as
it is answered; the capacity is what the fewest of them get that get as much as any. Then an operator's choice is made:
as many tokens may be queued as the system answers in `queue_s`, well within the deadline, so that what is taken in can
still be answered in time and the rest is refused at once. With that setting a new system is loaded, first calmly, then
in rounds: at its peak, over its peak, after it; and at its peak once more. Machines drift within minutes: medians of
the rounds are compared.

In the overload requests arrive at random (Poisson), whether or not earlier ones were answered, and those refused do not
come again. In time means whole within the deadline, by the client's clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.serve.client import Client, run
from bench.serve.figures import Probe, arrivals, milliseconds, percentile, recovered_at
from bench.serve.loops import MOST_IN_FLIGHT, SPREAD_S, OpenLoop, closed_loop
from bench.serve.plan import flag
from bench.serve.processes import System, allow_connections, separate
from bench.serve.readings import cores_between, own_cpu_s, read_processes
from bench.serve.workload import endless
from services.redis_queue import open_queue
from services.settings import Settings
from wire.queue import Queue

CLIENTS = (32, 64, 128, 256)
WARM_S = 2 * SPREAD_S  # of each load, before anything is counted
AS_GOOD = 0.95  # of the best: less is within what the same load differs by from one time to the next
END_S = 60.0
PROBE_EVERY_S = 0.1
PROBES = 5  # in a row, to say that first tokens are as before
CALM_SHARE = 90  # percentile of first tokens before the load: what they must come back to
LOOK_EVERY_S = 0.05
KV_MEMORY_BYTES = str(192 << 20)


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """What an overload run does. Sizes in tokens."""

    rounds: int = flag(3, 1, "of peak and overload, in turn")
    seconds: float = flag(20.0, 6, "how long it is overloaded, each time")
    times: float = flag(3.0, 1, "how much is offered, in capacities")
    peak_s: float = flag(10.0, 6, "how long each closed loop runs")
    calm_s: float = flag(5.0, 1, "how long single requests are timed before")
    recovery_s: float = flag(60.0, 1, "how long recovery is waited for")
    deadline_s: float = flag(5.0, 0.1, "a request's deadline")
    queue_s: float = flag(2.0, 0.1, "max_queued_tokens, in seconds of the capacity")
    prompt_tokens: int = flag(16, 1, "tokens of a prompt")
    new_tokens: int = flag(128, 1, "tokens of an answer")
    seed: int = flag(1, 0, "of the arrivals")

    @property
    def request_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def max_queued_tokens(self, answers_per_s: float) -> int:
        """What an operator would allow, who knows the capacity; at least one request."""
        return max(self.request_tokens, int(answers_per_s * self.request_tokens * self.queue_s))


def run_overload(plan: OverloadPlan) -> dict[str, Any]:
    """Find the capacity, then overload a system whose queue is bounded by it. Raises SystemExit if a process ends."""
    allow_connections(MOST_IN_FLIGHT)
    with separate(kv_memory_bytes=KV_MEMORY_BYTES) as system:
        search = run(_search(system, plan))
    best = _answered(smallest_good(search), plan)
    bound = plan.max_queued_tokens(best["good_per_s"])
    # What an operator would set who has seen the search: the queue bounded, the batch no larger than it need be.
    batch = str(best["clients"])
    with separate(kv_memory_bytes=KV_MEMORY_BYTES, max_queued_tokens=str(bound), max_batch_seqs=batch) as system:
        clients = min(best["clients"], bound // plan.request_tokens)
        found = run(_rounds(system, plan, clients))
    return {
        "is_clean": not any(map(_went_wrong, found["overloads"])),
        "search": search,
        "clients": clients,
        "max_queued_tokens": bound,
        "queue_s": plan.queue_s,
        "deadline_s": plan.deadline_s,
        **found,
    }


async def _search(system: System, plan: OverloadPlan) -> list[dict[str, Any]]:
    client, requests = Client(system.port), _requests(plan)
    try:
        return [await _peak(client, requests, plan, count) for count in CLIENTS]
    finally:
        client.close()


async def _rounds(system: System, plan: OverloadPlan, clients: int) -> dict[str, Any]:
    client, requests, short = Client(system.port), _requests(plan), endless(plan.prompt_tokens, 1)
    queue: Queue = await open_queue(Settings(redis_url=system.redis_url))
    peaks: list[dict[str, Any]] = []
    overloads: list[dict[str, Any]] = []
    try:
        await _probes(client, short, WARM_S)
        first_s = [probe.ttft_s for probe in await _probes(client, short, plan.calm_s) if probe.ttft_s is not None]
        if not first_s:
            raise SystemExit("no single request was answered before the load")
        for number in range(plan.rounds):
            peaks.append(_answered(await _peak(client, requests, plan, clients), plan))
            loop = OpenLoop(client, requests)
            times = arrivals(plan.times * peaks[-1]["good_per_s"], plan.seconds, plan.seed + number)
            row, end = await _overload(system, loop, times)
            row |= await _recovery(client, short, queue, plan, end, percentile(first_s, CALM_SHARE))
            await loop.finish(END_S)
            overloads.append(loop.outcomes.report(plan.deadline_s, end - row["seconds"] + WARM_S, end) | row)
        peaks.append(_answered(await _peak(client, requests, plan, clients), plan))
    finally:
        await queue.close()
        client.close()
    calm = {f"ttft_ms_p{rank}": milliseconds(percentile(first_s, rank)) for rank in (50, CALM_SHARE)}
    return {"calm": calm, "peaks": peaks, "overloads": overloads, "share_of_peak": share_of_peak(peaks, overloads)}


async def _overload(system: System, loop: OpenLoop, times: Sequence[float]) -> tuple[dict[str, Any], float]:
    """Offer requests at their times; what that was and cost, and when it ended."""
    before, own_s = read_processes(system.pids), own_cpu_s()
    start, end = await loop.run(times)
    seconds = end - start
    cores = cores_between(before, read_processes(system.pids), seconds)
    cores["this client"] = round((own_cpu_s() - own_s) / seconds, 3)
    return {"offered_per_s": round(len(times) / seconds, 1), "seconds": seconds, "cores": cores}, end


def share_of_peak(peaks: Sequence[Mapping[str, Any]], overloads: Sequence[Mapping[str, Any]]) -> list[float]:
    """Goodput by peak: of the medians of all rounds, then the least and the most of a round and the peaks around it."""
    tops = [float(row["good_per_s"]) for row in peaks]
    goods = [float(row["good_per_s"]) for row in overloads]
    around = [good / ((before + after) / 2) for good, before, after in zip(goods, tops[:-1], tops[1:], strict=True)]
    return [round(each, 3) for each in (median(goods) / median(tops), min(around), max(around))]


def smallest_good(search: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the fewest clients of those that are as good as any: more at once only makes each wait longer."""
    best = max(float(row["good_per_s"]) for row in search)
    return next(row for row in search if float(row["good_per_s"]) >= AS_GOOD * best)


def _went_wrong(row: Mapping[str, Any]) -> bool:
    return bool(row["errors"].keys() - {"deadline_exceeded"} or row["unsent"] or row["unfinished"])


async def _peak(client: Client, requests: Iterator[bytes], plan: OverloadPlan, clients: int) -> dict[str, Any]:
    outcomes, start, end = await closed_loop(client, requests, clients, plan.peak_s)
    found = outcomes.report(plan.deadline_s, start + WARM_S, end)
    return {"clients": clients, "tokens_per_s": round(found["good_per_s"] * plan.new_tokens), **found}


def _answered(peak: dict[str, Any], plan: OverloadPlan) -> dict[str, Any]:
    """`peak`, if it is one. Raises SystemExit: nothing can be said of a system that answers nothing in time."""
    if not peak["good_per_s"]:
        raise SystemExit(f"no answer to {peak['clients']} clients was whole within {plan.deadline_s:g} s: {peak}")
    return peak


async def _probes(client: Client, requests: Iterator[bytes], seconds: float) -> list[Probe]:
    """Single requests for one token, one after the other."""
    probes: list[Probe] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        probes.append(await _probe(client, requests))
        await asyncio.sleep(PROBE_EVERY_S)
    return probes


async def _probe(client: Client, requests: Iterator[bytes]) -> Probe:
    answer = await client.ask(next(requests))
    return Probe(answer.sent_at, answer.ttft_s if answer.is_whole else None)


async def _recovery(
    client: Client, requests: Iterator[bytes], queue: Queue, plan: OverloadPlan, end: float, calm_s: float
) -> dict[str, Any]:
    """From the end of the overload: seconds until nothing waits, and until first tokens come within `calm_s` again."""
    give_up = end + plan.recovery_s
    looking = asyncio.create_task(_empty_at(queue, give_up))
    probes: list[Probe] = []
    back_at = None
    while back_at is None and time.perf_counter() < give_up:
        probes.append(await _probe(client, requests))
        back_at = recovered_at(probes, calm_s, PROBES)
        await asyncio.sleep(PROBE_EVERY_S)
    empty_at = await looking
    return {
        "queue_empty_s": None if empty_at is None else round(empty_at - end, 2),
        "ttft_as_before_s": None if back_at is None else round(back_at - end, 2),
        "probes": len(probes),
    }


async def _empty_at(queue: Queue, give_up: float) -> float | None:
    """When nothing waited and nothing ran but what a probe asks."""
    while (now := time.perf_counter()) < give_up:
        depth = await queue.depth()
        if not depth.queued_requests and depth.running_requests <= 1:
            return now
        await asyncio.sleep(LOOK_EVERY_S)
    return None


def _requests(plan: OverloadPlan) -> Iterator[bytes]:
    return endless(plan.prompt_tokens, plan.new_tokens, deadline_ms=round(1000 * plan.deadline_s))
