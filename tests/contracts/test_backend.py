"""What every Backend promises the batcher (batcher/backend.py), whoever computes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from batcher.backend import Backend
from batcher.sampling import sample
from tests.backends import BACKENDS, Chunk, Rows, forward, packed
from wire.messages import SamplingParams

GREEDY = SamplingParams()
RANDOM = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, seed=7)


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = BACKENDS[request.param]()
    yield made
    made.close()


def prompt(backend: Backend, length: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, backend.limits.vocab_size, length).tolist()
    return ids


def blocks_for(backend: Backend, length: int, first: int) -> list[int]:
    return list(range(first, first - (-length // backend.limits.block_size)))


def whole(backend: Backend, token_ids: list[int], first_block: int, params: SamplingParams = GREEDY) -> Rows:
    blocks = blocks_for(backend, len(token_ids), first_block)
    return forward(backend, [Chunk(token_ids, 0, len(token_ids), blocks, params=params)])


def test_a_batch_gives_each_sequence_the_bits_it_gets_alone(backend: Backend) -> None:
    prompts = [prompt(backend, length, length) for length in (1, 5, 17, 2)]
    isolated = [whole(backend, token_ids, 0) for token_ids in prompts]
    chunks = [Chunk(ids, 0, len(ids), blocks_for(backend, len(ids), 6 * i)) for i, ids in enumerate(prompts)]
    together = forward(backend, chunks)
    assert together.token_ids == [rows.token_ids[0] for rows in isolated]
    np.testing.assert_array_equal(together.logits, np.concatenate([rows.logits for rows in isolated]))


@pytest.mark.parametrize("cuts", [(1,), (4,), (3, 5, 8), tuple(range(1, 20))])
def test_a_prompt_in_chunks_gives_the_bits_of_the_whole(backend: Backend, cuts: tuple[int, ...]) -> None:
    ids = prompt(backend, 20, seed=1)
    expected = whole(backend, ids, 0)
    blocks = blocks_for(backend, 20, 7)
    for start, end in pairwise((0, *cuts, 20)):
        rows = forward(backend, [Chunk(ids, start, end, blocks, wants=end == 20)])
    assert rows.token_ids == expected.token_ids
    np.testing.assert_array_equal(rows.logits, expected.logits)


def test_decoding_beside_a_prefill_gives_the_bits_of_decoding_alone(backend: Backend) -> None:
    ids, other = prompt(backend, 9, seed=2), prompt(backend, 13, seed=3)
    expected = whole(backend, ids, 0)
    blocks, others = blocks_for(backend, 9, 0), blocks_for(backend, 13, 8)
    whole(backend, ids[:8], 0)
    rows = forward(backend, [Chunk(other, 0, 13, others), Chunk(ids, 8, 9, blocks)])
    np.testing.assert_array_equal(rows.logits[1:], expected.logits)


def test_blocks_may_lie_anywhere_in_the_pool(backend: Backend) -> None:
    ids = prompt(backend, 18, seed=4)
    expected = whole(backend, ids, 0)
    scattered = blocks_for(backend, 18, 0)[::-1]
    last = backend.limits.num_blocks - 1
    rows = forward(backend, [Chunk(ids, 0, 18, [last, *scattered[1:]])])
    np.testing.assert_array_equal(rows.logits, expected.logits)


def test_two_sequences_may_read_one_prefix(backend: Backend) -> None:
    size = backend.limits.block_size
    prefix = prompt(backend, 2 * size, seed=5)
    tails = [prompt(backend, 3, seed=6), prompt(backend, 2, seed=7)]
    expected = [whole(backend, prefix + tail, 0) for tail in tails]
    whole(backend, prefix, 10)
    chunks = [Chunk(prefix + tail, 2 * size, 2 * size + len(tail), [10, 11, 20 + i]) for i, tail in enumerate(tails)]
    rows = forward(backend, chunks)
    np.testing.assert_array_equal(rows.logits, np.concatenate([each.logits for each in expected]))


def test_a_block_keeps_nothing_of_its_former_owner(backend: Backend) -> None:
    ids = prompt(backend, 6, seed=8)
    expected = whole(backend, ids, 0)
    whole(backend, prompt(backend, 16, seed=9), 0)
    rows = whole(backend, ids, 0)
    np.testing.assert_array_equal(rows.logits, expected.logits)


def test_a_step_without_logits_returns_nothing_and_still_writes(backend: Backend) -> None:
    ids = prompt(backend, 8, seed=10)
    expected = whole(backend, ids, 0)
    blocks = blocks_for(backend, 8, 5)
    rows = forward(backend, [Chunk(ids, 0, 7, blocks, wants=False)])
    assert rows.token_ids == []
    assert rows.logits.shape == (0, backend.limits.vocab_size)
    np.testing.assert_array_equal(forward(backend, [Chunk(ids, 7, 8, blocks)]).logits, expected.logits)


def test_only_the_wanted_rows_come_back_in_order(backend: Backend) -> None:
    prompts = [prompt(backend, 5, seed) for seed in (11, 12, 13)]
    expected = [whole(backend, ids, 0) for ids in prompts]
    chunks = [Chunk(ids, 0, 5, blocks_for(backend, 5, 4 * i), wants=i != 1) for i, ids in enumerate(prompts)]
    rows = forward(backend, chunks)
    np.testing.assert_array_equal(rows.logits, np.concatenate([expected[0].logits, expected[2].logits]))


def test_tokens_are_what_the_reference_samples_from_the_logits(backend: Backend) -> None:
    prompts = [prompt(backend, 3, seed) for seed in range(6)]
    each = [GREEDY, RANDOM, GREEDY, SamplingParams(temperature=1.5, seed=1), RANDOM, SamplingParams(temperature=0.3)]
    chunks = [
        Chunk(ids, 0, 3, blocks_for(backend, 3, 2 * i), params=params)
        for i, (ids, params) in enumerate(zip(prompts, each, strict=True))
    ]
    rows = forward(backend, chunks)
    _, sampling = packed(chunks, backend.limits.block_size)
    assert rows.token_ids == sample(rows.logits, sampling).tolist()


def test_the_same_step_twice_gives_the_same_bits(backend: Backend) -> None:
    ids = prompt(backend, 7, seed=14)
    first, second = whole(backend, ids, 0, RANDOM), whole(backend, ids, 0, RANDOM)
    assert first.token_ids == second.token_ids
    np.testing.assert_array_equal(first.logits, second.logits)


def test_a_context_of_the_greatest_length_is_served(backend: Backend) -> None:
    limits = backend.limits
    length = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    ids, blocks = prompt(backend, length, seed=15), blocks_for(backend, length, 0)
    for start in range(0, length, limits.max_batch_tokens):
        end = min(start + limits.max_batch_tokens, length)
        rows = forward(backend, [Chunk(ids, start, end, blocks)])
    assert 0 <= rows.token_ids[0] < limits.vocab_size


def test_a_step_of_the_greatest_number_of_sequences_is_served(backend: Backend) -> None:
    count = min(backend.limits.max_batch_seqs, backend.limits.max_batch_tokens)
    ids = prompt(backend, 1, seed=16)
    rows = forward(backend, [Chunk(ids, 0, 1, [i]) for i in range(count)])
    assert len(set(rows.token_ids)) == 1
    assert len(rows.token_ids) == count


def test_the_inputs_are_left_as_they_were(backend: Backend) -> None:
    ids = prompt(backend, 6, seed=17)
    batch, sampling = packed([Chunk(ids, 0, 6, blocks_for(backend, 6, 3), params=RANDOM)], backend.limits.block_size)
    before = [(name, getattr(part, name).copy()) for part in (batch, sampling) for name in part.__slots__]
    backend.forward(batch, sampling)
    after = [(name, getattr(part, name)) for part in (batch, sampling) for name in part.__slots__]
    for (name, old), (_, new) in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new, err_msg=name)
