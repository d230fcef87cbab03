"""The scripted backend is only worth its name if mistakes change its tokens or raise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batcher.backend import BackendError, BackendErrorKind, ModelInput, SamplingInput
from services.backends.scripted import ScriptedBackend, check_model_input
from tests.backends import Chunk, forward, packed, scripted_limits
from wire.messages import SamplingParams

LIMITS = scripted_limits()
CONTEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def logits_of(context: list[int]) -> bytes:
    return forward(ScriptedBackend(LIMITS), [Chunk(context, 0, len(context), [0, 1, 2])]).logits.tobytes()


def test_every_token_of_the_context_matters() -> None:
    seen = {logits_of(CONTEXT)}
    for i in range(len(CONTEXT)):
        changed = list(CONTEXT)
        changed[i] += 1
        seen.add(logits_of(changed))
    assert len(seen) == 1 + len(CONTEXT)


def test_the_order_of_the_context_matters() -> None:
    assert logits_of(CONTEXT) != logits_of(CONTEXT[::-1])


def test_a_block_computed_behind_another_prefix_gives_other_tokens() -> None:
    backend = ScriptedBackend(LIMITS)
    right, wrong = [1, 2, 3, 4, 9, 9, 9, 9, 7], [5, 6, 7, 8, 9, 9, 9, 9, 7]
    expected = forward(backend, [Chunk(right, 0, 9, [0, 1, 2])]).logits
    forward(backend, [Chunk(wrong, 0, 9, [3, 4, 5])])
    # The tokens in block 4 are the right ones; what was computed for them is not.
    mixed = forward(backend, [Chunk(right, 8, 9, [0, 4, 6])]).logits
    assert not np.array_equal(mixed, expected)


def test_a_slot_that_was_never_written_is_noticed() -> None:
    with pytest.raises(ValueError, match="hold other positions"):
        forward(ScriptedBackend(LIMITS), [Chunk(CONTEXT, 8, 9, [0, 1, 2])])


def test_a_block_of_another_position_is_noticed() -> None:
    backend = ScriptedBackend(LIMITS)
    forward(backend, [Chunk(CONTEXT, 0, 8, [0, 1])])
    with pytest.raises(ValueError, match="hold other positions"):
        forward(backend, [Chunk(CONTEXT, 8, 9, [1, 0, 2])])


def test_a_failed_forward_ruins_the_slots_it_would_have_written() -> None:
    backend = ScriptedBackend(LIMITS, fault=lambda number: BackendErrorKind.RETRYABLE if number == 1 else None)
    forward(backend, [Chunk(CONTEXT, 0, 8, [0, 1])])
    with pytest.raises(BackendError) as caught:
        forward(backend, [Chunk(CONTEXT, 7, 8, [0, 1])])
    assert caught.value.kind is BackendErrorKind.RETRYABLE
    with pytest.raises(ValueError, match="hold other positions"):
        forward(backend, [Chunk(CONTEXT, 8, 9, [0, 1, 2])])


def test_a_poisoned_context_has_no_finite_logits_and_the_others_do() -> None:
    rows = forward(ScriptedBackend(LIMITS, poison_token=9), [Chunk(CONTEXT, 0, 9, [0, 1, 2]), Chunk([1, 2], 0, 2, [5])])
    assert rows.token_ids[0] == -1
    assert rows.token_ids[1] >= 0


def test_time_passes_by_step_and_by_token() -> None:
    slept: list[float] = []
    backend = ScriptedBackend(LIMITS, step_s=0.5, token_s=0.25, sleep=slept.append)
    forward(backend, [Chunk(CONTEXT, 0, 4, [0]), Chunk([1], 0, 1, [5])])
    assert slept == [0.5 + 5 * 0.25]


def test_a_closed_backend_has_forgotten_everything() -> None:
    backend = ScriptedBackend(LIMITS)
    forward(backend, [Chunk(CONTEXT, 0, 8, [0, 1])])
    backend.close()
    with pytest.raises(ValueError, match="hold other positions"):
        forward(backend, [Chunk(CONTEXT, 8, 9, [0, 1, 2])])


def good() -> tuple[ModelInput, SamplingInput]:
    """A decode, a prompt's first chunk that wants no logits, and a prompt's last chunk."""
    chunks = [
        Chunk(CONTEXT, 8, 9, [0, 1, 2]),
        Chunk(CONTEXT, 0, 3, [5], wants=False),
        Chunk(CONTEXT, 4, 9, [0, 7, 8], params=SamplingParams(temperature=1.0)),
    ]
    return packed(chunks, LIMITS.block_size)


def test_a_good_input_passes() -> None:
    check_model_input(*good(), LIMITS)


def int32(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def int64(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"input_ids": int64(5, 3, 1, 4, 50, 9, 2, 6, 5)}, "vocabulary"),
        ({"input_ids": int64(5, 3, 1, 4, -1, 9, 2, 6, 5)}, "vocabulary"),
        ({"input_ids": int32(5, 3, 1, 4, 5, 9, 2, 6, 5)}, "input_ids is int32"),
        ({"positions": int64(8, 0, 1, 2, 4, 5, 6, 7, 9)}, "positions"),
        ({"cu_seqlens": int32(0, 1, 1, 9)}, "without tokens"),
        ({"cu_seqlens": int32(1, 2, 4, 9)}, "span"),
        ({"past_lens": int32(8, 0)}, "rows of past_lens"),
        ({"past_lens": int32(8, -1, 4)}, "past_lens"),
        ({"block_table": int32(0, 1, 2, 5, 0, 0, 0, 7).reshape(4, 2)}, "rows of past_lens or block_table"),
        ({"block_table": int32(0, 1, 5, 0, 0, 7).reshape(3, 2)}, "too narrow"),
        ({"block_table": int32(0, 1, 2, 5, 6, 0, 0, 7, 8).reshape(3, 3)}, "longer than its sequence"),
        ({"block_table": int32(0, 1, 64, 5, 0, 0, 0, 7, 8).reshape(3, 3)}, "does not exist"),
        ({"block_table": int32(0, 0, 2, 5, 0, 0, 0, 7, 8).reshape(3, 3)}, "twice"),
        ({"block_table": int32(0, 1, 2, 5, 0, 0, 0, 7, 9).reshape(3, 3)}, "slot_mapping"),
        ({"slot_mapping": int32(8, 20, 21, 22, 28, 29, 30, 31, 33)}, "slot_mapping"),
        ({"logits_rows": int32(0, 9)}, "outside"),
        ({"logits_rows": int32(8, 0)}, "ascending"),
        ({"logits_rows": int32(7, 8)}, "two of one sequence"),
        ({"logits_rows": int32(0, 1, 8)}, "sampling input"),
    ],
)
def test_a_broken_model_input_is_refused(change: dict[str, np.ndarray], complaint: str) -> None:
    batch, sampling = good()
    with pytest.raises(ValueError, match=complaint):
        check_model_input(replace(batch, **change), sampling, LIMITS)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"position": int64(9, 8)}, "sampled position"),
        ({"seed": int64(0, -1)}, "seed"),
        ({"temperature": np.array([0.0, -1.0], np.float32)}, "temperature"),
        ({"top_p": np.array([0.0, 1.0], np.float32)}, "top_p"),
        ({"min_p": np.array([0.0, 1.5], np.float32)}, "min_p"),
        ({"top_k": int32(0)}, "rows of the sampling input"),
    ],
)
def test_a_broken_sampling_input_is_refused(change: dict[str, np.ndarray], complaint: str) -> None:
    batch, sampling = good()
    with pytest.raises(ValueError, match=complaint):
        check_model_input(batch, replace(sampling, **change), LIMITS)


def test_writing_into_a_block_that_another_sequence_reads_is_refused() -> None:
    chunks = [Chunk(CONTEXT, 8, 9, [0, 1, 2]), Chunk(CONTEXT[:6], 4, 6, [0, 1])]
    with pytest.raises(ValueError, match="another sequence reads"):
        check_model_input(*packed(chunks, LIMITS.block_size), LIMITS)


def test_too_large_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="9 sequences"):
        check_model_input(*packed([Chunk([1], 0, 1, [i]) for i in range(9)], 4), LIMITS)
    with pytest.raises(ValueError, match="65 tokens"):
        check_model_input(*packed([Chunk([1] * 65, 0, 65, range(17))], 4), LIMITS)
