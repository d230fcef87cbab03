"""Soak: many idle clients and many active ones for minutes. Does memory grow, do files stay open, does latency creep?

Active clients stream without pause: each stream that ends is followed by the next, so their number stays. The requests
are a few, over and over, and every token is compared with what it is without load. Idle clients are open WebSockets and
streams of requests that no worker serves: nothing passes but keep-alives.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.serve.client import Answer, Client, request_bytes, run
from bench.serve.figures import milliseconds, percentile, theil_sen
from bench.serve.idle import IdleLinks
from bench.serve.plan import flag
from bench.serve.processes import System, allow_connections, separate
from bench.serve.readings import Reading, Sample, own_cpu_s, read_processes, redis_memory
from bench.serve.workload import answers_alone, repeated, stop

MINUTE_S = 60.0
SETTLE_S = 5.0  # from the first active stream to the first sample
END_S = 60.0
AFTER_S = 5.0  # from the last client's leave to the last reading: the gateway's grace is 2 s
RETRY_S = 0.1
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """What a soak run does. Sizes in tokens."""

    seconds: float = flag(300.0, 5, "how long it is measured")
    active: int = flag(200, 1, "streams that read tokens")
    idle: int = flag(1000, 0, "clients with nothing but keep-alives: half sockets, half waiting streams")
    prompt_tokens: int = flag(16, 1, "tokens of a prompt")
    new_tokens: int = flag(256, 1, "tokens of an answer")
    kv_memory_mib: int = flag(192, 1, "the worker's KV cache; small, so that all of it is soon in use")
    log_ttl_s: float = flag(20.0, 1, "an answer is kept for so long; short, so that what is kept soon stays the same")

    @property
    def edge_s(self) -> float:
        """How long "the first minute" and "the last minute" are."""
        return min(MINUTE_S, self.seconds / 2)


@dataclass(slots=True)
class Window:
    """Times to first tokens and gaps within one part of the run, in s."""

    start: float
    stop: float
    ttft: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))

    def note(self, answer: Answer) -> None:
        """A gap belongs to when it ended."""
        times = answer.times
        if not times or times[-1] < self.start or times[0] >= self.stop:
            return
        if self.start <= times[0]:
            self.ttft.append(times[0] - answer.sent_at)
        for earlier, later in pairwise(times):
            if self.start <= later < self.stop:
                self.gaps.append(later - earlier)

    def report(self) -> dict[str, float | None]:
        return {
            f"{name}_ms_p{share}": milliseconds(percentile(values, share))
            for name, values in (("ttft", self.ttft), ("gap", self.gaps))
            for share in (50, 99)
        }


@dataclass(slots=True)
class Tally:
    """All active streams of a run together."""

    windows: Sequence[Window] = ()
    answers: int = 0
    tokens: int = 0
    wrong: int = 0  # streams with a token that differs from what it is without load
    errors: Counter[str] = field(default_factory=Counter)

    def note(self, answer: Answer, expected: Sequence[int]) -> None:
        if not answer.is_whole:
            self.errors[answer.error or f"status {answer.status}"] += 1
        due = expected if answer.is_whole else expected[: len(answer.token_ids)]  # what came before it broke
        self.wrong += answer.token_ids != list(due)
        self.answers += 1
        self.tokens += len(answer.token_ids)
        for window in self.windows:
            window.note(answer)


def run_soak(plan: SoakPlan) -> dict[str, object]:
    """Start everything, load it for so long, and report. Raises SystemExit if a process ends."""
    allow_connections(plan.active + plan.idle)
    memory, ttl_s = str(plan.kv_memory_mib * MIB), str(plan.log_ttl_s)
    with separate(parks=True, kv_memory_bytes=memory, log_ttl_s=ttl_s, unserved="wait") as system:
        return run(_soak(system, plan))


async def _soak(system: System, plan: SoakPlan) -> dict[str, object]:
    client, links = Client(system.port), IdleLinks(system.port)
    requests = [request_bytes(each) for each in repeated(plan.prompt_tokens, plan.new_tokens)]
    expected = await answers_alone(client, requests)
    before = read_processes(system.pids)
    await links.open(plan.idle - plan.idle // 2, plan.idle // 2)
    tally, over = Tally(), asyncio.Event()
    streams = [
        asyncio.create_task(_stream(client, requests, expected, number, tally, over)) for number in range(plan.active)
    ]
    await asyncio.sleep(SETTLE_S)
    start = time.perf_counter()
    tally.windows = windows = (
        Window(start, start + plan.edge_s),
        Window(start + plan.seconds - plan.edge_s, start + plan.seconds),
    )
    cpu_s, counted = own_cpu_s(), (tally.answers, tally.tokens)
    samples = await _samples(system, start, plan.seconds)
    took_s = samples[-1].at_s
    answers, tokens = tally.answers - counted[0], tally.tokens - counted[1]
    client_cores = (own_cpu_s() - cpu_s) / took_s
    idle = links.report()
    over.set()
    tally.errors += Counter({f"no end within {END_S:g} s of the run's": await stop(streams, END_S)})
    client.close()
    await links.close()
    await asyncio.sleep(AFTER_S)
    return {
        "seconds": round(took_s, 1),
        "active": plan.active,
        "answers": answers,
        "tokens": tokens,
        "tokens_per_s": round(tokens / took_s, 1),
        "is_clean": not (tally.wrong or tally.errors or idle["lost"]),
        "wrong": tally.wrong,
        "errors": dict(tally.errors),
        "idle": idle,
        "first": windows[0].report(),
        "last": windows[1].report(),
        "edge_s": plan.edge_s,
        "processes": process_rows(samples, before, read_processes(system.pids), plan.edge_s),
        "redis": slope_row([(each.at_s, each.redis_bytes) for each in samples], plan.edge_s),
        "client_cores": round(client_cores, 3),
    }


async def _stream(
    client: Client,
    requests: Sequence[bytes],
    expected: Sequence[Sequence[int]],
    number: int,
    tally: Tally,
    over: asyncio.Event,
) -> None:
    """One client: stream after stream until it is over."""
    while not over.is_set():
        which = number % len(requests)
        answer = await client.ask(requests[which])
        tally.note(answer, expected[which])
        if not answer.is_whole:
            await asyncio.sleep(RETRY_S)
        number += 1


async def _samples(system: System, start: float, seconds: float) -> list[Sample]:
    """One each second, from `start`."""
    samples: list[Sample] = []
    while True:
        redis_bytes = await redis_memory(system)
        at_s = time.perf_counter() - start
        samples.append(Sample(at_s, read_processes(system.pids), redis_bytes))
        if at_s >= seconds:
            return samples
        await asyncio.sleep(max(0.0, start + min(seconds, round(at_s) + 1) - time.perf_counter()))


def slope_row(points: Sequence[tuple[float, int]], settle_s: float) -> dict[str, float | None]:
    """Bytes over time, in MiB: where they begin and end, and how fast they grow once `settle_s` have passed.

    `percent_per_hour` is of the first value after that. None where there are too few points for a slope.
    """
    settled = [(at_s, float(size)) for at_s, size in points if at_s >= settle_s]
    slope = 3600 * theil_sen([at_s for at_s, _ in settled], [size for _, size in settled])
    base = settled[0][1] if settled else 0.0
    has_slope = not math.isnan(slope)
    return {
        "start_mib": round(points[0][1] / MIB, 1),
        "settled_mib": round(base / MIB, 1),
        "end_mib": round(points[-1][1] / MIB, 1),
        "mib_per_hour": round(slope / MIB, 2) if has_slope else None,
        "percent_per_hour": round(100 * slope / base, 2) if has_slope and base else None,
    }


def process_rows(
    samples: Sequence[Sample], before: Mapping[str, Reading], after: Mapping[str, Reading], settle_s: float
) -> dict[str, dict[str, float | None]]:
    """Memory, open files, threads and processor time of each process."""
    rows: dict[str, dict[str, float | None]] = {}
    took_s = samples[-1].at_s - samples[0].at_s
    for name in before:
        readings = [sample.processes[name] for sample in samples]
        rows[name] = {
            **slope_row([(sample.at_s, sample.processes[name].rss_bytes) for sample in samples], settle_s),
            "files_before": before[name].open_files,
            "files_most": max(each.open_files for each in readings),
            "files_after": after[name].open_files,
            "threads_before": before[name].threads,
            "threads_most": max(each.threads for each in readings),
            "cores": round((readings[-1].cpu_s - readings[0].cpu_s) / took_s, 3) if took_s else None,
        }
    return rows
