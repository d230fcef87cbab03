"""How large a step and a KV pool may be: arithmetic on a manifest and a few limits, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from batcher.backend import BackendError, BackendErrorKind, BackendLimits
from model_store.manifest import ModelManifest


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large a step and the KV pool may be; everything else follows from the model."""

    max_batch_tokens: int
    max_batch_seqs: int
    kv_memory_bytes: int
    threads: int
    shares_cores: bool = False  # with other models of this process, or with other processes: threads do not spin


def bytes_per_block(manifest: ModelManifest) -> int:
    """Memory of one KV block through all layers, keys and values."""
    return manifest.geometry.num_layers * 2 * manifest.kv_cache.block_bytes


def count_blocks(manifest: ModelManifest, limits: StepLimits) -> int:
    """How many KV blocks fit `kv_memory_bytes`, never more than the largest batch of the longest requests could use."""
    block_size = manifest.kv_cache.block_size
    most_useful = limits.max_batch_seqs * -(-manifest.geometry.max_model_len // block_size)
    return min(limits.kv_memory_bytes // bytes_per_block(manifest), most_useful, 2**31 // block_size - 1)


def backend_limits(manifest: ModelManifest, limits: StepLimits) -> BackendLimits:
    """What the batcher is told. Raises BackendError(FATAL) if the memory holds no block."""
    num_blocks = count_blocks(manifest, limits)
    if num_blocks < 1:
        raise BackendError(
            BackendErrorKind.FATAL,
            f"the KV cache of {manifest.model_id} needs at least {bytes_per_block(manifest):,} bytes;"
            f" it was given {limits.kv_memory_bytes:,}",
        )
    return BackendLimits(
        model=manifest.name,
        num_blocks=num_blocks,
        block_size=manifest.kv_cache.block_size,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_seqs=min(limits.max_batch_seqs, limits.max_batch_tokens),
        max_model_len=manifest.geometry.max_model_len,
        vocab_size=manifest.geometry.vocab_size,
    )
