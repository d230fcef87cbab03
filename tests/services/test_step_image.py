"""The image of a step: every input at its place, padding that does no harm, and the move to the next token."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.backend import BackendLimits, ModelInput, SamplingInput
from services.backends.step_image import (
    ALIGNMENT,
    NOT_WRITTEN,
    Extents,
    advance,
    extents_of,
    fill,
    fill_decode,
    largest,
    layout,
)
from tests.backends import Chunk, packed
from wire.messages import SamplingParams

BLOCK_SIZE = 4
EXTENTS = st.builds(Extents, st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 40))


def decode_step(*lengths: int) -> tuple[ModelInput, SamplingInput]:
    """One more token for sequences that hold `lengths` already."""
    chunks = [
        Chunk(
            list(range(10, 11 + length)),
            length,
            length + 1,
            list(range(20 * i, 20 * i + length // BLOCK_SIZE + 1)),
            params=SamplingParams(temperature=0.5, top_k=i, seed=i + 1),
        )
        for i, length in enumerate(lengths)
    ]
    return packed(chunks, BLOCK_SIZE)


@given(EXTENTS)
def test_fields_are_aligned_and_do_not_overlap(extents: Extents) -> None:
    plan = layout(extents)
    end = 0
    for field in plan.fields.values():
        assert field.offset % ALIGNMENT == 0
        assert field.offset >= end
        end = field.offset + field.num_bytes
    assert end <= plan.num_bytes


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_what_is_written_is_what_is_read(lengths: list[int]) -> None:
    batch, sampling = decode_step(*lengths)
    plan = layout(extents_of(batch))
    image = np.full(plan.num_bytes, 0xAB, np.uint8)
    fill(plan.views(image), batch, sampling)
    views = plan.views(image)
    for part in (batch, sampling):
        for field in fields(part):
            if field.name != "positions":  # attention derives them
                np.testing.assert_array_equal(views[field.name], getattr(part, field.name))


def test_rows_beyond_the_batch_are_padding_whatever_was_there_before() -> None:
    batch, sampling = decode_step(5, 2)
    plan = layout(Extents(4, 4, 3, 4))
    image = np.full(plan.num_bytes, 0x7F, np.uint8)
    views = plan.views(image)
    fill_decode(views, batch, sampling)
    assert views["cu_seqlens"].tolist() == [0, 1, 2, 3, 4]
    assert views["logits_rows"].tolist() == [0, 1, 2, 3]
    assert views["past_lens"].tolist() == [5, 2, 0, 0]
    assert views["slot_mapping"].tolist() == [*batch.slot_mapping, NOT_WRITTEN, NOT_WRITTEN]
    assert views["block_table"][:2, :2].tolist() == batch.block_table.tolist()
    assert not views["block_table"][2:].any()
    assert not views["temperature"][2:].any()


def test_a_block_table_wider_than_the_bucket_is_cut_to_what_the_step_reads() -> None:
    """The batcher may hand over a column that no sequence of a decode step reaches yet."""
    batch, sampling = decode_step(5, 2)
    wide = ModelInput(
        **{field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "block_table"},
        block_table=np.hstack([batch.block_table, np.full((2, 2), 9, np.int32)]),
    )
    plan = layout(Extents(2, 2, 2, 2))
    views = plan.views(np.zeros(plan.num_bytes, np.uint8))
    fill_decode(views, wide, sampling)
    assert views["block_table"].tolist() == batch.block_table.tolist()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 3))
def test_advancing_an_image_gives_the_image_of_the_next_step(lengths: list[int], padding: int) -> None:
    following = [length + 1 for length in lengths]
    if any(length % BLOCK_SIZE == 0 for length in following):
        return  # the next token opens a block, which the device cannot know
    rows = len(lengths) + padding
    plan = layout(Extents(rows, rows, 9, rows))
    now, then = np.zeros(plan.num_bytes, np.uint8), np.zeros(plan.num_bytes, np.uint8)
    fill_decode(plan.views(now), *decode_step(*lengths))
    fill_decode(plan.views(then), *decode_step(*following))
    sampled = np.full(rows, 99, np.int64)  # padding samples something too, and must not move
    sampled[: len(lengths)] = [10 + length + 1 for length in lengths]
    advance(plan.views(now), sampled)
    np.testing.assert_array_equal(now, then)


def test_the_largest_step_covers_every_other() -> None:
    limits = BackendLimits("m", 100, 16, max_batch_tokens=64, max_batch_seqs=8, max_model_len=100, vocab_size=9)
    assert largest(limits) == Extents(64, 8, 7, 8)


@pytest.mark.parametrize("token_id", [-1, 0, 7])
def test_a_row_without_a_token_reads_token_zero(token_id: int) -> None:
    """A row without a finite logit samples -1; the batcher ends it, and until then nothing reads out of bounds."""
    plan = layout(Extents(1, 1, 2, 1))
    views = plan.views(np.zeros(plan.num_bytes, np.uint8))
    fill_decode(views, *decode_step(1))
    advance(views, np.array([token_id]))
    assert views["input_ids"].tolist() == [max(token_id, 0)]
