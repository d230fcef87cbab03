"""Give the CUDA operators (linear_op.c) what they launch: functions for this GPU, a cuBLAS handle, a stream, scratch.

The library links nothing, so addresses are handed over in one structure. A session's operators remember the structure
that was open while the session was created; `session_of` holds a lock for that long.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kernels.build import cuda_library_file
from kernels.cuda.compiler import compile_kernels
from kernels.cuda.device import Device, Kernel
from kernels.loader import KernelsUnavailable

GEMV_KERNELS: Final = tuple(f"millrace_gemv_{rows}{form}" for rows in (1, 2) for form in ("", "_wide"))
LINEAR_KERNELS: Final = (
    *GEMV_KERNELS,
    *("millrace_norm_rows", "millrace_silu_mul", "millrace_residual_bias", "millrace_add_bias"),
)
ONNX_TYPES: Final = {"bfloat16": 16, "float16": 10}
GEMV_ROWS: Final = 2  # most rows that the fused kernel takes: from three on cuBLAS was measured faster
OVERLAP_FROM: Final = (9, 0)  # compute capability that has programmatic dependent launch
BLAS_WORKSPACE_BYTES: Final = 32 << 20  # what cuBLAS recommends for Hopper; one of ours makes its choices repeatable

_opening = threading.Lock()


class _Cuda(ctypes.Structure):
    """struct mr_cuda of linear_op.c, field by field."""

    _fields_ = (
        ("launch", ctypes.c_void_p),
        ("gemm", ctypes.c_void_p),
        ("blas", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_uint64),
        ("type", ctypes.c_int32),
        ("gemv_rows", ctypes.c_int32),
        ("overlaps", ctypes.c_int32),
        ("gemv", ctypes.c_void_p * len(GEMV_KERNELS)),
        ("norm_rows", ctypes.c_void_p),
        ("silu_mul", ctypes.c_void_p),
        ("residual_bias", ctypes.c_void_p),
        ("add_bias", ctypes.c_void_p),
    )


def cuda_library_path() -> Path:
    """The operators' library for this machine. Raises KernelsUnavailable with the command that builds it."""
    path = cuda_library_file(platform.machine())
    if not path.is_file():
        raise KernelsUnavailable(
            f"{path} is not built; run: pip install 'millrace[kernels]' && python -m kernels.build"
        )
    return path


class LinearBinding:
    """What the linear operators of one session compute with. Keep it for as long as the session lives."""

    def __init__(self, device: Device, dtype: str, scratch_bytes: int, gemv_rows: int = GEMV_ROWS) -> None:
        """`dtype` of the weights; `scratch_bytes` as linear_op.c counts them for the largest step."""
        kernels = device.load_kernels(compile_kernels("linear.cu", device.facts.architecture, dtype), LINEAR_KERNELS)
        self._device = device
        self._scratch = device.allocate(scratch_bytes)
        self._workspace = device.allocate(BLAS_WORKSPACE_BYTES)
        self._blas = _Blas(device, self._workspace, BLAS_WORKSPACE_BYTES)
        self._fields = _Cuda(
            launch=_address(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx),
            gemm=self._blas.gemm_address,
            blas=self._blas.handle,
            stream=device.stream,
            scratch=self._scratch,
            scratch_bytes=scratch_bytes,
            type=ONNX_TYPES[dtype],
            gemv_rows=gemv_rows,
            overlaps=device.facts.compute_capability >= OVERLAP_FROM,
            gemv=(ctypes.c_void_p * len(GEMV_KERNELS))(*(kernels[name].address for name in GEMV_KERNELS)),
            **_addresses(kernels, "norm_rows", "silu_mul", "residual_bias", "add_bias"),
        )

    @contextmanager
    def session(self) -> Iterator[Path]:
        """Open the session inside: its linear nodes will use this. Gives the library to register."""
        path = cuda_library_path()
        library = ctypes.CDLL(str(path))
        library.millrace_cuda_open.argtypes = [ctypes.POINTER(_Cuda)]
        library.millrace_cuda_open.restype = None
        with _opening:
            library.millrace_cuda_open(ctypes.byref(self._fields))
            try:
                yield path
            finally:
                library.millrace_cuda_open(None)

    def close(self) -> None:
        """Free device memory; the session must be gone."""
        self._blas.close()
        self._device.release(self._scratch)
        self._device.release(self._workspace)


class _Blas:
    """A cuBLAS handle on the device's stream, with a workspace of ours."""

    def __init__(self, device: Device, workspace: int, workspace_bytes: int) -> None:
        self._library = _load_cublas()
        self.gemm_address = _address(self._library.cublasGemmEx)
        handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(handle))
        self.handle = handle.value or 0
        self._call("cublasSetStream_v2", ctypes.c_void_p(self.handle), ctypes.c_void_p(device.stream))
        arguments = (ctypes.c_void_p(self.handle), ctypes.c_void_p(workspace), ctypes.c_size_t(workspace_bytes))
        self._call("cublasSetWorkspace_v2", *arguments)

    def close(self) -> None:
        self._call("cublasDestroy_v2", ctypes.c_void_p(self.handle))

    def _call(self, name: str, *arguments: object) -> None:
        code: int = getattr(self._library, name)(*arguments)
        if code:
            raise KernelsUnavailable(f"{name}: cuBLAS error {code}")


def _load_cublas() -> ctypes.CDLL:
    """The cuBLAS that ONNX Runtime's CUDA provider uses too: a package's, or the system's."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        loaded = load_nvidia_dynamic_lib("cublas")
    except (ImportError, RuntimeError) as error:
        raise KernelsUnavailable(f"cuBLAS cannot be loaded: {error}; pip install 'millrace[cuda]'") from error
    return ctypes.CDLL(loaded.abs_path or "libcublas.so")


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    if address is None:
        raise KernelsUnavailable("a function of the CUDA libraries has no address: this is a bug")
    return address


def _addresses(kernels: Mapping[str, Kernel], *names: str) -> dict[str, int]:
    return {name: kernels[f"millrace_{name}"].address for name in names}
