"""StepPlan -> ModelInput and SamplingInput: the only file that knows the packed layout.

One packed axis of T tokens, sequence after sequence, prefill and decode alike; field by field the layout of
com.microsoft:PagedAttention (batcher/backend.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batcher.backend import ModelInput, SamplingInput
from batcher.kv_blocks import Reservation
from batcher.request import Request
from batcher.step_plan import StepPlan


def pack(plan: StepPlan, hold: Reservation, block_size: int) -> tuple[ModelInput, SamplingInput]:
    """The arrays of a plan with at least one sequence; `hold` carries the blocks its tables do not have yet."""
    sequences = plan.sequences
    # Gathered in machine arrays, not in numpy: most sequences add one token, and a numpy call each would cost more.
    token_ids, positions, counts, bounds = array("q"), array("q"), list[int](), [0]
    for s in sequences:
        token_ids.extend(s.request.token_ids[s.start : s.end])
        positions.extend(range(s.start, s.end))
        counts.append(s.end - s.start)
        bounds.append(len(positions))
    block_table = _block_table(plan, hold)
    packed_positions = np.frombuffer(positions, np.int64)
    batch = ModelInput(
        input_ids=np.frombuffer(token_ids, np.int64),
        positions=packed_positions,
        cu_seqlens=np.array(bounds, np.int32),
        past_lens=np.array([s.start for s in sequences], np.int32),
        block_table=block_table,
        slot_mapping=_slots(block_table, packed_positions, counts, block_size),
        logits_rows=np.array([end - 1 for s, end in zip(sequences, bounds[1:], strict=True) if s.samples], np.int32),
    )
    return batch, _sampling([s.request for s in sequences if s.samples])


def _slots(
    block_table: NDArray[np.int32], positions: NDArray[np.int64], counts: list[int], block_size: int
) -> NDArray[np.int32]:
    """[T] where each token's keys and values go."""
    rows = np.arange(len(block_table)).repeat(counts)  # [T] which sequence a token belongs to
    blocks, offsets = np.divmod(positions, block_size)
    return (block_table[rows, blocks] * block_size + offsets).astype(np.int32)


def _block_table(plan: StepPlan, hold: Reservation) -> NDArray[np.int32]:
    """[B, M], M = the longest row, padded with 0."""
    lengths = [len(s.request.block_table) for s in plan.sequences]
    totals = list(lengths)
    for need, blocks in zip(hold.needs, hold.added, strict=True):
        totals[need.index] += len(blocks)
    block_table = np.zeros((len(lengths), max(totals)), np.int32)
    for row, s, length in zip(block_table, plan.sequences, lengths, strict=True):
        row[:length] = s.request.block_table.ids
    for need, blocks in zip(hold.needs, hold.added, strict=True):
        block_table[need.index, lengths[need.index] : totals[need.index]] = blocks
    return block_table


def _sampling(requests: Sequence[Request]) -> SamplingInput:
    params = [request.sampling for request in requests]
    return SamplingInput(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seed=np.array([p.seed for p in params], np.int64),
        position=np.array([len(request.token_ids) for request in requests], np.int64),
    )
