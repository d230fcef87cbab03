"""Backends under test, and a way to drive one by hand: whole sequences in, rows out, no batcher in between.

The batcher's own packing is one of the things under test, so expected tokens must not come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batcher.backend import Backend, BackendLimits, ModelInput, SamplingInput
from services.backends.scripted import ScriptedBackend
from tests.services.cuda_emulation import emulated_backend
from tests.shipped import shipped_backend
from wire.messages import Generate, SamplingParams


def scripted_limits(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_batch_tokens: int = 64,
    max_batch_seqs: int = 8,
    max_model_len: int = 128,
    vocab_size: int = 50,
) -> BackendLimits:
    """Small limits, to be bent by keyword."""
    return BackendLimits(
        "scripted", num_blocks, block_size, max_batch_tokens, max_batch_seqs, max_model_len, vocab_size
    )


# What tests/contracts/test_backend.py runs against. A backend that needs a model makes it in its function.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "scripted": lambda: ScriptedBackend(scripted_limits()),
    "onnxruntime": shipped_backend,
    "cuda": lambda: emulated_backend(batch_tokens=600)[0],
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence whose KV lies in `blocks`; asks for the last row's logits if `wants`."""

    token_ids: Sequence[int]  # the sequence from its beginning
    start: int
    end: int
    blocks: Sequence[int]
    wants: bool = True
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's output, copied."""

    token_ids: list[int]
    logits: NDArray[np.float32]


def forward(backend: Backend, chunks: Sequence[Chunk]) -> Rows:
    """One step of these chunks, packed in the plainest way there is."""
    output = backend.forward(*packed(chunks, backend.limits.block_size))
    return Rows([int(token_id) for token_id in output.token_ids], np.array(output.logits))


def packed(chunks: Sequence[Chunk], block_size: int) -> tuple[ModelInput, SamplingInput]:
    """The arrays of the contract, token by token."""
    input_ids, positions, slots, logits_rows = list[int](), list[int](), list[int](), list[int]()
    cu_seqlens = [0]
    used = [-(-chunk.end // block_size) for chunk in chunks]
    table = np.zeros((len(chunks), max(used)), np.int32)
    for row, chunk in enumerate(chunks):
        table[row, : used[row]] = chunk.blocks[: used[row]]
        for position in range(chunk.start, chunk.end):
            input_ids.append(chunk.token_ids[position])
            positions.append(position)
            slots.append(chunk.blocks[position // block_size] * block_size + position % block_size)
        cu_seqlens.append(len(positions))
        if chunk.wants:
            logits_rows.append(len(positions) - 1)
    batch = ModelInput(
        input_ids=np.array(input_ids, np.int64),
        positions=np.array(positions, np.int64),
        cu_seqlens=np.array(cu_seqlens, np.int32),
        past_lens=np.array([chunk.start for chunk in chunks], np.int32),
        block_table=table,
        slot_mapping=np.array(slots, np.int32),
        logits_rows=np.array(logits_rows, np.int32),
    )
    asked = [chunk for chunk in chunks if chunk.wants]
    sampling = SamplingInput(
        temperature=np.array([chunk.params.temperature for chunk in asked], np.float32),
        top_k=np.array([chunk.params.top_k for chunk in asked], np.int32),
        top_p=np.array([chunk.params.top_p for chunk in asked], np.float32),
        min_p=np.array([chunk.params.min_p for chunk in asked], np.float32),
        seed=np.array([chunk.params.seed for chunk in asked], np.int64),
        position=np.array([chunk.end for chunk in asked], np.int64),
    )
    return batch, sampling


def alone(generate: Generate, vocab_size: int) -> tuple[list[int], str]:
    """What this request gets when nobody else exists: tokens and finish reason. One block, one prefill, no batcher."""
    length = generate.max_total_tokens
    limits = scripted_limits(
        num_blocks=1, block_size=length, max_batch_tokens=length, max_model_len=length, vocab_size=vocab_size
    )
    backend = ScriptedBackend(limits)
    known, start = list(generate.prompt_ids), 0
    output: list[int] = []
    while len(output) < generate.max_tokens:
        chunk = Chunk(known, start, len(known), [0], params=generate.sampling)
        (token_id,) = forward(backend, [chunk]).token_ids
        if token_id in generate.stop_token_ids and len(output) >= generate.min_tokens:
            return output, "stop"
        start = len(known)
        known.append(token_id)
        output.append(token_id)
    return output, "length"
