"""What soak, overload and wrk runs make of what they saw."""

from __future__ import annotations

import argparse
from array import array

import pytest

from bench.serve.__main__ import MODES
from bench.serve.client import Answer
from bench.serve.loops import Outcomes
from bench.serve.overload import OverloadPlan, share_of_peak, smallest_good
from bench.serve.plan import add_flags, read_plan
from bench.serve.readings import Reading, Sample
from bench.serve.report import table
from bench.serve.requests import Load, Round, figures, parse_wrk
from bench.serve.soak import MIB, SoakPlan, Tally, Window, process_rows, slope_row
from bench.serve.workload import FIRST_ID, NUM_IDS, fields, repeated

WRK = """Running 10s test @ http://127.0.0.1:8000
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    63.42ms   11.20ms 151.31ms   90.26%
    Req/Sec     1.02k    98.31     1.21k    71.00%
  Latency Distribution
     50%  950.00us
     75%   65.93ms
     90%   71.77ms
     99%    1.02s
  10108 requests in 10.02s, 5.03MB read
Requests/sec:   1008.78
Transfer/sec:    513.84KB
"""


def answer(sent_at: float, *times: float, status: int = 200, reason: str | None = "length") -> Answer:
    """One token at each time; it ends with the last."""
    found = Answer()
    found.sent_at, found.status, found.finish_reason = sent_at, status, reason
    found.times, found.token_ids = list(times), list(range(len(times)))
    found.ended_at = times[-1] if times else sent_at + 0.5
    return found


# --- soak


def test_first_tokens_and_gaps_fall_into_the_window_in_which_they_ended() -> None:
    window = Window(10.0, 20.0)
    for each in (
        answer(8.0, 9.0, 9.5),  # before
        answer(8.0, 9.0, 10.5, 11.0),  # its first token was before
        answer(19.0, 19.5, 20.5),  # its gap is after
        answer(19.5, 20.0),
        answer(12.0),  # nothing came
    ):
        window.note(each)
    assert window.ttft == array("d", [0.5])
    assert window.gaps == array("d", [1.5, 0.5])
    assert window.report() == {"ttft_ms_p50": 500, "ttft_ms_p99": 500, "gap_ms_p50": 1000, "gap_ms_p99": 1490}


@pytest.mark.parametrize(
    ("expected", "reason", "wrong", "errors"),
    [
        ([0, 1, 2], "length", 0, 0),
        ([0, 9, 2], "length", 1, 0),
        ([0, 1], "length", 1, 0),
        ([0, 1, 2, 3], "length", 1, 0),  # too short, though it says that it is whole
        ([0, 1, 2, 3], None, 0, 1),  # cut off: an error, and what came is right
        ([0, 1, 9, 3], None, 1, 1),
    ],
)
def test_every_token_is_compared(expected: list[int], reason: str | None, wrong: int, errors: int) -> None:
    tally = Tally()
    tally.note(answer(0.0, 1.0, 2.0, 3.0, reason=reason), expected)
    assert (tally.wrong, tally.errors.total(), tally.answers, tally.tokens) == (wrong, errors, 1, 3)


def test_growth_is_counted_once_the_run_has_settled() -> None:
    points = [(float(second), (100 + 10 * min(second, 60)) * MIB) for second in range(60)]
    points += [(float(second), 720 * MIB + second * MIB // 10) for second in range(60, 300)]
    row = slope_row(points, settle_s=60)
    assert (row["start_mib"], row["settled_mib"], row["end_mib"]) == (100, 726, 749.9)
    assert row["mib_per_hour"] == pytest.approx(360, rel=0.001)
    assert row["percent_per_hour"] == pytest.approx(100 * 360 / 726, rel=0.001)


def test_a_run_too_short_for_a_slope_has_none() -> None:
    row = slope_row([(0.0, MIB), (1.0, 2 * MIB)], settle_s=1)
    assert (row["mib_per_hour"], row["percent_per_hour"]) == (None, None)


def test_a_process_is_shown_before_in_and_after_the_run() -> None:
    readings = [Reading(10.0 + second, 50 * MIB, 4 + second % 2, 20 + second) for second in range(11)]
    samples = [Sample(float(second), {"gateway": each}, 0) for second, each in enumerate(readings)]
    before, after = {"gateway": Reading(9.0, 40 * MIB, 3, 10)}, {"gateway": Reading(22.0, 50 * MIB, 4, 11)}
    row = process_rows(samples, before, after, settle_s=5)["gateway"]
    assert (row["files_before"], row["files_most"], row["files_after"]) == (10, 30, 11)
    assert (row["threads_before"], row["threads_most"], row["cores"]) == (3, 5, 1.0)
    assert (row["mib_per_hour"], row["percent_per_hour"]) == (0, 0)


# --- overload


def test_only_whole_answers_within_the_deadline_from_when_they_were_due_are_good() -> None:
    refused = answer(2.1, status=429, reason=None)
    refused.ended_at = 2.15
    expired = answer(3.0, 3.5, reason=None)
    expired.error = "deadline_exceeded"
    outcomes = Outcomes(
        [
            (1.0, answer(1.0, 2.0, 5.5)),
            (1.0, answer(3.0, 4.0, 6.5)),  # within 5 s of when it was sent, not of when it was due
            (2.0, refused),
            (3.0, expired),
            (4.0, answer(4.0, 4.2, 4.4)),
        ],
        unsent=2,
    )
    found = outcomes.report(deadline_s=5.0, start=4.0, end=5.0)
    assert (found["sent"], found["good"], found["late"], found["unsent"]) == (5, 2, 1, 2)
    assert (found["refused"], found["errors"]) == ({"429": 1}, {"deadline_exceeded": 1})
    assert found["good_per_s"] == 1.0  # the other one ended later
    assert found["refusal_ms_p50"] == 150.0  # from when it was due: 100 of them are the client's own
    assert found["ttft_ms_p50"] == 1000.0
    assert found["sent_late_ms_p99"] == pytest.approx(1924, abs=1)


def test_the_queue_is_bounded_by_what_the_capacity_empties_in_its_time() -> None:
    plan = OverloadPlan(prompt_tokens=16, new_tokens=128, queue_s=2.0)
    assert plan.max_queued_tokens(100.0) == 28_800
    assert plan.max_queued_tokens(0.01) == 144  # one request at least


def test_the_capacity_is_that_of_the_fewest_clients_who_get_as_much_as_any() -> None:
    search = [{"clients": clients, "good_per_s": rate} for clients, rate in ((32, 94.0), (64, 96.0), (128, 100.0))]
    assert smallest_good(search)["clients"] == 64
    assert smallest_good([{"clients": 32, "good_per_s": 0.0}])["clients"] == 32


def test_goodput_is_compared_with_the_peaks_of_all_rounds() -> None:
    peaks = [{"good_per_s": rate} for rate in (100.0, 140.0, 120.0, 80.0)]
    overloads = [{"good_per_s": rate} for rate in (96.0, 117.0, 110.0)]
    assert share_of_peak(peaks, overloads) == [1.0, 0.8, 1.1]


# --- wrk


def test_wrk_is_read_in_all_its_units() -> None:
    assert parse_wrk(WRK) == Load(10_108, 1008.78, 0.95, 1020.0, 0)


def test_what_wrk_could_not_do_is_counted() -> None:
    errors = "  Socket errors: connect 1, read 2, write 0, timeout 4\n  Non-2xx or 3xx responses: 100\n"
    assert parse_wrk(WRK.replace("Requests/sec", errors + "Requests/sec")).failed == 107


def test_what_is_not_wrk_is_shown() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_rounds_become_medians_with_their_spread() -> None:
    rounds = [
        Round(Load(10, rate, 1.0, 2.0, failed), {"gateway": rate / 1000}) for rate, failed in ((900, 0), (500, 3))
    ]
    found = figures(rounds)
    assert found["requests_per_s"] == [700.0, 500.0, 900.0]
    assert found["cpu_ms"] == {"gateway": [0.7, 0.5, 0.9]}
    assert found["failed"] == 3


# --- what is asked, flags, tables


def test_requests_of_different_numbers_differ_and_stay_within_the_vocabulary() -> None:
    prompts = [fields(number, 16, 8)["input_ids"] for number in range(20_000)]
    assert len({tuple(prompt) for prompt in prompts if isinstance(prompt, list)}) == 20_000
    ids = {token for prompt in prompts[::97] if isinstance(prompt, list) for token in prompt}
    assert FIRST_ID <= min(ids) <= max(ids) < FIRST_ID + NUM_IDS


def test_repeated_requests_are_greedy_and_sampled() -> None:
    assert {each["temperature"] for each in repeated(16, 8)} == {0.0, 0.9}


@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_a_plan_is_a_flag_with_a_bound(mode: str) -> None:
    plan = MODES[mode].plan
    parser = argparse.ArgumentParser()
    add_flags(parser, plan)
    assert read_plan(parser, parser.parse_args([]), plan) == plan()
    assert read_plan(parser, parser.parse_args(["--seconds", "30"]), plan).seconds == 30
    with pytest.raises(SystemExit):
        read_plan(parser, parser.parse_args(["--seconds", "-1"]), plan)
    with pytest.raises(SystemExit):
        read_plan(parser, parser.parse_args(["--seconds", "nan"]), plan)


def test_edges_of_a_short_soak_do_not_overlap() -> None:
    assert (SoakPlan(seconds=300.0).edge_s, SoakPlan(seconds=20.0).edge_s) == (60.0, 10.0)


def test_columns_of_a_table_stand_under_each_other() -> None:
    assert table([["ms", "first"], ["p50", 1234.5], ["p99", None]]) == "ms     first\np50  1,234.5\np99        -"
