"""What the device can do, measured in the run that uses it: copying, reading, multiplying.

Medians of seven after one that does not count; random numbers, because zeros multiply faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

GPU_BYTES: Final = 4 << 30
CPU_BYTES: Final = 256 << 20
SIDE: Final = 8192
REPEATS: Final = 7


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    copy_bytes_per_s: float  # read and written, both counted
    read_bytes_per_s: float
    operations_per_s: float  # multiplications and additions
    operations: str  # which ones

    def as_shown(self) -> dict[str, object]:
        return {
            "copy_tb_per_s": round(self.copy_bytes_per_s / 1e12, 4),
            "read_tb_per_s": round(self.read_bytes_per_s / 1e12, 4),
            "tera_operations_per_s": round(self.operations_per_s / 1e12, 3),
            "operations": self.operations,
        }


def measure_cuda() -> DeviceLimits:
    import torch

    found = _measure_cuda()
    torch.cuda.empty_cache()  # the peer is another process: what torch keeps here it cannot have
    return found


def _measure_cuda() -> DeviceLimits:
    import torch

    event: Any = torch.cuda.Event  # its constructor has no types
    source = torch.randint(0, 255, (GPU_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def seconds(work: Callable[[], object]) -> float:
        work()
        times: list[float] = []
        for _ in range(REPEATS):
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return median(times)

    copying = seconds(lambda: target.copy_(source))
    reading = seconds(lambda: source.view(torch.int32).sum(dtype=torch.int32))
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplying = seconds(lambda: a @ b)
    return DeviceLimits(
        2 * GPU_BYTES / copying, GPU_BYTES / reading, 2 * SIDE**3 / multiplying, f"bf16 matrix product of {SIDE}^3"
    )


def measure_cpu(threads: int, *, integer: bool) -> DeviceLimits:
    """The processor's, for trying the run without a GPU: copying by one thread, the rest by `threads`."""
    from kernels.limits import measure_limits

    source = np.random.default_rng(0).integers(0, 2**63, CPU_BYTES // 8, dtype=np.int64)
    target = np.empty_like(source)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    found = measure_limits(threads)
    rate, what = (found.int8_ops_per_s, "int8") if integer else (found.f32_ops_per_s, "float32")
    return DeviceLimits(2 * CPU_BYTES / median(times[1:]), found.read_bytes_per_s, rate, f"{what} in registers")
