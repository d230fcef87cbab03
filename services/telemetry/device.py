"""How busy the devices are that a worker computes on, read at each scrape.

The processor: time that the container has used of what it may use (cgroup v2), or this process where there is no
container. GPUs: what NVML says (nvml.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from services.telemetry.nvml import Nvml
from services.telemetry.table import DEVICE_METRICS, families

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_CGROUP: Final = Path("/proc/self/cgroup")
SHORTEST_S: Final = 1.0  # two scrapers at once must not measure each other's moment


class CpuMeter:
    """Processor time used over processor time allowed, since the last look."""

    def __init__(
        self,
        *,
        cgroups: Path = CGROUPS,
        own_cgroup: Path = OWN_CGROUP,
        now_s: Callable[[], float] = time.monotonic,
        own_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._directory = _own_directory(cgroups, own_cgroup)
        self._now_s = now_s
        self._own_s = own_s
        self._lock = threading.Lock()  # scrapes may come on several threads
        self._at_s, self._used_s = now_s(), self._used()
        self._ratio = 0.0

    def ratio(self) -> float:
        """0 to 1; 0 before the first second has passed."""
        with self._lock:
            now_s = self._now_s()
            elapsed_s = now_s - self._at_s
            if elapsed_s >= SHORTEST_S:
                used_s = self._used()
                ratio = (used_s - self._used_s) / (elapsed_s * self._cores())
                self._ratio = min(1.0, max(0.0, ratio))
                self._at_s, self._used_s = now_s, used_s
            return self._ratio

    def _used(self) -> float:
        if self._directory is not None:
            try:
                rows = (self._directory / "cpu.stat").read_text().splitlines()
                return float(dict(row.split(maxsplit=1) for row in rows)["usage_usec"]) / 1e6
            except (OSError, ValueError, KeyError):
                self._directory = None  # and the next difference is cut to 0 or 1
        return self._own_s()

    def _cores(self) -> float:
        """What may be used at once; read each time, since a quota may change while we run."""
        cores = float(len(os.sched_getaffinity(0)))
        if self._directory is None:
            return cores
        try:
            quota, period = (self._directory / "cpu.max").read_text().split()
            return cores if quota == "max" else min(cores, int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            return cores


def _own_directory(cgroups: Path, own_cgroup: Path) -> Path | None:
    """This process's group in cgroup v2, if it can be limited: the root group is the whole machine."""
    try:
        line = next(line for line in own_cgroup.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return None
    directory = cgroups / line.removeprefix("0::/")
    return directory if (directory / "cpu.max").is_file() and (directory / "cpu.stat").is_file() else None


class DeviceCollector(Collector):
    """The processor as "cpu", GPUs as "gpu0" and on. `gpus` gives their ratios."""

    def __init__(self, cpu: CpuMeter | None = None, gpus: Callable[[], Sequence[float]] | None = None) -> None:
        self._cpu = cpu or CpuMeter()
        if gpus is None:
            nvml = Nvml.open()
            gpus = nvml.utilization if nvml is not None else tuple
        self._gpus = gpus

    def collect(self) -> Iterable[Metric]:
        values = [(("cpu",), self._cpu.ratio())]
        values += [((f"gpu{index}",), ratio) for index, ratio in enumerate(self._gpus())]
        yield from families(DEVICE_METRICS, {"millrace_device_utilization_ratio": values})
