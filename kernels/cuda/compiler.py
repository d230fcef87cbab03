"""CUDA C text -> machine code for one GPU, by NVRTC: no toolkit and no compiler on the serving machine.

Apart from device.py because compiling needs no GPU: tests compile every kernel for GPUs that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

SOURCES: Final = Path(__file__).parent
DTYPES: Final = ("bfloat16", "float16")  # what a source's 16-bit type T can be


class CudaCompileError(Exception):
    """NVRTC refused the text, or is not installed; the message carries what it said."""


def compile_kernels(source: str, architecture: str, dtype: str, directory: Path = SOURCES) -> bytes:
    """The cubin of `source` (a file of `directory`: "sample.cu") for `architecture` ("sm_90") with T = `dtype`.

    Raises CudaCompileError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"kernels are compiled for {' or '.join(DTYPES)}, not {dtype}: this is a bug")
    text = (directory / source).read_bytes()
    headers = sorted(directory.glob("*.cuh"))
    options = [f"--gpu-architecture={architecture}", f"-DMR_BF16={int(dtype == 'bfloat16')}", "--std=c++17"]
    return _compile(source, text, headers, options)


def _compile(name: str, text: bytes, headers: Sequence[Path], options: Sequence[str]) -> bytes:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaCompileError(f"cuda-bindings is missing: pip install 'millrace[cuda]' ({error})") from error
    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
    texts = [header.read_bytes() for header in headers]
    names = [header.name.encode() for header in headers]
    try:
        begun, program = nvrtc.nvrtcCreateProgram(text, name.encode(), len(headers), texts, names)
    except RuntimeError as failure:  # the library itself is missing
        raise CudaCompileError(f"NVRTC cannot be loaded: {failure}; pip install 'millrace[cuda]'") from failure
    if begun != ok:
        raise CudaCompileError(f"NVRTC cannot begin {name}: {begun}")
    (outcome,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if outcome != ok:
        raise CudaCompileError(f"{name} does not compile ({' '.join(options)}): {_log(nvrtc, program)}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * int(size)
    (outcome,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    if outcome != ok:
        raise CudaCompileError(f"NVRTC gave no machine code for {name}: {outcome}")
    return cubin


def _log(nvrtc: Any, program: Any) -> str:
    """What the compiler said, cut to what a message may hold."""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * int(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode("utf-8", "replace").strip("\0 \n")[:4000]
