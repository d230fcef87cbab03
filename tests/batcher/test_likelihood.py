"""Teacher forcing: the likelihood of given tokens is that of the model alone, whatever else the engine does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.backend import BackendErrorKind, BackendLimits
from batcher.likelihood import logprob
from services.backends.scripted import ScriptedBackend
from tests.backends import Chunk, forward, scripted_limits
from tests.batcher.driver import Run, Story, generate
from wire.messages import Failed, Finished, Generate, Usage

LIMITS = scripted_limits()
VOCAB = LIMITS.vocab_size
GIVEN = [7, 7, 30, 2, 49, 0]


def forced(request_id: str = "f", prompt: Sequence[int] = (1, 2, 3), ids: Sequence[int] = GIVEN) -> Generate:
    return Generate(request_id, "scripted", list(prompt), len(ids), forced_ids=list(ids))


def alone(request: Generate) -> float:
    """Each token after all before it, computed from nothing: one block, one prefill, no batcher."""
    total = 0.0
    for count, token_id in enumerate(request.forced_ids):
        known = [*request.prompt_ids, *request.forced_ids[:count]]
        size = len(known)
        backend = ScriptedBackend(
            scripted_limits(num_blocks=1, block_size=size, max_batch_tokens=size, max_model_len=size, vocab_size=VOCAB)
        )
        logits = forward(backend, [Chunk(known, 0, size, [0])]).logits[0].astype(np.float64)
        total += logits[token_id] - math.log(sum(math.exp(each) for each in logits))
    return total


def heard(story: Story) -> float:
    assert isinstance(story.end, Finished)
    assert story.end.logprob is not None
    return story.end.logprob


def test_a_given_completion_is_not_sent_and_its_likelihood_comes_at_the_end() -> None:
    run = Run(LIMITS)
    run.add(forced())
    story = run.finish()["f"]
    assert (story.tokens, story.reason) == ([], "length")
    assert isinstance(story.end, Finished)
    assert story.end.usage == Usage(3, 0, 0)
    assert story.end.timings.decode_ms == 0.0  # the driver's clock stands still
    assert heard(story) == pytest.approx(alone(forced()), rel=1e-12)


def test_what_is_sampled_has_no_likelihood() -> None:
    run = Run(LIMITS)
    run.add(generate(max_tokens=3))
    end = run.finish()["r"].end
    assert isinstance(end, Finished)
    assert end.logprob is None


def test_no_token_ends_what_is_given() -> None:
    run = Run(LIMITS)
    request = forced()
    run.add(Generate("f", "scripted", [1, 2, 3], len(GIVEN), forced_ids=GIVEN, stop_token_ids=list(range(VOCAB))))
    assert heard(run.finish()["f"]) == pytest.approx(alone(request), rel=1e-12)


@given(st.data())
def test_batched_chunked_preempted_and_retried_it_is_the_same_to_the_last_bit(data: st.DataObject) -> None:
    """The favourites, all at once: a small pool, small steps, failing forwards, others around it."""
    limits: BackendLimits = scripted_limits(
        num_blocks=data.draw(st.integers(8, 24), "blocks"),
        max_batch_tokens=data.draw(st.integers(3, 20), "budget"),
        max_batch_seqs=data.draw(st.integers(1, 5), "seats"),
        max_model_len=32,
    )
    ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
    requests = [
        forced(f"f{number}", data.draw(ids, "prompt"), data.draw(ids, "given"))
        for number in range(data.draw(st.integers(1, 3), "forced"))
    ]
    faults = data.draw(st.sets(st.integers(0, 30), max_size=5), "faults")
    run = Run(limits, fault=lambda n: BackendErrorKind.RETRYABLE if n in faults else None, max_attempts=10)
    for number in range(data.draw(st.integers(0, 4), "others")):
        run.add(generate(f"r{number}", data.draw(ids, "other prompt"), 12, temperature=1.0, seed=number))
        run.step()
    for request in requests:
        run.add(request)
    told = run.finish()
    for request in requests:
        single = Run(LIMITS)
        single.add(request)
        assert heard(told[request.request_id]) == heard(single.finish()[request.request_id])


def test_a_worker_that_takes_over_begins_again() -> None:
    """Nothing is in the log before the end, so nothing has to be carried on."""
    first = Run(LIMITS)
    first.add(forced())
    for _ in range(3):
        first.step()
    assert first.engine.abort_all() == [("f", 1)]
    second = Run(LIMITS)
    second.add(forced(), epoch=2)
    assert heard(second.finish()["f"]) == pytest.approx(alone(forced()), rel=1e-12)


def test_one_that_is_cancelled_has_no_likelihood() -> None:
    run = Run(LIMITS)
    run.add(forced())
    run.step()
    run.engine.cancel("f")
    story = run.finish()["f"]
    assert story.reason == "cancelled"
    assert isinstance(story.end, Finished)
    assert story.end.logprob is None


def test_a_row_without_finite_logits_fails_alone() -> None:
    run = Run(LIMITS, poison_token=49)
    run.add(forced("bad"))
    run.add(forced("good", ids=[4, 5]))
    told = run.finish()
    assert told["bad"].reason == "internal"
    assert heard(told["good"]) == pytest.approx(alone(forced(ids=[4, 5])), rel=1e-12)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Generate("f", "scripted", [1], 3, forced_ids=[1, 2]), "2 tokens are given, max_tokens is 3"),
        (forced(ids=[1, VOCAB]), f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
    ],
)
def test_what_cannot_be_given_is_refused(request_: Generate, words: str) -> None:
    run = Run(LIMITS)
    run.add(request_)
    end = run.finish()["f"].end
    assert isinstance(end, Failed)
    assert end.code == "bad_request"
    assert words in end.message


@given(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=40))
def test_likelihoods_of_all_tokens_make_one(values: list[float]) -> None:
    logits = np.array(values, np.float32)
    assert sum(math.exp(logprob(logits, token_id)) for token_id in range(len(values))) == pytest.approx(1.0)


def test_likelihoods_at_the_edges() -> None:
    assert logprob(np.array([3e38, -3e38], np.float32), 0) == 0.0
    assert logprob(np.array([0.0, -np.inf], np.float32), 1) == -math.inf
    assert math.isnan(logprob(np.array([np.nan, 0.0], np.float32), 1))
    assert math.isnan(logprob(np.array([-np.inf, -np.inf], np.float32), 0))
