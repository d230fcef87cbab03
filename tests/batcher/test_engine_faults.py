"""Forwards that fail: what is retried, what is given up, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from batcher.backend import (
    BackendError,
    BackendErrorKind,
    BackendLimits,
    ModelInput,
    SamplingInput,
    StepOutput,
)
from batcher.engine import Engine
from services.backends.scripted import ScriptedBackend
from tests.backends import alone, scripted_limits
from tests.batcher.driver import Recorder, Run, generate
from wire.messages import Failed, Finished

LIMITS = scripted_limits()
VOCAB = LIMITS.vocab_size


def fails_at(kind: BackendErrorKind, *numbers: int) -> Callable[[int], BackendErrorKind | None]:
    return lambda number: kind if number in numbers else None


@pytest.mark.parametrize("number", range(5))
def test_a_retryable_fault_is_retried_within_the_step_and_changes_nothing(number: int) -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.RETRYABLE, number, number + 1))
    run.add(generate("a", range(9), 5))
    run.add(generate("b", range(5), 5, temperature=1.0))
    stories = run.finish(at_most=6)
    assert run.engine.load.failed_forwards == 2
    for request_id, request in (("a", generate("a", range(9), 5)), ("b", generate("b", range(5), 5, temperature=1.0))):
        assert (stories[request_id].tokens, stories[request_id].reason) == alone(request, VOCAB)


def test_a_step_that_fails_too_often_fails_its_requests_and_nobody_else() -> None:
    run = Run(scripted_limits(max_batch_seqs=2), fault=fails_at(BackendErrorKind.RETRYABLE, 2, 3, 4))
    for request_id in ("a", "b", "c"):
        run.add(generate(request_id, max_tokens=6))
    stories = run.finish()
    ends = {request_id: story.end for request_id, story in stories.items()}
    for request_id in ("a", "b"):
        failed = ends[request_id]
        assert isinstance(failed, Failed)
        assert (failed.code, failed.retryable) == ("internal", False)
        assert "3 times" in failed.message
        assert "scripted fault" not in failed.message
    assert (stories["c"].tokens, stories["c"].reason) == alone(generate(max_tokens=6), VOCAB)


def test_a_failed_forward_leaves_tables_and_counters_as_they_were() -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.FATAL, 1))
    run.add(generate("a", range(9), 5))
    run.add(generate("b", range(5), 5))
    run.step()
    before = run.engine.load
    with pytest.raises(BackendError):
        run.engine.step()
    run.engine.check()
    after = run.engine.load
    assert (before.running, before.free_blocks, before.steps) == (after.running, after.free_blocks, after.steps)
    run.finish()


def test_a_fatal_fault_is_raised_and_what_was_said_before_is_still_owed() -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.FATAL, 1))
    run.add(generate("a"), epoch=3)
    run.add(generate("b"), epoch=4)
    run.add(generate("c"), epoch=5)
    run.step()
    run.add(generate("never", max_tokens=10_000))
    run.engine.cancel("c")
    with pytest.raises(BackendError, match="scripted fault") as caught:
        run.engine.step()
    assert caught.value.kind is BackendErrorKind.FATAL
    assert sorted(run.engine.abort_all()) == [("a", 3), ("b", 4)]
    owed = run.step()
    assert {(type(append.event), append.event.request_id) for append in owed} == {(Failed, "never"), (Finished, "c")}
    assert not run.engine.has_work
    run.assert_whole()


def test_aborting_counts_the_replaced_and_the_waiting() -> None:
    run = Run(scripted_limits(max_batch_seqs=1))
    run.add(generate("a"), epoch=1)
    run.add(generate("b"), epoch=1)
    run.step()
    run.add(generate("a"), run.recorder.stories["a", 1].tokens, epoch=2)
    assert sorted(run.engine.abort_all()) == [("a", 2), ("b", 1)]
    run.assert_whole()
    assert run.step() == []


class SmallMemory:
    """A scripted backend that runs out of memory on steps beyond its means."""

    def __init__(self, limits: BackendLimits, max_tokens: int, max_seqs: int) -> None:
        self._inner = ScriptedBackend(limits)
        self._max_tokens = max_tokens
        self._max_seqs = max_seqs

    @property
    def limits(self) -> BackendLimits:
        return self._inner.limits

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        if len(batch.input_ids) > self._max_tokens or len(batch.past_lens) > self._max_seqs:
            raise BackendError(BackendErrorKind.CAPACITY, "out of memory")
        return self._inner.forward(batch, sampling, keeps_logits=keeps_logits)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize(("max_tokens", "max_seqs"), [(4, 8), (64, 1), (64, 3), (3, 2), (1, 1)])
def test_a_backend_with_less_memory_than_it_claims_serves_everybody_all_the_same(
    max_tokens: int, max_seqs: int
) -> None:
    engine, recorder = Engine(SmallMemory(LIMITS, max_tokens, max_seqs)), Recorder()
    for i in range(5):
        recorder.expect(f"r{i}", 1, 0)
        engine.add(generate(f"r{i}", range(3 + 2 * i), 6))
    for _ in range(300):
        if not engine.has_work:
            break
        recorder.hear(engine.step())
        engine.check()
    for i in range(5):
        story = recorder.stories[f"r{i}", 1]
        assert (story.tokens, story.reason) == alone(generate(f"r{i}", range(3 + 2 * i), 6), VOCAB)
    assert engine.load.failed_forwards > 0
    assert engine.load.free_blocks == LIMITS.num_blocks


def test_a_backend_without_memory_for_one_token_fails_requests_one_by_one() -> None:
    engine = Engine(SmallMemory(LIMITS, 0, 0))
    for request_id in ("a", "b"):
        engine.add(generate(request_id))
    ends = []
    while engine.has_work:
        ends += [append.event for append in engine.step()]
        engine.check()
    assert [(end.request_id, end.code) for end in ends if isinstance(end, Failed)] == [
        ("a", "internal"),
        ("b", "internal"),
    ]


def test_one_capacity_fault_costs_a_preemption_and_no_token() -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.CAPACITY, 3))
    for request_id in ("a", "b"):
        run.add(generate(request_id, range(6), 8))
    stories = run.finish()
    assert run.engine.load.preemptions == 1
    assert all((story.tokens, story.reason) == alone(generate("a", range(6), 8), VOCAB) for story in stories.values())


def test_after_a_capacity_fault_nobody_starts_until_somebody_ends() -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.CAPACITY, 1))
    run.add(generate("a", range(6), 4))
    run.step()
    for request_id in ("b", "c"):
        run.add(generate(request_id, range(6), 9))
    running = []
    while run.engine.has_work:
        run.step()
        running.append(run.engine.load.running)
    assert running[:3] == [1, 1, 0]  # a alone, to its end
    assert running[3] == 2
    run.assert_whole()


def test_chunks_stay_small_after_a_capacity_fault_until_somebody_ends() -> None:
    run = Run(LIMITS, fault=fails_at(BackendErrorKind.CAPACITY, 0))
    run.add(generate("a", range(40), 1))
    run.step()
    assert run.engine.last_step is not None
    assert run.engine.last_step.num_prefill_tokens == 20
    run.finish()
    run.add(generate("b", range(1, 41), 1))
    run.step()
    assert run.engine.last_step.num_prefill_tokens == 40


def test_an_unexpected_error_rolls_back_and_passes_through() -> None:
    def explode(number: int) -> None:
        if number == 1:
            raise RuntimeError("not a BackendError")

    run = Run(LIMITS, fault=explode)
    run.add(generate(prompt=range(9)))
    run.step()
    with pytest.raises(RuntimeError, match="not a BackendError"):
        run.engine.step()
    run.engine.check()
    story = run.finish()["r"]
    assert (story.tokens, story.reason) == alone(generate(prompt=range(9)), VOCAB)
