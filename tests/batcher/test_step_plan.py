"""Deciding: what a plan contains, and that making it touches nothing."""

from __future__ import annotations

from batcher.kv_blocks import KVBlockPool
from batcher.scheduler import Scheduler
from batcher.step_plan import StepPlan, find_starters, fit_blocks
from tests.backends import scripted_limits
from tests.batcher.driver import generate


def scheduler(
    num_blocks: int = 16, block_size: int = 2, max_batch_tokens: int = 16, max_batch_seqs: int = 4
) -> Scheduler:
    limits = scripted_limits(
        num_blocks=num_blocks, block_size=block_size, max_batch_tokens=max_batch_tokens, max_batch_seqs=max_batch_seqs
    )
    return Scheduler(limits, KVBlockPool(num_blocks, block_size))


def run(scheduler: Scheduler, prefill_budget: int = 16, token_id: int = 7) -> StepPlan:
    """Plan, and commit as if the model had said `token_id` to everybody."""
    plan = scheduler.plan(prefill_budget)
    for request in plan.preempted:
        scheduler.preempt(request)
    with scheduler.pool.reserve(plan.needs) as hold:
        hold.commit()
    scheduler.commit(plan, [token_id] * sum(s.samples for s in plan.sequences), 0.0, 0.0)
    scheduler.check()
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(s.request.request_id, s.start, s.end, s.samples) for s in plan.sequences]


def test_a_prompt_in_chunks_samples_only_at_its_end() -> None:
    it = scheduler(max_batch_tokens=4)
    it.add(generate("a", range(10), 5), (), 1, 0.0)
    assert [shape(run(it))[0] for _ in range(4)] == [
        ("a", 0, 4, False),
        ("a", 4, 8, False),
        ("a", 8, 10, True),
        ("a", 10, 11, True),
    ]


def test_decodes_and_prompts_share_a_step_and_the_counts_say_so() -> None:
    it = scheduler(max_batch_tokens=6)
    it.add(generate("a", [1, 2], 5), (), 1, 0.0)
    run(it)
    it.add(generate("b", range(9), 5), (), 1, 0.0)
    plan = run(it)
    assert shape(plan) == [("a", 2, 3, True), ("b", 0, 5, False)]
    assert (plan.num_decode_tokens, plan.num_prefill_tokens, plan.num_tokens) == (1, 5, 6)


def test_the_prefill_budget_binds_only_while_somebody_decodes() -> None:
    it = scheduler()
    it.add(generate("a", range(12), 5), (), 1, 0.0)
    assert shape(run(it, prefill_budget=3)) == [("a", 0, 12, True)]
    it.add(generate("b", range(20, 32), 5), (), 1, 0.0)
    assert shape(run(it, prefill_budget=3)) == [("a", 12, 13, True), ("b", 0, 3, False)]


def test_planning_touches_nothing() -> None:
    it = scheduler(num_blocks=7)
    it.add(generate("a", [1, 2], 8), (), 1, 0.0)
    it.add(generate("b", [3, 4], 8), (), 1, 0.0)
    for _ in range(12):
        first = it.plan(16)
        it.check()
        assert it.plan(16) == first
        if not run(it).sequences:
            break
    assert it.preemptions > 0  # the interesting plans were among them


def test_an_empty_scheduler_plans_nothing() -> None:
    assert scheduler().plan(16).sequences == ()


def test_seats_are_limited() -> None:
    it = scheduler(max_batch_seqs=2)
    for name in "abc":
        it.add(generate(name, [1], 5), (), 1, 0.0)
    assert [name for name, *_ in shape(run(it))] == ["a", "b"]
    assert [name for name, *_ in shape(run(it))] == ["a", "b"]


def test_a_request_starts_only_if_all_it_knows_fits_and_leaves_a_block_for_each_running_one() -> None:
    it = scheduler(num_blocks=6)
    it.add(generate("a", [1, 2], 8), (), 1, 0.0)
    run(it)  # one block used, five left; its next token needs one of them
    it.add(generate("b", range(8), 2), (), 1, 0.0)  # four blocks, and one to spare for a: one too many
    assert [name for name, *_ in shape(run(it))] == ["a"]


def test_starters_of_one_step_count_each_others_blocks() -> None:
    it = scheduler(num_blocks=7)
    for name, first in (("a", 0), ("b", 20)):  # 4 blocks each
        it.add(generate(name, range(first, first + 8), 2), (), 1, 0.0)
    assert [name for name, *_ in shape(run(it))] == ["a"]


def test_nobody_is_looked_up_whom_the_budget_cannot_reach() -> None:
    it = scheduler(num_blocks=100, max_batch_tokens=6)
    for name in "abcd":
        it.add(generate(name, [ord(name) - ord("a")] * 4, 2), (), 1, 0.0)
    starters = find_starters(it.waiting, it.pool, num_running=0, seats=4, spare_blocks=100, budget=6)
    assert [starter.request.request_id for starter in starters] == ["a", "b"]


def test_decodes_do_not_use_up_the_share_of_prompts() -> None:
    it = scheduler(num_blocks=100, max_batch_seqs=8)
    for i in range(4):
        it.add(generate(f"stream{i}", [i], 9), (), 1, 0.0)
    run(it)
    it.add(generate("prompt", range(8), 2), (), 1, 0.0)
    assert shape(run(it, prefill_budget=2))[-1] == ("prompt", 0, 2, False)


def test_a_starter_of_higher_priority_is_computed_before_a_prompt_in_progress() -> None:
    it = scheduler(num_blocks=100, max_batch_tokens=4)
    it.add(generate("a", range(12), 2), (), 1, 0.0)
    run(it)
    it.add(generate("b", range(20, 23), 2, priority=1), (), 1, 0.0)
    assert shape(run(it)) == [("b", 0, 3, True), ("a", 4, 5, False)]


def test_a_preempted_request_keeps_its_tokens_and_its_place_and_nothing_else() -> None:
    it = scheduler()
    for name in "ab":
        it.add(generate(name, [1, 2, 3], 9), (), 1, 0.0)
    run(it)
    it.add(generate("c", [1], 9), (), 1, 0.0)
    (_, b) = it.running
    it.preempt(b)
    it.check()
    assert it.waiting[0] is b
    assert (b.token_ids.tolist(), b.num_computed_tokens, len(b.block_table)) == ([1, 2, 3, 7], 0, 0)


def test_a_prompt_that_was_found_starts_behind_it() -> None:
    it = scheduler()
    it.add(generate("a", range(7), 1), (), 1, 0.0)
    run(it)
    it.add(generate("b", [0, 1, 2, 3, 9, 9], 1), (), 1, 0.0)
    plan = it.plan(16)
    assert shape(plan) == [("b", 4, 6, True)]
    assert len(plan.needs[0].hits) == 2
    assert plan.needs[0].num_new == 1


def test_two_starters_that_share_idle_blocks_are_not_charged_for_them_twice() -> None:
    it = scheduler(num_blocks=7)
    it.add(generate("a", range(8), 1), (), 1, 0.0)
    run(it)
    for name in "bc":  # 3 shared idle blocks and one of its own each; c leaves one to spare
        it.add(generate(name, range(8), 1), (), 1, 0.0)
    assert [name for name, *_ in shape(run(it))] == ["b", "c"]


def tight(num_blocks: int, lengths: dict[str, int]) -> Scheduler:
    """Running requests with these many tokens computed, in a pool without a block to spare."""
    it = scheduler(num_blocks=100, block_size=2, max_batch_tokens=64)
    for name, length in lengths.items():
        it.add(generate(name, [ord(name) - ord("a")] * length, 9), (), 1, 0.0)
    run(it)
    it.pool._free = it.pool._free[: num_blocks - (100 - len(it.pool._free))]
    return it


def test_the_last_in_order_gives_its_blocks_to_those_before() -> None:
    it = tight(6, {"a": 4, "b": 4, "c": 4})
    counts = [1, 1, 1]
    assert [victim.request_id for victim in fit_blocks(it.running, counts, it.pool)] == ["c"]
    assert counts == [1, 1, 0]


def test_the_last_one_pauses_rather_than_give_up_its_own_work() -> None:
    it = tight(5, {"a": 4, "b": 4})
    counts = [1, 1]
    assert fit_blocks(it.running, counts, it.pool) == []
    assert counts == [1, 0]


def test_a_chunk_is_cut_to_the_blocks_there_are() -> None:
    it = scheduler(num_blocks=8, max_batch_tokens=3)
    it.add(generate("a", range(9), 2), (), 1, 0.0)
    run(it)
    it.pool._free = it.pool._free[:1]  # 3 tokens in 2 blocks, one block left: room for 3 more tokens
    counts = [6]
    assert fit_blocks(it.running, counts, it.pool) == []
    assert counts == [3]


def test_one_who_needs_nothing_is_preempted_when_an_older_one_needs_much() -> None:
    it = tight(6, {"a": 4, "b": 5, "c": 1})
    counts = [1, 1, 1]
    victims = fit_blocks(it.running, counts, it.pool)
    assert [victim.request_id for victim in victims] == ["c"]
    assert counts == [1, 1, 0]
