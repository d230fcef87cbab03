"""An ONNX Runtime session on the CUDA provider, run on a stream of ours with everything bound by address.

A run returns as soon as its work is on the stream: no copy, no synchronization. Inputs and outputs are device memory
that the caller owns, but for `attention_metadata`, which attention reads on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kernels.cuda.device import CudaUnavailable

ELEMENT_TYPES: Final = {  # ONNX's numbers, because numpy has no names for some
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17,
}  # fmt: skip
PROVIDER: Final = "CUDAExecutionProvider"


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor in device memory."""

    address: int
    dtype: str  # numpy name
    shape: tuple[int, ...]


class BoundRun:
    """A session with inputs and outputs in place: run() as often as wanted."""

    def __init__(self, session: ort.InferenceSession, options: ort.RunOptions, device: int) -> None:
        self._session = session
        self._options = options
        self._device = device
        self._binding = session.io_binding()
        self._host: dict[str, NDArray[np.int32]] = {}  # kept alive: the binding holds their addresses

    def bind(self, inputs: Mapping[str, Located], outputs: Mapping[str, Located]) -> None:
        """Put tensors in place; those bound before under other names stay."""
        for name, at in inputs.items():
            self._binding.bind_input(name, "cuda", self._device, ELEMENT_TYPES[at.dtype], at.shape, at.address)
        for name, at in outputs.items():
            self._binding.bind_output(name, "cuda", self._device, ELEMENT_TYPES[at.dtype], at.shape, at.address)

    def bind_host(self, name: str, values: NDArray[np.int32]) -> None:
        """An input that nodes read on the host; it may be changed between runs."""
        self._host[name] = values
        self._binding.bind_input(name, "cpu", 0, ELEMENT_TYPES["int32"], values.shape, values.ctypes.data)

    def run(self) -> None:
        """Put one run on the stream."""
        self._session.run_with_iobinding(self._binding, self._options)


class CudaSession:
    """One graph, opened for a stream. `linear` opens the operators' side (kernels/cuda/binding.py)."""

    def __init__(
        self,
        graph: Path,
        linear: AbstractContextManager[Path],
        *,
        ordinal: int,
        stream: int,
        providers: Sequence[tuple[str, Mapping[str, str]]] = (),
        profile: Path | None = None,
    ) -> None:
        """`providers` come before the CUDA provider (TensorRT's). Raises CudaUnavailable."""
        check_provider()
        self._ordinal = ordinal
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        # Engines are found by the names in the graph as it was exported: what fuses nodes renames them.
        options.graph_optimization_level = levels.ORT_DISABLE_ALL if providers else levels.ORT_ENABLE_EXTENDED
        options.enable_mem_pattern = False  # shapes change every step
        options.log_severity_level = 3
        # A node that fell back to the processor would copy and wait in every step.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        cuda = {
            "device_id": str(ordinal),
            "user_compute_stream": str(stream),
            "arena_extend_strategy": "kSameAsRequested",  # what is not taken here is left to the KV pool
            "use_tf32": "0",
        }
        with linear as library:
            options.register_custom_ops_library(str(library))
            self._session = ort.InferenceSession(str(graph), options, providers=[*providers, (PROVIDER, cuda)])

    def new_run(self) -> BoundRun:
        return BoundRun(self._session, self._options, self._ordinal)

    def end_profiling(self) -> Path:
        """Write the operator profile of a session opened with `profile`."""
        return Path(self._session.end_profiling())


def check_provider() -> None:
    """Raises CudaUnavailable with what to install unless this ONNX Runtime can use a GPU."""
    preload: Any = getattr(ort, "preload_dlls", None)
    if PROVIDER not in ort.get_available_providers() or preload is None:
        raise CudaUnavailable(
            f"onnxruntime {ort.__version__} is the CPU build; for GPUs: pip uninstall onnxruntime &&"
            " pip install 'millrace[cuda]'"
        )
    preload()
