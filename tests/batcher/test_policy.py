"""The policy, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.policy import adapt_prefill_budget, order_key, refusal, split_budget
from tests.backends import scripted_limits
from wire.errors import BadRequest, ContextLengthExceeded, Internal, RequestTooLarge
from wire.messages import Generate


def test_higher_priority_goes_first_and_earlier_arrival_within_one() -> None:
    keys = [order_key(priority, arrival) for priority, arrival in ((1, 8), (0, 2), (0, 9), (-1, 1))]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("pending", "budget", "prefill_budget", "counts", "remark"),
    [
        ([], 8, 8, [], "nobody"),
        ([1, 1, 1], 8, 8, [1, 1, 1], "decodes take one token each"),
        ([1, 1, 1], 2, 8, [1, 1, 0], "too many decodes: first come"),
        ([1, 1, 8, 8], 7, 7, [1, 1, 5, 0], "a prompt takes what decodes leave"),
        ([1, 1, 3, 8], 7, 7, [1, 1, 3, 2], "the next prompt takes what the first leaves"),
        ([8, 1, 1, 1], 3, 3, [1, 1, 1, 0], "the oldest moves even when decodes could fill the budget"),
        ([8, 1, 1], 8, 8, [6, 1, 1], "decodes first, whatever their place"),
        ([9, 9], 4, 4, [4, 0], "one prompt at a time when the budget is small"),
        ([5], 8, 8, [5], "all of a prompt that fits"),
        ([1, 50], 64, 16, [1, 16], "prefill is cut to its share"),
        ([1, 10, 10], 64, 16, [1, 10, 6], "prompts share the share"),
        ([50, 1], 64, 1, [1, 1], "a share of one still moves the oldest"),
        ([1, 50], 1, 16, [1, 0], "no room beside the decodes"),
        ([50], 1, 1, [1], "a budget of one"),
    ],
)
def test_the_budget_is_split(
    pending: list[int], budget: int, prefill_budget: int, counts: list[int], remark: str
) -> None:
    assert split_budget(pending, budget, prefill_budget) == counts, remark


@settings(deadline=None)
@given(
    pending=st.lists(st.one_of(st.just(1), st.integers(1, 40)), max_size=12),
    budget=st.integers(1, 60),
    prefill_budget=st.integers(1, 60),
)
def test_every_split_keeps_its_bounds(pending: list[int], budget: int, prefill_budget: int) -> None:
    counts = split_budget(pending, budget, prefill_budget)
    prefill = [count for count, tokens in zip(counts, pending, strict=True) if tokens > 1]
    decodes = [count for count, tokens in zip(counts, pending, strict=True) if tokens == 1]
    assert all(0 <= count <= tokens for count, tokens in zip(counts, pending, strict=True))
    assert sum(counts) <= budget
    assert sum(prefill) <= prefill_budget
    assert not counts or counts[0] > 0  # the oldest moves
    assert decodes == sorted(decodes, reverse=True)  # nobody is passed over
    if 0 in decodes:
        assert sum(counts) == budget  # only for want of tokens


def adapt(share: int, step_s: float, *, decodes: int = 4, prefill: int = 64) -> int:
    return adapt_prefill_budget(
        share, target_s=0.05, step_s=step_s, decode_tokens=decodes, prefill_tokens=prefill, lowest=16, highest=512
    )


@pytest.mark.parametrize(
    ("share", "step_s", "decodes", "prefill", "expected", "remark"),
    [
        (64, 0.045, 4, 64, 64, "close enough: leave it"),
        (64, 0.020, 4, 64, 128, "far under: at most twice as much"),
        (64, 0.036, 4, 64, 80, "a little under: towards the aim, 0.9 of the target"),
        (64, 0.090, 4, 64, 32, "over: in proportion"),
        (64, 9.0, 4, 64, 16, "far over: to a quarter at most, and never below the least"),
        (512, 0.001, 4, 512, 512, "never above the most"),
        (64, 0.001, 4, 10, 64, "the share was not used: no reason to grow it"),
        (64, 0.090, 4, 40, 20, "over although little was used"),
        (64, 0.001, 0, 64, 64, "nobody decoded: nobody waited"),
        (64, 9.0, 4, 0, 64, "no prompt in the step: not its fault"),
        (16, 0.060, 4, 3, 16, "at the least already"),
    ],
)
def test_the_prefill_share_follows_the_step_time(
    share: int, step_s: float, decodes: int, prefill: int, expected: int, remark: str
) -> None:
    assert adapt(share, step_s, decodes=decodes, prefill=prefill) == expected, remark


@settings(deadline=None)
@given(base_s=st.floats(0.0, 0.035), token_s=st.floats(1e-6, 5e-4))
def test_growing_from_the_least_never_overshoots_and_comes_close(base_s: float, token_s: float) -> None:
    share = 16
    for _ in range(200):
        step_s = base_s + token_s * share
        if share > 16:
            assert step_s <= 0.05 * 1.0001
        share = adapt(share, step_s, prefill=share)
    step_s = base_s + token_s * share
    assert share in (16, 512) or step_s >= 0.8 * 0.05 - token_s


@settings(deadline=None)
@given(base_s=st.floats(0.0, 0.03), token_s=st.floats(1e-5, 1e-3))
def test_a_share_that_is_far_too_large_comes_under_the_target(base_s: float, token_s: float) -> None:
    share = 512
    for _ in range(60):
        share = adapt(share, base_s + token_s * share, prefill=share)
    assert share == 16 or base_s + token_s * share <= 0.05 * 1.0001


LIMITS = scripted_limits(num_blocks=8, block_size=4, max_model_len=40, vocab_size=50)


def request(prompt: list[int], max_tokens: int) -> Generate:
    return Generate("r", "scripted", prompt, max_tokens)


@pytest.mark.parametrize(
    ("generate", "error", "words"),
    [
        (request([1] * 20, 21), ContextLengthExceeded, ("20", "21", "41", "40", "scripted")),
        (request([1] * 20, 2**31 - 1), ContextLengthExceeded, ("2,147,483,647", "40")),
        (request([1] * 20, 14), RequestTooLarge, ("34", "32")),
        (request([1, 50], 1), BadRequest, ("50", "vocabulary")),
        (request([1, -3], 1), BadRequest, ("-3", "vocabulary")),
        (request([], 1), BadRequest, ("empty",)),
        (request([1], 0), BadRequest, ("max_tokens", "0")),
    ],
)
def test_what_can_never_run_is_refused_with_its_numbers(
    generate: Generate, error: type[Exception], words: tuple[str, ...]
) -> None:
    refused = refusal(generate, 0, LIMITS)
    assert type(refused) is error
    assert all(word in str(refused) for word in words)


def test_what_just_fits_is_not_refused() -> None:
    assert refusal(request([1] * 20, 13), 0, LIMITS) is None  # 33 tokens, the last of which needs no KV
    assert refusal(request([49] * 20, 13), 13, LIMITS) is None


def test_more_logged_tokens_than_the_completion_may_have_is_our_bug() -> None:
    assert type(refusal(request([1], 3), 4, LIMITS)) is Internal
