"""What this processor can do at most: integer and float multiply-adds over registers, and reading memory.

Measured, not looked up, so that a share of a limit means this machine in this minute, whoever else is on it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kernels import loader

_ROUNDS = 400_000
_READ_WORDS = 16 * 2**20  # 128 MiB: beyond any cache of a core


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates over all threads; an operation is a multiplication or an addition."""

    int8_ops_per_s: float
    f32_ops_per_s: float
    read_bytes_per_s: float


@lru_cache(maxsize=1)
def _memory() -> NDArray[np.uint64]:
    return np.ones(_READ_WORDS, dtype=np.uint64)


def measure_limits(threads: int) -> Limits:
    """Measure all three on `threads` threads, a few tenths of a second in all."""
    native = loader.load()
    native.millrace_peak_int8.argtypes = native.millrace_peak_f32.argtypes = [ctypes.c_uint64]
    native.millrace_peak_int8.restype = native.millrace_peak_f32.restype = ctypes.c_uint64
    native.millrace_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    native.millrace_read.restype = ctypes.c_uint64
    words = _memory()
    share = _READ_WORDS // threads

    def read(index: int) -> int:
        native.millrace_read(words.ctypes.data + 8 * share * index, share)  # ctypes lets other threads run meanwhile
        return 8 * share

    return Limits(
        int8_ops_per_s=2 * _rate(lambda _: int(native.millrace_peak_int8(_ROUNDS)), threads),
        f32_ops_per_s=2 * _rate(lambda _: int(native.millrace_peak_f32(_ROUNDS)), threads),
        read_bytes_per_s=_rate(read, threads),
    )


def _rate(work: Callable[[int], int], threads: int) -> float:
    """Units of work a second, the best of three tries (what disturbs a limit only ever lowers it)."""
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            done = sum(pool.map(work, range(threads)))
            best = max(best, done / (time.perf_counter() - start))
    return best
