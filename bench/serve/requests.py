"""Whole answers as fast as wrk asks for them, and what each costs every process in processor time.

Two systems stand beside each other, gateway with worker over Redis and one process that does all; wrk loads them in
turn, round after round, while the other one idles. Time is from /proc/<pid>/stat; wrk's own is counted too, as it runs
on the same cores. bench/generate.lua says what is asked.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serve.figures import spread
from bench.serve.plan import flag
from bench.serve.processes import ROOT, System, allow_connections, embedded, separate
from bench.serve.readings import read_processes

WARM_SECONDS = 3
SPARE_S = 30
_MS: Mapping[str, float] = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
_RATE = re.compile(r"^Requests/sec:\s+([\d.]+)$", re.MULTILINE)
_COUNT = re.compile(r"^\s+(\d+) requests in ", re.MULTILINE)
_NOT_200 = re.compile(r"^\s+Non-2xx or 3xx responses: (\d+)$", re.MULTILINE)
_SOCKETS = re.compile(r"^\s+Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RequestsPlan:
    """What a run of wrk does."""

    seconds: int = flag(10, 1, "of each round")
    rounds: int = flag(5, 1, "of each system, in turn")
    connections: int = flag(64, 1, "of wrk")


@dataclass(frozen=True, slots=True)
class Load:
    """One run of wrk."""

    requests: int
    requests_per_s: float
    ms_p50: float
    ms_p99: float
    failed: int  # not answered with 200, or lost


@dataclass(frozen=True, slots=True)
class Round:
    """One system under one run of wrk; processor time in ms for each request."""

    load: Load
    cpu_ms: Mapping[str, float]


def parse_wrk(text: str) -> Load:
    """What `wrk --latency` prints. Raises ValueError with the text if it is something else."""
    count, rate = _COUNT.search(text), _RATE.search(text)
    p50, p99 = (re.search(rf"^\s+{share}%\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE) for share in (50, 99))
    if count is None or rate is None or p50 is None or p99 is None:
        raise ValueError(f"wrk said:\n{text}")
    not_200, sockets = _NOT_200.search(text), _SOCKETS.search(text)
    return Load(
        requests=int(count[1]),
        requests_per_s=float(rate[1]),
        ms_p50=round(float(p50[1]) * _MS[p50[2]], 3),
        ms_p99=round(float(p99[1]) * _MS[p99[2]], 3),
        failed=int(not_200[1] if not_200 else 0) + sum(int(part) for part in (sockets.groups() if sockets else ())),
    )


def run_requests(plan: RequestsPlan) -> dict[str, Any]:
    """Raises SystemExit if wrk is missing or a process ends, ValueError if wrk cannot be understood."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("wrk is not installed (Debian: apt install wrk)")
    allow_connections(plan.connections)
    with contextlib.ExitStack() as stack:
        systems = {
            "gateway, Redis, worker": stack.enter_context(separate()),
            "one process": stack.enter_context(embedded()),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in systems}
        for system in systems.values():
            _run_wrk(wrk, system, WARM_SECONDS, plan.connections)
        for _ in range(plan.rounds):
            for name, system in systems.items():
                rounds[name].append(_run_round(wrk, system, plan))
    found = {name: figures(some) for name, some in rounds.items()}
    return {
        "is_clean": not any(row["failed"] for row in found.values()),
        "seconds": plan.seconds,
        "rounds": plan.rounds,
        "connections": plan.connections,
        "systems": found,
    }


def _run_round(wrk: str, system: System, plan: RequestsPlan) -> Round:
    before, own_s = read_processes(system.pids), _ended_cpu_s()
    load = _run_wrk(wrk, system, plan.seconds, plan.connections)
    spent_s = {name: each.cpu_s - before[name].cpu_s for name, each in read_processes(system.pids).items()}
    spent_s["wrk"] = _ended_cpu_s() - own_s
    return Round(load, {name: 1000 * seconds / max(1, load.requests) for name, seconds in spent_s.items()})


def _run_wrk(wrk: str, system: System, seconds: int, connections: int) -> Load:
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}", "--latency", "-s", str(ROOT / "bench" / "generate.lua")]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{system.port}"], capture_output=True, text=True, timeout=seconds + SPARE_S
    )
    return parse_wrk(done.stdout + done.stderr)


def _ended_cpu_s() -> float:
    """Processor time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """[median, smallest, largest] of the rounds' figures."""

    def of_rounds(values: Sequence[float], digits: int) -> list[float]:
        return [round(value, digits) for value in spread(values)]

    return {
        "requests_per_s": of_rounds([each.load.requests_per_s for each in rounds], 1),
        "ms_p50": of_rounds([each.load.ms_p50 for each in rounds], 1),
        "ms_p99": of_rounds([each.load.ms_p99 for each in rounds], 1),
        "cpu_ms": {name: of_rounds([each.cpu_ms[name] for each in rounds], 3) for name in rounds[0].cpu_ms},
        "failed": sum(each.load.failed for each in rounds),
    }
