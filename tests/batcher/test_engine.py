"""What one engine promises its worker, promise by promise."""

from __future__ import annotations

import pytest

from batcher.backend import BackendErrorKind
from tests.backends import alone, scripted_limits
from tests.batcher.driver import Run, Story, generate
from wire.messages import Failed, Finished, Generate, Timings, Tokens, Usage
from wire.queue import Append

LIMITS = scripted_limits()
VOCAB = LIMITS.vocab_size


def expected(request: Generate) -> tuple[list[int], str]:
    return alone(request, VOCAB)


def told(story: Story) -> tuple[list[int], str]:
    return story.tokens, story.reason


def test_tokens_come_one_by_one_with_their_index_and_epoch_then_the_end() -> None:
    run = Run(LIMITS)
    run.add(generate(max_tokens=3), epoch=7)
    appends: list[Append] = []
    while run.engine.has_work:
        appends += run.step()
    tokens, _ = expected(generate(max_tokens=3))
    assert [append.event for append in appends[:3]] == [Tokens("r", i, [token]) for i, token in enumerate(tokens)]
    assert isinstance(appends[3].event, Finished)
    assert {append.epoch for append in appends} == {7}


def test_the_stop_token_is_not_sent_and_not_billed() -> None:
    tokens, _ = expected(generate(max_tokens=6))
    run = Run(LIMITS)
    run.add(generate(max_tokens=6, stop=[tokens[2]]))
    story = run.finish()["r"]
    assert told(story) == (tokens[:2], "stop")
    assert isinstance(story.end, Finished)
    assert story.end.usage == Usage(3, 2, 0)


def test_a_stop_token_before_min_tokens_is_a_token_like_any_other() -> None:
    tokens, _ = expected(generate(max_tokens=6))
    run = Run(LIMITS)
    run.add(generate(max_tokens=6, stop=[tokens[2]], min_tokens=3))
    stopped = run.finish()["r"].tokens
    assert stopped[:3] == tokens[:3]
    assert stopped == tokens[: len(stopped)]


@pytest.mark.parametrize("resumed_at", range(9))
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_request_resumed_at_any_index_goes_on_as_if_never_interrupted(resumed_at: int, temperature: float) -> None:
    tokens, reason = expected(generate(max_tokens=8, temperature=temperature, seed=11))
    run = Run(LIMITS)
    run.add(generate(max_tokens=8, temperature=temperature, seed=11), tokens[:resumed_at], epoch=4)
    story = run.finish()["r"]
    assert (tokens[:resumed_at] + story.tokens, story.reason) == (tokens, reason)
    assert isinstance(story.end, Finished)
    assert story.end.usage.completion_tokens == 8


def test_a_resumed_request_whose_next_token_is_the_stop_says_nothing_more() -> None:
    tokens, _ = expected(generate(max_tokens=6))
    run = Run(LIMITS)
    run.add(generate(max_tokens=6, stop=[tokens[2]]), tokens[:2], epoch=2)
    assert told(run.finish()["r"]) == ([], "stop")


def test_what_can_never_run_fails_at_once_and_others_continue() -> None:
    run = Run(scripted_limits(num_blocks=4, block_size=4, max_model_len=40))
    run.add(generate("large", range(10), 20))
    run.add(generate("long", range(10), 40))
    run.add(generate("foreign", [1, 50], 2))
    run.add(generate("fits", range(10), 6))
    first = {append.event.request_id: append.event for append in run.step() if isinstance(append.event, Failed)}
    assert {request_id: failed.code for request_id, failed in first.items()} == {
        "large": "request_too_large",
        "long": "context_length_exceeded",
        "foreign": "bad_request",
    }
    assert "30" in first["large"].message
    assert "16" in first["large"].message
    assert told(run.finish()["fits"]) == expected(generate(prompt=range(10), max_tokens=6))


def test_a_lone_request_that_fills_the_pool_to_the_last_slot_never_preempts_itself() -> None:
    run = Run(scripted_limits(num_blocks=4, block_size=4))
    run.add(generate(prompt=range(5), max_tokens=12))  # 17 tokens, the last needs no slot: 16 slots
    assert told(run.finish(at_most=13)["r"]) == expected(generate(prompt=range(5), max_tokens=12))
    assert run.engine.load.preemptions == 0


def test_a_preempted_request_gets_the_tokens_of_an_unpreempted_one() -> None:
    run = Run(scripted_limits(num_blocks=7, block_size=2), prefix_cache=False)
    run.add(generate("old", [1, 2], 10))
    run.add(generate("young", [3, 4], 10, temperature=1.0, seed=2))
    stories = run.finish()
    assert run.engine.load.preemptions > 0
    assert told(stories["old"]) == expected(generate(prompt=[1, 2], max_tokens=10))
    assert told(stories["young"]) == expected(generate(prompt=[3, 4], max_tokens=10, temperature=1.0, seed=2))
    old, young = stories["old"].end, stories["young"].end
    assert isinstance(old, Finished)
    assert isinstance(young, Finished)
    assert (old.timings.preemptions, young.timings.preemptions) == (0, run.engine.load.preemptions)


def test_the_lower_priority_is_preempted_although_it_came_first() -> None:
    run = Run(scripted_limits(num_blocks=7, block_size=2))
    run.add(generate("low", [1, 2], 10, priority=-1))
    run.add(generate("high", [3, 4], 10, priority=1))
    stories = run.finish()
    low, high = stories["low"].end, stories["high"].end
    assert isinstance(low, Finished)
    assert isinstance(high, Finished)
    assert low.timings.preemptions > 0
    assert high.timings.preemptions == 0


def test_higher_priority_starts_first() -> None:
    run = Run(scripted_limits(max_batch_seqs=1))
    for request_id, priority in (("c", -1), ("b", 0), ("a", 1), ("b2", 0)):
        run.add(generate(request_id, max_tokens=1, priority=priority))
    ends = [append.event.request_id for _ in range(4) for append in run.step() if isinstance(append.event, Finished)]
    assert ends == ["a", "b", "b2", "c"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_room() -> None:
    run = Run(scripted_limits(num_blocks=6, block_size=2))
    run.add(generate("first", [1] * 4, 5))
    run.step()
    run.add(generate("large", [2] * 8, 2))
    run.add(generate("small", [3], 1))
    run.step()
    assert run.engine.load.free_blocks >= 2  # room for the small one
    said = [append.event.request_id for _ in range(8) for append in run.step() if isinstance(append.event, Tokens)]
    assert said.index("large") < said.index("small")


def test_a_cancelled_request_ends_with_the_next_step_and_frees_its_blocks() -> None:
    run = Run(LIMITS)
    run.add(generate("gone", max_tokens=9))
    run.add(generate("stays", max_tokens=9))
    run.step()
    run.engine.cancel("gone")
    assert run.engine.has_work
    run.step()
    story = run.recorder.stories["gone", 1]
    assert told(story) == (expected(generate(max_tokens=9))[0][:1], "cancelled")
    assert told(run.finish()["stays"]) == expected(generate(max_tokens=9))


def test_a_request_cancelled_while_it_waits_ends_without_a_token() -> None:
    run = Run(scripted_limits(max_batch_seqs=1))
    run.add(generate("runs"))
    run.add(generate("waits"))
    run.step()
    run.engine.cancel("waits")
    assert told(run.finish()["waits"]) == ([], "cancelled")


def test_a_cancel_in_the_middle_of_a_step_keeps_its_token_back() -> None:
    def cancel(forward: int) -> None:
        if forward == 2:
            run.engine.cancel("r")

    run = Run(LIMITS, fault=cancel)
    run.add(generate(max_tokens=9))
    run.add(generate("other", max_tokens=9))
    for _ in range(3):
        appends = run.step()
    assert [type(append.event) for append in appends if append.event.request_id == "r"] == [Finished]
    assert told(run.finish()["r"]) == (expected(generate(max_tokens=9))[0][:2], "cancelled")


def test_a_cancel_in_the_middle_of_the_first_chunk_leaves_nothing_behind() -> None:
    run = Run(LIMITS, fault=lambda forward: run.engine.cancel("r"))
    run.add(generate())
    assert [append.event for append in run.step()] == [
        Finished("r", "cancelled", Usage(3, 0), Timings(queue_ms=0.0)),
    ]
    run.assert_whole()


def test_cancelling_or_dropping_the_unknown_is_nothing() -> None:
    run = Run(LIMITS)
    run.engine.cancel("nobody")
    run.engine.drop("nobody")
    assert not run.engine.has_work
    assert run.step() == []


def test_a_dropped_request_falls_silent() -> None:
    run = Run(LIMITS)
    run.add(generate("gone", max_tokens=9))
    run.add(generate("stays", max_tokens=9))
    run.step()
    run.engine.drop("gone")
    run.finish()
    assert run.recorder.stories["gone", 1].end is None
    assert len(run.recorder.stories["gone", 1].tokens) == 1


def test_the_end_of_an_old_lease_does_not_touch_the_new_one() -> None:
    run = Run(LIMITS)
    run.add(generate(max_tokens=5), epoch=1)
    run.step()
    so_far = run.recorder.stories["r", 1].tokens
    run.add(generate(max_tokens=5), so_far, epoch=2)
    run.engine.drop("r", epoch=1)
    run.engine.cancel("r", epoch=1)
    run.finish()
    assert run.recorder.stories["r", 1].end is None
    assert (so_far + run.recorder.stories["r", 2].tokens, run.recorder.stories["r", 2].reason) == expected(
        generate(max_tokens=5)
    )


def test_a_newer_epoch_replaces_an_older_one_even_in_the_middle_of_a_step() -> None:
    def replace(forward: int) -> None:
        if forward == 1:
            run.add(generate(max_tokens=5), run.recorder.stories["r", 1].tokens, epoch=2)

    run = Run(LIMITS, fault=replace)
    run.add(generate(max_tokens=5), epoch=1)
    run.finish()
    old, new = run.recorder.stories["r", 1], run.recorder.stories["r", 2]
    assert old.end is None
    assert (old.tokens + new.tokens, new.reason) == expected(generate(max_tokens=5))


def test_an_epoch_that_is_not_newer_is_a_bug() -> None:
    run = Run(LIMITS)
    run.add(generate(), epoch=2)
    with pytest.raises(ValueError, match="epoch 2"):
        run.engine.add(generate(), (), epoch=2)
    run.finish()


def test_an_id_may_be_used_again_once_it_has_ended() -> None:
    run = Run(LIMITS)
    run.add(generate(), epoch=1)
    run.finish()
    run.add(generate(), epoch=2)
    run.finish()
    assert run.recorder.stories["r", 2].tokens == expected(generate())[0]


def test_a_request_without_finite_logits_fails_alone() -> None:
    run = Run(LIMITS, poison_token=49)
    run.add(generate("ill", [1, 2, 49], 4))
    run.add(generate("well", [1, 2, 3], 4))
    stories = run.finish()
    assert told(stories["ill"]) == ([], "internal")
    assert told(stories["well"]) == expected(generate(prompt=[1, 2, 3]))


def test_nobody_finds_the_blocks_of_a_request_without_finite_logits() -> None:
    run = Run(scripted_limits(max_batch_tokens=4), poison_token=49)
    for epoch in (1, 2):  # three chunks: the first two blocks are full and findable before the failure
        run.add(generate("ill", [1, 2, 3, 4, 49, 6, 7, 8, 9], 4), epoch=epoch)
        run.finish()
    assert run.engine.load.prefix_hit_tokens == 0


def test_a_common_prefix_is_computed_once_and_billed_as_cached() -> None:
    run = Run(LIMITS)
    prompt = list(range(11))
    run.add(generate("first", prompt, 2))
    run.finish()
    computed = run.engine.load.prefill_tokens
    run.add(generate("second", [*prompt[:10], 40], 2))
    story = run.finish()["second"]
    assert told(story) == expected(generate(prompt=[*prompt[:10], 40], max_tokens=2))
    assert isinstance(story.end, Finished)
    assert story.end.usage == Usage(11, 2, cached_tokens=8)
    assert run.engine.load.prefill_tokens - computed == 3
    assert (run.engine.load.prefix_queried_tokens, run.engine.load.prefix_hit_tokens) == (22, 8)


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    run = Run(LIMITS)
    prompt = list(range(8))
    run.add(generate("first", prompt, 2))
    run.finish()
    run.add(generate("second", prompt, 2))
    story = run.finish()["second"]
    assert told(story) == expected(generate(prompt=prompt, max_tokens=2))
    assert isinstance(story.end, Finished)
    assert story.end.usage.cached_tokens == 4  # not the block that holds the last token


def test_a_completion_is_found_by_the_next_turn_of_a_conversation() -> None:
    run = Run(LIMITS)
    run.add(generate("first", [1, 2, 3], 10))
    tokens = run.finish()["first"].tokens
    run.add(generate("second", [1, 2, 3, *tokens, 7], 2))
    run.finish()
    assert run.engine.load.prefix_hit_tokens == 12


def test_another_tenant_finds_nothing() -> None:
    run = Run(LIMITS)
    for tenant in ("a", "b", "", "a"):
        run.add(generate("r", range(11), 2, tenant=tenant), epoch=run.num_steps + 1)
        run.finish()
    ends = [story.end for story in run.recorder.stories.values()]
    assert [end.usage.cached_tokens for end in ends if isinstance(end, Finished)] == [0, 0, 0, 8]


def test_what_a_preempted_request_finds_of_its_own_is_not_billed_as_cached() -> None:
    run = Run(scripted_limits(num_blocks=8, block_size=2))
    run.add(generate("old", [1, 2], 12))
    run.add(generate("young", [3, 4, 5, 6], 8))
    stories = run.finish()
    assert run.engine.load.preemptions > 0
    for story in stories.values():
        assert isinstance(story.end, Finished)
        assert story.end.usage.cached_tokens == 0
    assert run.engine.load.prefix_queried_tokens == 6


def test_timings_are_of_the_engines_clock() -> None:
    run = Run(scripted_limits(max_batch_seqs=1, max_batch_tokens=4), step_s=0.5)
    run.add(generate("first", max_tokens=1))
    run.add(generate("second", [1] * 6, 3))
    story = run.finish()["second"]
    assert isinstance(story.end, Finished)
    # Waits for the first (0.5 s), prefills 4 + 2 tokens (2 steps), decodes 2 more tokens.
    assert story.end.timings == Timings(queue_ms=500.0, prefill_ms=1000.0, decode_ms=1000.0)


def test_load_adds_up_while_requests_run() -> None:
    run = Run(scripted_limits(num_blocks=10, block_size=4, max_batch_seqs=2), step_s=0.25)
    for request_id in ("a", "b", "c"):
        run.add(generate(request_id, range(6), 6))
    run.step()
    load = run.engine.load
    assert (load.running, load.waiting, load.free_seats) == (2, 1, 0)
    assert (load.free_blocks, load.total_blocks, load.kv_usage) == (6, 10, 0.4)
    assert (load.free_tokens, load.capacity_tokens) == (40 - 3 * 12, 40)
    assert (load.steps, load.prefill_tokens, load.decode_tokens) == (1, 12, 0)
    run.step()
    load = run.engine.load
    assert (load.steps, load.prefill_tokens, load.decode_tokens) == (2, 12, 2)
    assert load.forward_s == 0.5
    assert (load.plan_s, load.pack_s, load.commit_s) == (0.0, 0.0, 0.0)  # this clock moves only in the model
    assert run.engine.last_step is not None
    assert (run.engine.last_step.num_sequences, run.engine.last_step.step_s) == (2, 0.25)


def test_an_idle_engine_steps_for_nothing() -> None:
    run = Run(LIMITS, fault=lambda forward: BackendErrorKind.FATAL)
    assert not run.engine.has_work
    assert run.step() == []
    assert run.engine.load.steps == 0
