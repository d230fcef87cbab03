"""The CPU backend: one ONNX Runtime session whose graph holds our operators, and the KV pool beside it.

Inputs and outputs are bound by pointer: a step copies nothing but what it computes. The KV pool is a graph input that
the attention kernel writes in place; it is allocated lazily by the system, so an idle server holds only what it has
used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from batcher.backend import BackendError, BackendErrorKind, BackendLimits, ModelInput, SamplingInput, StepOutput
from kernels.loader import library_path
from model_store.manifest import GRAPH_FILE, ModelManifest
from services.backends.sizing import StepLimits, backend_limits

CACHE_LINE_BYTES: Final = 64
_BATCH_INPUTS: Final = (
    "input_ids", "positions", "cu_seqlens", "past_lens", "block_table", "slot_mapping", "logits_rows",
)  # fmt: skip
_SAMPLING_INPUTS: Final = ("temperature", "top_k", "top_p", "min_p", "seed")
# The dtypes are checked here, at the last place before raw pointers, because a wrong one would be read as garbage.
_DTYPES: Final[dict[str, type[np.generic]]] = {
    "input_ids": np.int64, "positions": np.int64, "cu_seqlens": np.int32, "past_lens": np.int32,
    "block_table": np.int32, "slot_mapping": np.int32, "logits_rows": np.int32, "temperature": np.float32,
    "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "seed": np.int64, "sample_position": np.int64,
}  # fmt: skip


class OnnxRuntimeBackend:
    """A Backend (batcher/backend.py) over one artifact of the store. Not thread-safe: one engine thread owns it."""

    def __init__(
        self, directory: Path, manifest: ModelManifest, limits: StepLimits, *, profile: Path | None = None
    ) -> None:
        geometry, kv = manifest.geometry, manifest.kv_cache
        self._limits = backend_limits(manifest, limits)
        num_blocks = self._limits.num_blocks
        self._session = _open(directory / GRAPH_FILE, limits, profile)
        self._kv_cache = _aligned_zeros((geometry.num_layers, 2, num_blocks, *kv.block_shape), np.dtype(kv.dtype))
        self._token_ids = np.zeros(self._limits.max_batch_seqs, dtype=np.int64)
        self._logits = np.zeros((self._limits.max_batch_seqs, geometry.vocab_size), dtype=np.float32)
        self._binding = self._session.io_binding()
        self._bind("kv_cache", self._kv_cache)

    @property
    def limits(self) -> BackendLimits:
        return self._limits

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        """One step; see Backend.forward. What the operators refuse is FATAL: the batcher sent an impossible batch."""
        rows = len(batch.logits_rows)
        for name in _BATCH_INPUTS:
            self._bind(name, getattr(batch, name))
        for name in _SAMPLING_INPUTS:
            self._bind(name, getattr(sampling, name))
        self._bind("sample_position", sampling.position)
        token_ids, logits = self._token_ids[:rows], self._logits[:rows]
        self._bind_output("token_ids", token_ids)
        self._bind_output("logits", logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's errors share no base class that its stubs name
            raise BackendError(_kind_of(error), str(error)) from error
        return StepOutput(token_ids, lambda: logits)

    def close(self) -> None:
        """Let go of the session and the pool (ONNX Runtime frees them with the last reference)."""
        del self._binding, self._session, self._kv_cache

    def end_profiling(self) -> Path:
        """Write the operator profile of a backend opened with `profile`."""
        return Path(self._session.end_profiling())

    def _bind(self, name: str, array: NDArray[np.generic]) -> None:
        wanted = _DTYPES.get(name)
        if (wanted is not None and array.dtype != wanted) or not array.flags.c_contiguous:
            raise TypeError(f"{name} must be C-contiguous {wanted}; got {array.dtype}: this is a bug")
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Zeros whose first byte begins a cache line; the system gives the memory when it is first written."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE_BYTES, dtype=np.uint8)
    start = -raw.ctypes.data % CACHE_LINE_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def _open(graph: Path, limits: StepLimits, profile: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = limits.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # The graph is written as it should run; the optimiser has nothing to add and costs load time.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False  # shapes change every step
    # ONNX Runtime's threads spin for a moment after a step before they sleep. Stopping them at once was measured 5 to
    # 8 % slower at one stream (the next step begins by waking them), but beside another session they take its cores.
    if limits.shares_cores:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _kind_of(error: Exception) -> BackendErrorKind:
    text = str(error).lower()
    is_memory = "bad_alloc" in text or "failed to allocate" in text or isinstance(error, MemoryError)
    return BackendErrorKind.CAPACITY if is_memory else BackendErrorKind.FATAL
