"""The prober: its statistics against published examples, its questions, and its runs through a real queue."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.model_commands import SHIPPED_DIRECTORY
from services.prober.baseline import Baseline, read_baseline, write_baseline
from services.prober.golden import Item, Question, is_right, questions, read_golden
from services.prober.report import ProbeMetrics, Report
from services.prober.run import WORST_NLL, Outcome, ProbeFailed, Prober
from services.prober.statistics import Interval, Paired, difference, mean_interval, relative_drop, wilson
from services.queues.memory import MemoryQueue
from services.settings import SettingsError
from tests.contracts.queues import PATIENCE_S, generate
from tests.gateway.support import EOS, Script, ScriptedWorker, served_model, text_of
from wire.messages import Generate

GOLDEN = SHIPPED_DIRECTORY / "golden.jsonl"
MODEL = served_model()


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    interval = wilson(right, total)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_the_interval_of_a_paired_difference_is_newcombes() -> None:
    # Newcombe, "Improved confidence intervals for the difference ... based on paired data" (1998), method 10.
    interval = difference(Paired(both=36, lost=12, gained=2, neither=0))
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)


def test_a_gain_is_a_loss_the_other_way_round() -> None:
    loss, gain = difference(Paired(600, 30, 5, 85)), difference(Paired(600, 5, 30, 85))
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low))


def test_the_lower_end_of_a_drop_is_too_high_about_as_often_as_it_says() -> None:
    """A model whose answers change at random, without getting worse: one end is wrong in 2.5 of 100 runs."""
    rng = np.random.default_rng(1)
    draws = rng.multinomial(720, [0.93, 0.02, 0.02, 0.03], size=4_000)
    alarms = sum(relative_drop(Paired(*map(int, draw))).low > 0 for draw in draws)
    assert 0.005 < alarms / len(draws) < 0.035


def test_a_real_drop_is_seen() -> None:
    drop = relative_drop(Paired(both=660, lost=50, gained=2, neither=8))
    assert 0.03 < drop.low < 48 / 710 < drop.high
    # As docs/probing.md says.
    for total, right, seen, over_3_percent in ((720, 710, 6, 32), (100, 99, 5, 9)):
        drops = [relative_drop(Paired(right - lost, lost, 0, total - right)).low for lost in range(40)]
        assert sum(low <= 0 for low in drops) == seen
        assert sum(low <= 0.03 for low in drops) == over_3_percent
    assert relative_drop(Paired(0, 0, 3, 7)).low == 0


def test_pairs_are_of_the_same_items() -> None:
    before = {"a": True, "b": True, "c": False, "d": False}
    assert Paired.of(before, {"d": False, "c": True, "b": False, "a": True}) == Paired(1, 1, 1, 1)
    with pytest.raises(ValueError, match="same items"):
        Paired.of(before, {"a": True})


def test_the_interval_of_a_mean_is_wrong_as_often_as_it_says() -> None:
    """Of values that are far from normal, as likelihoods are: most small, a few large."""
    assert mean_interval([1.0] * 29) is None
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.exponential(1.0, 720).tolist()) for _ in range(2_000)]
    missed = sum(found is None or not found.low <= 1.0 <= found.high for found in intervals)
    assert 0.035 < missed / len(intervals) < 0.065
    assert mean_interval([0.5] * 30) == Interval(0.5, 0.5)


def test_a_small_rise_of_all_items_is_seen_where_no_answer_changes() -> None:
    items = [f"i{number}" for number in range(40)]
    right = dict.fromkeys(items, True)
    before = Outcome(right, right, {item: 0.01 * number for number, item in enumerate(items)})
    now = Outcome(right, right, {item: nll + 0.04 + 0.0001 * (len(item) % 2) for item, nll in before.nll.items()})
    report = Report.of("m@1", now, before)
    assert report.nll_baseline == pytest.approx(0.195)
    assert report.nll_rise_low is not None
    assert report.nll_rise_high is not None
    assert 0.04 <= report.nll_rise_low <= report.nll - 0.195 <= report.nll_rise_high < 0.0402
    assert "rise, 95 %: 0.040" in report.as_text()
    same = Report.of("m@1", before, before)
    assert (same.nll_rise_low, same.nll_rise_high) == (0.0, 0.0)


def test_a_baseline_from_before_likelihoods_compares_what_it_has() -> None:
    right = {"a": True}
    report = Report.of("m@1", Outcome(right, right, {"a": 0.5}), Outcome(right, right))
    assert (report.score_baseline, report.nll_baseline, report.nll_rise_low) == (1.0, None, None)


# --- questions --------------------------------------------------------------------------------------------------------


def test_the_shipped_golden_items_are_asked_whole_by_one_token_and_with_their_answer() -> None:
    items = read_golden(GOLDEN)
    asked = questions(items, MODEL)
    assert len(items) >= 600
    assert [question.kind for question in asked] == ["whole", "step", "likelihood"] * len(items)
    by_item = {item.id: item for item in items}
    ends = 0
    for whole, step, likelihood in zip(asked[::3], asked[1::3], asked[2::3], strict=True):
        answer = by_item[whole.item].answer
        assert (likelihood.prompt_ids, text_of(likelihood.forced_ids)) == (whole.prompt_ids, answer)
        assert likelihood.max_tokens == len(likelihood.forced_ids)
        given = text_of(step.prompt_ids[len(whole.prompt_ids) :])
        assert step.prompt_ids[: len(whole.prompt_ids)] == whole.prompt_ids
        assert answer.startswith(given)
        ends += step.token is None
        assert (given == answer) == (step.token is None)
        assert step.token is None or answer.startswith(given + text_of([step.token]))
    assert len(items) / 20 < ends < len(items) / 2  # positions are spread


def test_fewer_items_are_evenly_spread_and_always_the_same() -> None:
    some = read_golden(GOLDEN, 32)
    assert some == read_golden(GOLDEN, 32)
    assert len({item.id.split("-")[0] for item in some}) == 16
    assert len(read_golden(GOLDEN, 10_000)) == len(read_golden(GOLDEN))


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"id": "a", "messages": [], "answer": "b", "max_tokens": 3}\n',
     '{"id": "a", "messages": [{"role": "user", "content": "x"}], "answer": "b", "max_tokens": 0}\n',
     '{"id": "a", "messages": [{"role": "user", "content": "x"}], "answer": "b", "max_tokens": 5}\n' * 2],
)  # fmt: skip
def test_a_broken_golden_file_is_refused_in_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "golden.jsonl"
    path.write_text(text)
    with pytest.raises(SettingsError, match="cannot read golden items from"):
        read_golden(path)


def test_an_item_beyond_the_context_is_refused_with_its_numbers() -> None:
    items = read_golden(GOLDEN, 1)
    with pytest.raises(SettingsError, match="accepts 20"):
        questions(items, replace(MODEL, max_model_len=20))


def test_an_answer_is_right_if_it_is_the_text_and_a_step_if_it_is_the_token() -> None:
    whole = Question("a", "whole", [1], 9, text="42")
    ids = MODEL.tokenizer.encode(" 42\n", add_special_tokens=False)
    assert is_right(whole, ids, MODEL)
    assert not is_right(whole, [*ids, *ids], MODEL)
    assert is_right(Question("a", "step", [1], 1, token=7), [7], MODEL)
    assert not is_right(Question("a", "step", [1], 1, token=7), [], MODEL)
    assert is_right(Question("a", "step", [1], 1, token=None), [], MODEL)


# --- runs -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def probed(
    answer: Callable[[Generate], Sequence[int]],
    *,
    items: int = 20,
    patience_s: float = PATIENCE_S,
    script: Script | None = None,
) -> AsyncIterator[tuple[Prober, MemoryQueue, ScriptedWorker, list[Item]]]:
    """A prober over a queue whose worker answers so."""
    queue = MemoryQueue()
    worker = ScriptedWorker(queue, (MODEL.model_id,), script or Script(answer=answer))
    working = asyncio.create_task(worker.run())
    golden = read_golden(GOLDEN, items)
    asked = questions(golden, MODEL)
    prober = Prober(queue, MODEL, asked, concurrency=4, patience_s=patience_s, longest_wait_s=0.02)
    yield prober, queue, worker, golden
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    await queue.close()


def perfect(items: Sequence[Item], wrong: Sequence[str] = ()) -> Callable[[Generate], list[int]]:
    """What a model would say that knows all answers but these."""
    known = {(*each.prompt_ids, each.max_tokens): each for each in questions(items, MODEL) if not each.forced_ids}
    answers = {item.id: MODEL.tokenizer.encode(item.answer, add_special_tokens=False) for item in items}

    def answer(request: Generate) -> list[int]:
        question = known[(*request.prompt_ids, request.max_tokens)]
        if question.item in wrong:
            return [5, 6, 7]
        whole = answers[question.item]
        return whole if question.kind == "whole" else [] if question.token is None else [question.token]

    return answer


async def test_a_run_asks_everything_behind_everybody_else_and_a_few_at_a_time() -> None:
    golden = read_golden(GOLDEN, 20)
    async with probed(perfect(golden)) as (prober, queue, worker, items):
        outcome = await prober.run()
        assert outcome.whole == outcome.step == {item.id: True for item in items}
        assert outcome.nll == {item.id: 0.5 for item in items}
        assert len(worker.requests) == 60
        assert {(each.priority, each.tenant, each.sampling.temperature) for each in worker.requests} == {
            (-1, "millrace-prober", 0.0)
        }
        assert all(each.stop_token_ids == [EOS] and each.deadline_ms for each in worker.requests)
        assert len({each.request_id for each in worker.requests}) == 60
        assert (await queue.depth()).running_requests == 0


async def test_at_most_so_many_questions_are_in_the_queue_at_once() -> None:
    golden = read_golden(GOLDEN, 20)
    most = 0

    def answer(request: Generate) -> Sequence[int]:
        nonlocal most
        most = max(most, len(worker.running))
        return perfect(golden)(request)

    async with probed(answer, script=Script(answer=answer, step_s=0.002)) as (prober, _, worker, _):
        await prober.run()
    assert most == 4


async def test_wrong_answers_are_counted_and_compared_item_by_item(tmp_path: Path) -> None:
    golden = read_golden(GOLDEN, 20)
    wrong = [golden[3].id, golden[8].id]
    async with probed(perfect(golden)) as (prober, _, worker, items):
        good = await prober.run()
        worker.script.answer = perfect(golden, wrong)
        bad = await prober.run()
    path = tmp_path / "baseline.json"
    write_baseline(path, "other@1", Baseline.of(items, bad))
    write_baseline(path, MODEL.model_id, Baseline.of(items, good))
    baseline = read_baseline(path, MODEL.model_id, items)
    assert baseline is not None
    report = Report.of(MODEL.model_id, bad, baseline.outcome(items))
    assert (report.items, report.score, report.score_baseline) == (20, 0.9, 1.0)
    assert (report.agreement, report.agreement_baseline) == (0.9, 1.0)
    assert (report.wrong, report.missed) == (sorted(wrong), sorted(wrong))
    assert report.drop_low == relative_drop(Paired(18, 2, 0, 0)).low
    assert json.loads(report.as_json())["score"] == 0.9
    assert "90.00%" in report.as_text()
    assert "baseline 100.00%" in report.as_text()
    other = read_baseline(path, "other@1", items)
    assert other is not None
    assert other.outcome(items).whole == bad.whole
    assert read_baseline(path, "unknown@1", items) is None


def test_a_baseline_of_other_items_is_refused(tmp_path: Path) -> None:
    items = read_golden(GOLDEN, 4)
    right = {item.id: True for item in items}
    path = tmp_path / "baseline.json"
    write_baseline(path, "m@1", Baseline.of(items, Outcome(right, right, {item.id: 0.1 for item in items})))
    with pytest.raises(SettingsError, match="other golden items"):
        read_baseline(path, "m@1", read_golden(GOLDEN, 5))
    path.write_text('{"version": 2}')
    with pytest.raises(SettingsError, match="cannot read a baseline"):
        read_baseline(path, "m@1", items)


async def test_a_run_without_answers_fails_and_leaves_nothing_behind() -> None:
    script = Script(answer=lambda request: [5] * 9, silent_after=0)
    async with probed(script.answer, items=4, patience_s=0.2, script=script) as (prober, queue, _, _):
        with pytest.raises(ProbeFailed, match=r"no answer within|the deadline passed"):
            await prober.run()
        for _ in range(200):
            if (depth := await queue.depth()).running_requests == depth.queued_requests == 0:
                break
            await asyncio.sleep(0.02)
        assert (depth.running_requests, depth.queued_requests) == (0, 0)


async def test_an_answer_that_failed_once_is_asked_for_again() -> None:
    golden = read_golden(GOLDEN, 6)
    script = Script(answer=perfect(golden), fail_after=0)
    failures = 0

    def answer(request: Generate) -> Sequence[int]:
        nonlocal failures
        failures += 1
        script.fail_after = 0 if failures == 1 else None
        return perfect(golden)(request)

    script.answer = answer
    async with probed(answer, items=6, script=script) as (prober, _, worker, items):
        outcome = await prober.run()
    assert outcome.whole == {item.id: True for item in items}
    assert len(worker.requests) == 19


async def test_an_impossible_answer_is_a_number_that_can_be_compared(tmp_path: Path) -> None:
    golden = read_golden(GOLDEN, 4)
    script = Script(answer=perfect(golden), logprob=lambda request: -math.inf)
    async with probed(script.answer, items=4, script=script) as (prober, _, _, items):
        outcome = await prober.run()
    assert set(outcome.nll.values()) == {WORST_NLL}
    write_baseline(tmp_path / "b.json", MODEL.model_id, Baseline.of(items, outcome))
    baseline = read_baseline(tmp_path / "b.json", MODEL.model_id, items)
    assert baseline is not None
    assert baseline.outcome(items) == replace(outcome, seconds=0.0)


async def test_a_model_that_only_fails_fails_the_run_in_its_words() -> None:
    script = Script(answer=lambda request: [5] * 9, fail_after=0)
    async with probed(script.answer, items=4, script=script) as (prober, _, _, _):
        with pytest.raises(ProbeFailed, match="the worker was lost"):
            await prober.run()


async def test_a_full_queue_is_waited_for() -> None:
    golden = read_golden(GOLDEN, 2)
    async with probed(perfect(golden), items=2) as (prober, queue, _, items):
        filler = generate("filler", prompt_tokens=1, max_tokens=4_000_000 - 1 - 60, model="nobody")
        await queue.submit(filler)
        running = asyncio.create_task(prober.run())
        await asyncio.sleep(0.05)
        await queue.cancel("filler")
        assert set((await running).whole) == {item.id for item in items}


def test_prometheus_sees_the_last_run_and_no_baseline_that_is_not_there() -> None:
    registry = CollectorRegistry()
    metrics = ProbeMetrics(registry)
    now = Outcome({"a": True, "b": False}, {"a": True, "b": True}, {"a": 0.25, "b": 0.5}, 1.5)
    metrics.show(Report.of("m@1", now, None), 1_700_000_000.0)

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"millrace_probe_{name}", {"model_name": "m@1"})

    assert (value("items"), value("score"), value("agreement")) == (2, 0.5, 1.0)
    assert value("last_success_timestamp_seconds") == 1_700_000_000.0
    assert (value("nll"), value("nll_low"), value("nll_baseline")) == (0.375, None, None)
    assert (value("score_baseline"), value("drop_low"), value("agreement_baseline")) == (None, None, None)
    both = {"a": True, "b": True}
    metrics.show(Report.of("m@1", now, Outcome(both, both, {"a": 0.25, "b": 0.25})), 1_700_000_001.0)
    assert (value("score_baseline"), value("agreement_baseline"), value("nll_baseline")) == (1.0, 1.0, 0.25)
    assert value("nll_rise_low") is None  # two items say nothing of a mean
    assert math.isclose(value("drop_low") or 0.0, relative_drop(Paired(1, 1, 0, 0)).low)
