"""From a name in the store to an engine that steps: the one way that `up`, `worker`, `generate` and `bench` share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batcher.backend import Backend, ModelInput, SamplingInput
from batcher.engine import Engine
from kernels import loader
from model_store.manifest import ModelManifest, read_manifest
from model_store.parity import PROMPT_LENGTHS
from model_store.store import Store
from services.backends.sizing import StepLimits, bytes_per_block, count_blocks
from services.machine import Machine, inspect_machine
from services.settings import Settings
from wire.messages import Generate

if TYPE_CHECKING:
    from services.backends.onnxruntime import OnnxRuntimeBackend

KV_SHARE_OF_FREE_MEMORY = 0.25
CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 4096  # enough to keep the arithmetic busy; a step of an 8B model stays near 60 ms
WARM_UP_TOKENS = 32
PARITY_TOKENS = max(PROMPT_LENGTHS)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """An artifact of the store, found but not opened."""

    directory: Path
    manifest: ModelManifest


def find_model(settings: Settings, name: str) -> StoredModel:
    """Resolve `name` or `name@revision` in the store. Raises UnknownModel."""
    directory = Store(settings.store).resolve(name)
    return StoredModel(directory, read_manifest(directory))


def step_limits(settings: Settings, target: str = "cpu", machine: Machine | None = None) -> StepLimits:
    """What the settings ask for, with the machine's own numbers where they say 0.

    For a GPU kv_memory_bytes stays 0: what the device has left is known when the model is on it.
    """
    if target != "cpu":
        return StepLimits(
            max_batch_tokens=settings.max_batch_tokens or GPU_BATCH_TOKENS,
            max_batch_seqs=settings.max_batch_seqs,
            kv_memory_bytes=settings.kv_memory_bytes,
            threads=1,
        )
    machine = machine or inspect_machine()
    return StepLimits(
        max_batch_tokens=settings.max_batch_tokens or CPU_BATCH_TOKENS,
        max_batch_seqs=settings.max_batch_seqs,
        kv_memory_bytes=settings.kv_memory_bytes or int(machine.free_memory_bytes * KV_SHARE_OF_FREE_MEMORY),
        threads=settings.threads or machine.cores,
        shares_cores=settings.spin == "no" or (settings.spin == "auto" and len(settings.model_names) > 1),
    )


def open_backend(settings: Settings, model: StoredModel) -> Backend:
    """Load the model on what it was built for. Raises BackendError(FATAL) if that is not to be had here."""
    return _OPENERS[model.manifest.target](settings, model)


def open_cpu(settings: Settings, model: StoredModel, *, profile: Path | None = None) -> OnnxRuntimeBackend:
    """Load a model of the CPU. The instruction set is chosen first: the kernels read it when they are created."""
    from services.backends.onnxruntime import OnnxRuntimeBackend  # a gateway's image has no runtime

    limits = step_limits(settings)
    loader.set_isa(None if settings.kernels == "auto" else settings.kernels)
    loader.set_threads(limits.threads)
    return OnnxRuntimeBackend(model.directory, model.manifest, limits, profile=profile)


def _open_cuda(settings: Settings, model: StoredModel) -> Backend:
    from services.backends.cuda_open import open_cuda  # the CUDA libraries only where they are wanted

    return open_cuda(model.directory, model.manifest, step_limits(settings, "cuda"))


def _open_tensorrt(settings: Settings, model: StoredModel) -> Backend:
    from services.backends.engine_cache import EngineCache, engines_root
    from services.backends.tensorrt import open_tensorrt

    engines = EngineCache(engines_root(settings.store))
    return open_tensorrt(model.directory, model.manifest, step_limits(settings, "tensorrt"), engines)


_OPENERS: Mapping[str, Callable[[Settings, StoredModel], Backend]] = {
    "cpu": open_cpu,
    "cuda": _open_cuda,
    "tensorrt": _open_tensorrt,
}


def open_engine(settings: Settings, backend: Backend) -> Engine:
    """An engine around a loaded model, as the settings want it to step."""
    return Engine(backend, target_itl_s=settings.target_itl_ms / 1000)


def warm_up(backend: Backend) -> None:
    """Run one short request to its end: the first client shall not pay for paging in weights and waking threads."""
    limits = backend.limits
    room = min(limits.max_model_len, limits.num_blocks * limits.block_size) - 2
    prompt = list(range(min(WARM_UP_TOKENS, limits.vocab_size, room)))
    engine = Engine(backend, prefix_cache=False)
    engine.add(Generate(request_id="warm-up", model=limits.model, prompt_ids=prompt, max_tokens=2))
    while engine.has_work:
        engine.step()


class ArtifactLogits:
    """All logits of one sequence through an artifact, for parity: token ids [T] -> float32 [T, V], in one prefill step.

    That a prefill in one step, in chunks and token by token has the same bits is proved elsewhere, by tests.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __call__(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        count = len(token_ids)
        order = np.arange(count, dtype=np.int64)
        num_blocks = -(-count // self._backend.limits.block_size)
        batch = ModelInput(
            input_ids=np.ascontiguousarray(token_ids, dtype=np.int64),
            positions=order,
            cu_seqlens=np.array([0, count], dtype=np.int32),
            past_lens=np.zeros(1, dtype=np.int32),
            block_table=np.arange(num_blocks, dtype=np.int32)[None, :],
            slot_mapping=order.astype(np.int32),
            logits_rows=order.astype(np.int32),
        )
        greedy = SamplingInput(
            temperature=np.zeros(count, dtype=np.float32),
            top_k=np.zeros(count, dtype=np.int32),
            top_p=np.ones(count, dtype=np.float32),
            min_p=np.zeros(count, dtype=np.float32),
            seed=np.zeros(count, dtype=np.int64),
            position=order + 1,
        )
        return self._backend.forward(batch, greedy).logits.copy()


@contextmanager
def artifact_logits(settings: Settings, directory: Path, manifest: ModelManifest) -> Iterator[ArtifactLogits]:
    """Open an artifact that is not in the store yet, small, for as long as its parity is measured."""
    blocks = PARITY_TOKENS // manifest.kv_cache.block_size + 1
    limits = replace(
        step_limits(settings, manifest.target),
        max_batch_tokens=PARITY_TOKENS,
        max_batch_seqs=PARITY_TOKENS,
        kv_memory_bytes=blocks * bytes_per_block(manifest),
    )
    with tempfile.TemporaryDirectory(prefix="millrace-parity-") as scratch:
        backend = _PROVERS[manifest.target](directory, manifest, limits, Path(scratch))
        try:
            yield ArtifactLogits(backend)
        finally:
            backend.close()


def _prove_cpu(directory: Path, manifest: ModelManifest, limits: StepLimits, _scratch: Path) -> Backend:
    from services.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(directory, manifest, limits)


def _prove_cuda(directory: Path, manifest: ModelManifest, limits: StepLimits, _scratch: Path) -> Backend:
    from services.backends.cuda_open import open_cuda

    return open_cuda(directory, manifest, limits, look_ahead=False, prepare=False)


def _prove_tensorrt(directory: Path, manifest: ModelManifest, limits: StepLimits, scratch: Path) -> Backend:
    from services.backends.tensorrt import open_building

    return open_building(directory, manifest, limits, scratch)


_PROVERS: Mapping[str, Callable[[Path, ModelManifest, StepLimits, Path], Backend]] = {
    "cpu": _prove_cpu,
    "cuda": _prove_cuda,
    "tensorrt": _prove_tensorrt,
}


def describe(settings: Settings, model: StoredModel, machine: Machine) -> dict[str, object]:
    """The numbers this machine will choose for this model, and what they come from.

    None where only the GPU can tell: its KV pool takes what is left once the model is on it.
    """
    limits = step_limits(settings, model.manifest.target, machine)
    blocks = count_blocks(model.manifest, limits) if limits.kv_memory_bytes else None
    block_size = model.manifest.kv_cache.block_size
    return {
        "model": model.manifest.model_id,
        "target": model.manifest.target,
        "scheme": model.manifest.scheme,
        "parameters": model.manifest.num_parameters,
        "weights_bytes": sum(entry.size_bytes for entry in model.manifest.files.values()),
        "context_tokens": model.manifest.geometry.max_model_len,
        "kv_bytes_per_token": bytes_per_block(model.manifest) // block_size,
        "kv_blocks": blocks,
        "kv_tokens": blocks and blocks * block_size,
        "kv_memory_bytes": blocks and blocks * bytes_per_block(model.manifest),
        "threads": limits.threads,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_batch_seqs": limits.max_batch_seqs,
    }
