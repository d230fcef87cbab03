"""What the device can do, measured in the run that uses it: copying, reading, multiplying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

BYTES: Final = 4 << 30
SIDE: Final = 8192


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    copy_bytes_per_s: float  # read and written, both counted
    read_bytes_per_s: float
    bf16_flops: float


def measure() -> DeviceLimits:
    """Medians of seven, after one that does not count. Random numbers: zeros multiply faster."""
    source = torch.randint(0, 255, (BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = _seconds(lambda: target.copy_(source))
    reading = _seconds(lambda: source.view(torch.int32).sum(dtype=torch.int32))
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplying = _seconds(lambda: a @ b)
    return DeviceLimits(2 * BYTES / copying, BYTES / reading, 2 * SIDE**3 / multiplying)


def _seconds(work: Callable[[], object]) -> float:
    work()
    times: list[float] = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)
