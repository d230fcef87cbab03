"""Facts about this machine that size a worker: cores it may use, memory it may fill.

Apart so that sizing is one place, the same for `up`, `worker`, `bench` and `doctor`. Linux cgroups (v1 and v2) are
honoured: a container with 2 of 64 cores is a machine with 2 cores.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use."""

    cores: int
    memory_bytes: int  # total
    free_memory_bytes: int
    processor: str


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _cgroup_cores() -> int | None:
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        quota_us = _number(CGROUP / "cpu/cpu.cfs_quota_us")
        period_us = _number(CGROUP / "cpu/cpu.cfs_period_us")
        return max(1, math.ceil(quota_us / period_us)) if quota_us and period_us and quota_us > 0 else None


def _cgroup_memory() -> tuple[int, int] | None:
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(CGROUP / limit_file), _number(CGROUP / used_file)
        if limit is not None and used is not None and limit < 2**60:
            return limit, max(0, limit - used)
    return None


def _meminfo() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) >= 2}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return os.uname().machine


def inspect_machine() -> Machine:
    """Read the machine's facts now."""
    cores = len(os.sched_getaffinity(0))
    limit = _cgroup_cores()
    memory = _meminfo()
    total, free = memory["MemTotal"], memory["MemAvailable"]
    group = _cgroup_memory()
    if group is not None:
        total, free = min(total, group[0]), min(free, group[1])
    return Machine(min(cores, limit) if limit else cores, total, free, _processor())
