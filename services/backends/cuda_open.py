"""Put a CUDA backend together from the real parts, and give the KV pool what memory is left.

Memory is sized by trying: the largest step runs once with a small pool, so that ONNX Runtime holds all the workspace it
will ever ask for; what is then free is the pool's, less a reserve for CUDA graphs and other processes' whims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from batcher.backend import BackendError, BackendErrorKind, ModelInput, SamplingInput
from kernels.cuda.binding import LinearBinding
from kernels.cuda.compiler import CudaCompileError, compile_kernels
from kernels.cuda.device import CudaError, CudaUnavailable, Device, Kernel
from kernels.loader import KernelsUnavailable
from model_store.manifest import GRAPH_FILE, ModelManifest
from services.backends.cuda import CudaBackend
from services.backends.cuda_parts import CudaParts
from services.backends.cuda_session import CudaSession
from services.backends.sizing import StepLimits, backend_limits, bytes_per_block

MAX_SEQUENCES: Final = 256  # the operator's scan of sequence lengths takes no more in some of its forms
RESERVE_SHARE: Final = 0.05  # of the memory that is free after the largest step
# A quantized cache is read by way of 16-bit copies of the live context in every step that is not pure decode.
QUANTIZED_RESERVE_SHARE: Final = 0.25
LEAST_RESERVE_BYTES: Final = 512 << 20
PREPARED_TOKENS: Final = 2048  # decode graphs of sequences up to this long are captured at start

# Given the open device, the ONNX Runtime providers (name, options) that come before CUDA's.
Providers = Callable[[Device], Sequence[tuple[str, Mapping[str, str]]]]


def open_cuda(
    directory: Path,
    manifest: ModelManifest,
    limits: StepLimits,
    *,
    look_ahead: bool = True,
    prepare: bool = True,
    profile: Path | None = None,
    providers: Providers = lambda _: (),
) -> CudaBackend:
    """The model in `directory` on GPU 0. kv_memory_bytes = 0: what the GPU has left. Raises BackendError(FATAL)."""
    try:
        limits = replace(limits, max_batch_seqs=min(limits.max_batch_seqs, MAX_SEQUENCES))
        parts, device = _open_parts(directory, manifest, limits, profile, providers)
        if not limits.kv_memory_bytes:
            limits = replace(limits, kv_memory_bytes=_free_after_largest_step(parts, device, manifest, limits))
        backend = CudaBackend(parts, manifest, backend_limits(manifest, limits), look_ahead=look_ahead)
        if prepare:
            backend.prepare(-(-PREPARED_TOKENS // manifest.kv_cache.block_size))
        return backend
    except (CudaError, CudaCompileError, CudaUnavailable, KernelsUnavailable) as error:
        raise BackendError(BackendErrorKind.FATAL, f"{manifest.model_id} cannot run on a GPU: {error}") from error


def _open_parts(
    directory: Path, manifest: ModelManifest, limits: StepLimits, profile: Path | None, providers: Providers
) -> tuple[CudaParts, Device]:
    dtype = manifest.activations
    device = Device()
    binding = LinearBinding(device, dtype, scratch_bytes(manifest, limits))
    session = CudaSession(
        directory / GRAPH_FILE,
        binding.session(),
        ordinal=device.ordinal,
        stream=device.stream,
        providers=providers(device),
        profile=profile,
    )

    def close() -> None:
        binding.close()
        device.close()

    top, sample = _kernels(device, dtype, "sample.cu", "millrace_top", "millrace_sample")
    (advance,) = _kernels(device, dtype, "advance.cu", "millrace_advance")
    return CudaParts(device, session, top, sample, advance, close), device


def _kernels(device: Device, dtype: str, source: str, *names: str) -> list[Kernel]:
    found = device.load_kernels(compile_kernels(source, device.facts.architecture, dtype), names)
    return [found[name] for name in names]


def scratch_bytes(manifest: ModelManifest, limits: StepLimits) -> int:
    """What linear_op.c needs for the largest step: a layer's input in 16 bits, and gate and up beside it."""
    geometry = manifest.geometry
    tokens = max(limits.max_batch_tokens, limits.max_batch_seqs)
    return 2 * tokens * (geometry.hidden_size + 2 * geometry.intermediate_size) + 4096


def _free_after_largest_step(parts: CudaParts, device: Device, manifest: ModelManifest, limits: StepLimits) -> int:
    size = manifest.kv_cache.block_size
    few_blocks = -(-limits.max_batch_tokens // size) + 1
    probing = replace(limits, kv_memory_bytes=few_blocks * bytes_per_block(manifest))
    backend = CudaBackend(
        replace(parts, close=lambda: None),
        manifest,
        backend_limits(manifest, probing),
        use_graphs=False,
        look_ahead=False,
    )
    backend.forward(*_largest_step(backend))
    backend.close()
    free = device.free_bytes()
    is_quantized = manifest.kv_cache.dtype != manifest.activations
    share = QUANTIZED_RESERVE_SHARE if is_quantized else RESERVE_SHARE
    return max(0, free - max(LEAST_RESERVE_BYTES, int(free * share)))


def _largest_step(backend: CudaBackend) -> tuple[ModelInput, SamplingInput]:
    """One prompt of as many tokens as a step takes (or the model knows)."""
    limits = backend.limits
    count = min(limits.max_batch_tokens, limits.max_model_len, limits.num_blocks * limits.block_size)
    order = np.arange(count, dtype=np.int64)
    blocks = -(-count // limits.block_size)
    batch = ModelInput(
        input_ids=np.zeros(count, np.int64),
        positions=order,
        cu_seqlens=np.array([0, count], np.int32),
        past_lens=np.zeros(1, np.int32),
        block_table=np.arange(blocks, dtype=np.int32)[None, :],
        slot_mapping=order.astype(np.int32),
        logits_rows=np.array([count - 1], np.int32),
    )
    zero, whole = np.zeros(1, np.int32), np.zeros(1, np.int64)
    none = np.zeros(1, np.float32)
    return batch, SamplingInput(none, zero, np.ones(1, np.float32), none, whole, whole)
