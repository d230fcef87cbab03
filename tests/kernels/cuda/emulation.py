"""The CUDA kernels' text on the CPU: compiled once a test process, launched with numpy arrays for pointers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kernels.cuda.compiler import SOURCES

_launches = count()  # every other one runs its threads from the last to the first
HERE = Path(__file__).parent
FLAGS = ("-std=gnu17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-sanitize=all", "-Wno-unused-function")


@lru_cache(maxsize=2)
def library(dtype: str) -> ctypes.CDLL:
    """The emulated kernels with T = `dtype`."""
    with tempfile.TemporaryDirectory(prefix="millrace-emulated-") as directory:  # what is loaded needs no file
        path = Path(directory) / "emulated.so"
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, f"-DMR_BF16={int(dtype == 'bfloat16')}"]
        command += ["-I", str(SOURCES), "-I", str(HERE), str(HERE / "emulated.c"), "-o", str(path), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(path))


def launch(name: str, blocks: int, threads: int, *arguments: Any, dtype: str = "bfloat16") -> None:
    """Run a kernel to its end. Arguments: ctypes values, or numpy arrays where the kernel takes a pointer."""
    values = [ctypes.c_void_p(each.ctypes.data) if isinstance(each, np.ndarray) else each for each in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    code: int = library(dtype).emulated_launch(name.encode(), blocks, threads, pointers, next(_launches) % 2)
    if code:
        raise ValueError(f"no emulated kernel {name} with {threads} threads")
