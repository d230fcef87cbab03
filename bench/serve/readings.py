"""What the system says of processes: processor time, memory, threads, open files from /proc; Redis's own memory."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass

from bench.serve.processes import System

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one moment."""

    cpu_s: float  # user and system, since its start, with children that have ended
    rss_bytes: int
    threads: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All processes at one moment."""

    at_s: float  # since the run began
    processes: Mapping[str, Reading]
    redis_bytes: int  # Redis's used_memory; 0 without one


def parse_stat(text: str, open_files: int) -> Reading:
    """A Reading from /proc/<pid>/stat (proc(5)): the fields count from the state, as a name may hold anything."""
    fields = text.rpartition(")")[2].split()
    return Reading(
        cpu_s=sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S,
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
        threads=int(fields[17]),
        open_files=open_files,
    )


def read_processes(pids: Mapping[str, int]) -> dict[str, Reading]:
    """Raises SystemExit if one of them has ended: what is measured after that means nothing."""
    found: dict[str, Reading] = {}
    for name, pid in pids.items():
        try:
            with open(f"/proc/{pid}/stat") as file:
                found[name] = parse_stat(file.read(), len(os.listdir(f"/proc/{pid}/fd")))
        except FileNotFoundError:
            raise SystemExit(f"{name} has ended while it was measured") from None
    return found


def cores_between(before: Mapping[str, Reading], after: Mapping[str, Reading], seconds: float) -> dict[str, float]:
    """How many cores each process has kept busy."""
    return {name: round((after[name].cpu_s - before[name].cpu_s) / seconds, 3) for name in before}


async def redis_memory(system: System) -> int:
    """`used_memory` in bytes. Raises OSError, TimeoutError, ValueError."""
    if not system.redis_url:
        return 0
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_unix_connection(system.redis_socket)
        try:
            writer.write(b"INFO memory\r\n")
            length = int((await reader.readline())[1:])
            answer = await reader.readexactly(length)
        finally:
            writer.close()
    return parse_info(answer, b"used_memory")


def parse_info(answer: bytes, name: bytes) -> int:
    """A number from Redis's INFO. Raises ValueError if it is not there."""
    for line in answer.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return int(value)
    raise ValueError(f"Redis's INFO has no {name.decode()}")


def own_cpu_s() -> float:
    """Processor time of this process, the client."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
