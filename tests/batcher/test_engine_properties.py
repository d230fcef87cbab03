"""Whatever arrives and whatever fails: each request gets the tokens it would get alone, once, in order, and ends once.

The scripted backend's tokens depend on every slot that is read, so a wrong table, a stale block or a prefix shared too
eagerly shows as a wrong token.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from batcher.backend import BackendErrorKind, BackendLimits
from batcher.policy import refusal
from tests.backends import alone, scripted_limits
from tests.batcher.driver import Run
from wire.messages import Generate, SamplingParams

VOCAB = 13

common = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, slots=True)
class Arrival:
    request: Generate
    step: int  # arrives before this step
    cancel_step: int | None  # is cancelled before this step
    resumed_at: int  # this many tokens are in the log already
    redelivered_step: int | None  # comes again under a newer epoch, from what has been said by then


@dataclass(frozen=True, slots=True)
class Workload:
    limits: BackendLimits
    arrivals: list[Arrival]
    prefix_cache: bool


@st.composite
def limits(draw: st.DrawFn, longest: int) -> BackendLimits:
    """A pool that is tight for requests of up to `longest` tokens, now and then too small for them."""
    block_size = draw(st.integers(1, 4))
    return scripted_limits(
        num_blocks=max(2, -(-longest // block_size) + draw(st.sampled_from([0, 1, 2, 3, 5, 8, -1]))),
        block_size=block_size,
        max_batch_tokens=draw(st.integers(1, 20)),
        max_batch_seqs=draw(st.integers(1, 5)),
        max_model_len=draw(st.sampled_from([64, 64, 64, 24])),
        vocab_size=VOCAB,
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> Generate:
    # Few tokens and common beginnings: prefixes meet.
    head = draw(st.sampled_from([[], [], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9]]))
    tail = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    return Generate(
        request_id,
        "scripted",
        head + tail,
        draw(st.integers(1, 28)),
        sampling=draw(st.sampled_from([SamplingParams(), SamplingParams(temperature=1.2, top_k=9, seed=5)])),
        stop_token_ids=draw(st.sampled_from([[], [], [0], [0, 1, 2]])),
        min_tokens=draw(st.sampled_from([0, 0, 4])),
        tenant=draw(st.sampled_from(["", "a", "b"])),
        priority=draw(st.sampled_from([0, 0, 1, -1])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    arrivals = []
    for i in range(draw(st.integers(1, 8))):
        request = draw(requests(f"r{i}"))
        step = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 12]))
        later = st.integers(step, step + 25)
        arrivals.append(
            Arrival(
                request,
                step,
                cancel_step=draw(st.one_of(st.none(), st.none(), st.none(), later)),
                resumed_at=draw(st.sampled_from([0, 0, 0, 1, 3, 28])),
                redelivered_step=draw(st.one_of(st.none(), st.none(), later)),
            )
        )
    longest = max(each.request.max_total_tokens for each in arrivals)
    return Workload(draw(limits(longest)), arrivals, draw(st.booleans()))


def play(workload: Workload, run: Run, expected: dict[str, tuple[list[int], str]]) -> dict[str, tuple[list[int], str]]:
    """Let everything happen; returns what each request's log holds in the end."""
    logs: dict[str, list[int]] = {}
    last_step = 1 + max(
        step or 0 for each in workload.arrivals for step in (each.step, each.cancel_step, each.redelivered_step)
    )
    for now in range(last_step):
        for each in workload.arrivals:
            request_id = each.request.request_id
            if each.step == now:
                logs[request_id] = expected[request_id][0][: each.resumed_at]
                run.add(each.request, logs[request_id])
            if each.redelivered_step == now and run.recorder.stories[request_id, 1].end is None:
                logs[request_id] = logs[request_id] + run.recorder.stories[request_id, 1].tokens
                run.add(each.request, logs[request_id], epoch=2)
            if each.cancel_step == now:
                run.engine.cancel(request_id)
        run.step()
    run.finish()
    ends = {}
    for (request_id, _), story in run.recorder.stories.items():
        if story.end is not None:  # a replaced epoch falls silent
            ends[request_id] = (logs[request_id] + story.tokens, story.reason)
    return ends


def expectations(workload: Workload) -> dict[str, tuple[list[int], str]]:
    expected = {}
    for each in workload.arrivals:
        error = refusal(each.request, 0, workload.limits)
        expected[each.request.request_id] = ([], error.code) if error else alone(each.request, VOCAB)
    return expected


def assert_as_expected(
    workload: Workload, ends: dict[str, tuple[list[int], str]], expected: dict[str, tuple[list[int], str]]
) -> None:
    for each in workload.arrivals:
        tokens, reason = ends[each.request.request_id]
        wanted, wanted_reason = expected[each.request.request_id]
        if reason == "cancelled":
            assert each.cancel_step is not None
            assert tokens == wanted[: len(tokens)]
        else:
            assert (tokens, reason) == (wanted, wanted_reason)


@common
@given(workload=workloads())
def test_everybody_gets_the_tokens_of_a_lone_run_whatever_happens_around_them(workload: Workload) -> None:
    run = Run(workload.limits, prefix_cache=workload.prefix_cache)
    expected = expectations(workload)
    ends = play(workload, run, expected)
    assert_as_expected(workload, ends, expected)
    load = run.engine.load
    event(f"preempted: {load.preemptions > 0}")
    event(f"prefix hits: {load.prefix_hit_tokens > 0}")
    event(f"cancelled: {any(reason == 'cancelled' for _, reason in ends.values())}")


@common
@given(workload=workloads(), data=st.data())
def test_failed_forwards_change_no_token(workload: Workload, data: st.DataObject) -> None:
    kinds = st.sampled_from([None, None, None, BackendErrorKind.RETRYABLE, BackendErrorKind.CAPACITY])
    script = data.draw(st.lists(kinds, max_size=40))

    def fault(number: int) -> BackendErrorKind | None:
        # Never so many in a row that a lone token is given up.
        recent = script[max(0, number - 3) : number]
        return None if number >= len(script) or (recent and all(recent)) else script[number]

    run = Run(workload.limits, prefix_cache=workload.prefix_cache, fault=fault, max_attempts=5)
    expected = expectations(workload)
    assert_as_expected(workload, play(workload, run, expected), expected)


@common
@given(workload=workloads(), number=st.integers(0, 30))
def test_a_cancel_in_the_middle_of_a_step_is_obeyed_at_its_commit(workload: Workload, number: int) -> None:
    victim = workload.arrivals[0].request.request_id
    named: list[str] = []

    def fault(forward: int) -> BackendErrorKind | None:
        if forward == number:
            run.engine.cancel(victim)
            named.append(victim)
        return None

    run = Run(workload.limits, prefix_cache=workload.prefix_cache, fault=fault)
    expected = expectations(workload)
    ends = play(workload, run, expected)
    tokens, reason = ends.pop(victim)
    if reason == "cancelled":
        assert named or workload.arrivals[0].cancel_step is not None
        assert tokens == expected[victim][0][: len(tokens)]
    others = Workload(workload.limits, workload.arrivals[1:], workload.prefix_cache)
    assert_as_expected(others, ends, expected)


@common
@given(data=st.data(), count=st.integers(1, 7))
def test_the_oldest_moves_in_every_step_so_steps_are_bounded(data: st.DataObject, count: int) -> None:
    drawn = [data.draw(requests(f"r{i}")) for i in range(count)]
    equals = [Generate(each.request_id, "scripted", each.prompt_ids, each.max_tokens) for each in drawn]
    run = Run(data.draw(limits(max(each.max_total_tokens for each in equals))))
    bound = 1
    for request in equals:
        run.add(request)
        if refusal(request, 0, run.limits) is None:
            bound += request.max_total_tokens
    run.finish(at_most=bound)


@common
@given(data=st.data(), prompt=st.lists(st.integers(0, 2), min_size=4, max_size=12))
def test_tenants_never_share_a_block(data: st.DataObject, prompt: list[int]) -> None:
    run = Run(data.draw(limits(30)))
    for i, tenant in enumerate(data.draw(st.lists(st.sampled_from(["", "a", "b"]), min_size=2, max_size=6))):
        run.add(Generate(f"r{i}", "scripted", prompt, 6, tenant=tenant))
    while run.engine.has_work:
        run.step()
        owner: dict[int, str] = {}
        for request in run.engine._scheduler.running:
            for block in request.block_table.ids.tolist():
                assert owner.setdefault(block, request.generate.tenant) == request.generate.tenant
    run.assert_whole()
    assert run.engine.load.prefix_queried_tokens > 0
