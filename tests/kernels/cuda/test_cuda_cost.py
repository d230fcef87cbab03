"""Every kernel fits the GPUs we name: nothing spilled, registers and shared memory of a block within what there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kernels.cuda.compiler import SOURCES, compile_kernels
from tests.kernels.cuda.cubin import costs

REGISTERS = 65536  # of a multiprocessor: a block needs its share at once
STATIC_SHARED_BYTES = 48 << 10  # what a block has without asking
THREADS = {"millrace_sample": 512}  # the most that a launch gives a block; 256 where nothing is said


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
def test_no_kernel_spills_or_asks_for_more_than_there_is(source: str, architecture: str) -> None:
    kernels = costs(compile_kernels(source, architecture, "bfloat16"))
    assert kernels
    for name, cost in kernels.items():
        assert cost.stack_bytes == 0, f"{name} spills registers to memory"
        assert 0 < cost.registers * THREADS.get(name, 256) <= REGISTERS, name
        assert cost.shared_bytes <= STATIC_SHARED_BYTES, name


def test_shared_memory_is_counted() -> None:
    """The sums of a block of millrace_norm_rows, a float a warp; on sm_90 the system keeps 1 KiB beside them."""
    for architecture, reserved in (("sm_80", 0), ("sm_90", 1024)):
        kernels = costs(compile_kernels("linear.cu", architecture, "bfloat16"))
        assert kernels["millrace_norm_rows"].shared_bytes == 32 + reserved


def test_a_stack_is_counted(tmp_path: Path) -> None:
    """256 bytes that are indexed by what is not known before cannot be registers."""
    shutil.copy(SOURCES / "common.cuh", tmp_path)
    (tmp_path / "stack.cu").write_text("""#include "common.cuh"
MR_KERNEL void stack(int *a, int n) {
    int b[64];
    for (int i = 0; i < 64; ++i) b[(i * n) & 63] = a[i];
    for (int i = 0; i < 64; ++i) a[i] = b[(a[i] + i) & 63];
}
""")
    assert costs(compile_kernels("stack.cu", "sm_90", "bfloat16", tmp_path))["stack"].stack_bytes == 256
