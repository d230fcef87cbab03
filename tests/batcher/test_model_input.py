"""Packing: the arrays of a step equal those written token by token from the contract."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.kv_blocks import KVBlockPool
from batcher.model_input import pack
from batcher.scheduler import Scheduler
from services.backends.scripted import check_model_input
from tests.backends import Chunk, packed, scripted_limits
from tests.batcher.driver import generate


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    block_size=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 24),
    num_steps=st.integers(1, 12),
)
def test_the_packed_step_is_the_contract_written_out(
    prompts: list[int], block_size: int, max_batch_tokens: int, num_steps: int
) -> None:
    limits = scripted_limits(num_blocks=64, block_size=block_size, max_batch_tokens=max_batch_tokens)
    pool = KVBlockPool(limits.num_blocks, block_size)
    scheduler = Scheduler(limits, pool)
    for i, length in enumerate(prompts):
        # Equal beginnings, so that some are found in the cache.
        scheduler.add(generate(f"r{i}", range(length), 5, temperature=0.5 * i, seed=2**40 + i), (), 1, 0.0)
    for _ in range(num_steps):
        plan = scheduler.plan(max_batch_tokens)
        if not plan.sequences:
            break
        with pool.reserve(plan.needs) as hold:
            batch, sampling = pack(plan, hold, block_size)
            hold.commit()
        chunks = [
            Chunk(
                s.request.token_ids.tolist(),
                s.start,
                s.end,
                s.request.block_table.ids.tolist(),
                s.samples,
                s.request.sampling,
            )
            for s in plan.sequences
        ]
        expected_batch, expected_sampling = packed(chunks, block_size)
        for got, expected in ((batch, expected_batch), (sampling, expected_sampling)):
            for name in expected.__slots__:
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name, strict=True)
        check_model_input(batch, sampling, limits)
        scheduler.commit(plan, [3] * len(batch.logits_rows), 0.0, 0.0)
