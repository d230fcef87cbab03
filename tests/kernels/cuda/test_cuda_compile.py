"""Every kernel compiles for GPUs that are not here, fits them, and is named as those who launch it say."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from kernels.cuda.binding import LINEAR_KERNELS
from kernels.cuda.compiler import DTYPES, SOURCES, CudaCompileError, compile_kernels
from tests.kernels.cuda.cubin import Cost, costs

ARCHITECTURES = ("sm_80", "sm_90")
FILES = sorted(path.name for path in SOURCES.glob("*.cu"))
REGISTERS_OF_A_BLOCK = 65536  # what a multiprocessor has
STATIC_SHARED_BYTES = 48 << 10  # what a block may have without asking
THREADS = {"millrace_sample": 512}  # the most that a launch gives a block; 256 where nothing is said
LAUNCHED = {
    "linear.cu": set(LINEAR_KERNELS),
    "sample.cu": {"millrace_top", "millrace_sample"},
    "advance.cu": {"millrace_advance"},
}


@lru_cache(maxsize=None)
def compiled(file: str, architecture: str, dtype: str) -> dict[str, Cost]:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cuda extra: cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as missing:
        pytest.skip(f"needs nvidia-cuda-nvrtc: {missing}")
    return costs(compile_kernels(file, architecture, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles_and_fits_the_gpu(file: str, architecture: str, dtype: str) -> None:
    kernels = compiled(file, architecture, dtype)
    written = re.findall(r"MR_KERNEL void (millrace_\w+)\(|^MR_GEMV\((\w+),", (SOURCES / file).read_text(), re.M)
    assert kernels.keys() == {function or gemv for function, gemv in written} == LAUNCHED[file]
    for name, cost in kernels.items():
        assert cost.stack_bytes == 0, f"{name} spills registers to memory"
        assert 0 < cost.registers * THREADS.get(name, 256) <= REGISTERS_OF_A_BLOCK, name
        assert cost.shared_bytes <= STATIC_SHARED_BYTES, name


def test_shared_memory_is_counted() -> None:
    """The sums of a block of millrace_norm_rows: a float a warp (and 1 KiB of the system's on sm_90)."""
    assert compiled("linear.cu", "sm_80", "bfloat16")["millrace_norm_rows"].shared_bytes == 32
    assert compiled("linear.cu", "sm_90", "bfloat16")["millrace_norm_rows"].shared_bytes == 32 + 1024


def test_a_text_that_is_wrong_says_what_the_compiler_said() -> None:
    compiled("advance.cu", "sm_90", "bfloat16")  # skips where there is no compiler
    with pytest.raises(CudaCompileError, match=r"advance\.cu does not compile .*sm_13"):
        compile_kernels("advance.cu", "sm_13", "bfloat16")
