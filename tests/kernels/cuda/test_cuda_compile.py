"""Every kernel compiles for the GPUs we name, by the compiler of a serving machine, which needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cuda.binding import LINEAR_KERNELS
from kernels.cuda.compiler import DTYPES, SOURCES, CudaCompileError, compile_kernels

FUNCTIONS = {
    "linear.cu": LINEAR_KERNELS,
    "sample.cu": ("millrace_top", "millrace_sample"),
    "advance.cu": ("millrace_advance",),
}


def test_no_source_is_left_out() -> None:
    assert set(FUNCTIONS) == {path.name for path in SOURCES.glob("*.cu")}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", FUNCTIONS)
def test_every_kernel_compiles_and_is_found_under_its_name(source: str, dtype: str, architecture: str) -> None:
    cubin = compile_kernels(source, architecture, dtype)
    assert cubin.startswith(b"\x7fELF")
    for name in FUNCTIONS[source]:
        assert b"\0" + name.encode() + b"\0" in cubin or f".text.{name}".encode() in cubin


def test_what_does_not_compile_is_refused_with_the_compilers_words(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken(')
    with pytest.raises(CudaCompileError, match=r"broken\.cu does not compile .*sm_90.*error"):
        compile_kernels("broken.cu", "sm_90", "bfloat16", tmp_path)
