"""The contract between the batcher and whatever computes a step.

T scheduled tokens, B sequences, M blocks per row, V vocabulary. Names follow com.microsoft:PagedAttention (in
brackets). The batcher owns this file because it is the side that uses it; implementations live in services/backends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """Facts about a loaded model on this machine; computed, never configured."""

    model: str
    num_blocks: int
    block_size: int  # tokens in a KV block
    max_batch_tokens: int  # most tokens a step may schedule
    max_batch_seqs: int  # most sequences a step may schedule
    max_model_len: int  # context length
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One packed axis, no padding, prefill and decode together. All arrays are C-contiguous."""

    input_ids: NDArray[np.int64]  # [T]      request after request
    positions: NDArray[np.int64]  # [T]      absolute position in its sequence
    cu_seqlens: NDArray[np.int32]  # [B + 1]  row offsets of each sequence in [T]  (cumulative_sequence_length)
    past_lens: NDArray[np.int32]  # [B]      tokens already in the KV cache       (past_seqlens)
    block_table: NDArray[np.int32]  # [B, M]   physical block ids; rows padded with 0
    slot_mapping: NDArray[np.int32]  # [T]      block_id * block_size + offset where K/V is written
    logits_rows: NDArray[np.int32]  # [R]      packed rows whose logits are wanted, at most one a sequence, ascending


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """One row per logits row [R]; meaning in batcher/sampling.py."""

    temperature: NDArray[np.float32]  # 0 = greedy
    top_k: NDArray[np.int32]  # 0 = no limit
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.int64]
    position: NDArray[np.int64]  # absolute position that the sampled token will take in its sequence


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed. The logits stay where they are until somebody asks: on a GPU they would cost a copy."""

    token_ids: NDArray[np.int64]  # [R]
    read_logits: Callable[[], NDArray[np.float32]]

    @property
    def logits(self) -> NDArray[np.float32]:
        """[R, V], a view that the next forward overwrites: read before it, copy what you keep."""
        return self.read_logits()


class BackendErrorKind(Enum):
    """What a failed forward means for the requests in it."""

    RETRYABLE = "retryable"  # nothing happened; the same step may be tried again
    CAPACITY = "capacity"  # out of memory: preempt, then retry smaller
    FATAL = "fatal"  # the backend is gone; hand everything back and stop


class BackendError(Exception):
    """A forward that did not happen."""

    def __init__(self, kind: BackendErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Backend(Protocol):
    """A loaded model with its KV pool."""

    @property
    def limits(self) -> BackendLimits: ...

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        """Run one step: write K/V at slot_mapping, return a token for each row of logits_rows. Raises BackendError.

        `keeps_logits`: they will be read, so nothing may be computed ahead that overwrites them. R may be 0 (a
        step of unfinished prefill chunks); token_ids and logits are then empty.
        """
        ...

    def close(self) -> None:
        """Free the model and its pool."""
        ...
