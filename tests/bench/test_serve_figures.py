"""Slopes, rates and recovery of load runs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from bench.serve.figures import (
    MOST_POINTS,
    Probe,
    arrivals,
    milliseconds,
    percentile,
    rate_within,
    recovered_at,
    spread,
    theil_sen,
)


def test_a_slope_is_that_of_the_line_though_a_fifth_of_the_points_are_wild() -> None:
    times = [float(second) for second in range(100)]
    values = [500.0 if second % 5 == 3 else 7.0 - 0.25 * second for second in range(100)]
    assert theil_sen(times, values) == pytest.approx(-0.25)


def test_a_long_run_is_thinned_and_keeps_its_slope() -> None:
    count = 20 * MOST_POINTS + 1
    assert theil_sen([0.5 * n for n in range(count)], [3.0 * n for n in range(count)]) == pytest.approx(6.0)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 1.0]])
def test_too_few_points_have_no_slope(times: list[float]) -> None:
    assert math.isnan(theil_sen(times, [2.0] * len(times)))


def test_nothing_has_no_percentile_and_a_report_says_none() -> None:
    assert milliseconds(percentile([], 99)) is None
    assert milliseconds(percentile([0.001, 0.003], 50)) == 2.0


def test_spread_is_median_smallest_largest() -> None:
    assert spread([3.0, 1.0, 2.5]) == [2.5, 1.0, 3.0]


def test_only_what_ends_within_the_time_counts_for_the_rate() -> None:
    assert rate_within([0.9, 1.0, 2.0, 2.9, 3.0], 1.0, 3.0) == 1.5


def test_arrivals_are_a_poisson_process_that_the_seed_decides() -> None:
    found = arrivals(rate=200.0, seconds=50.0, seed=3)
    assert found == arrivals(200.0, 50.0, 3) != arrivals(200.0, 50.0, 4)
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] < 50.0
    assert abs(len(found) - 10_000) < 4 * 100  # four standard deviations
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


@pytest.mark.parametrize(
    ("first_tokens", "recovered"),
    [
        ([1, 1, 1], 0.0),
        ([9, 9, 1, 9, 1, 1], 2.0),  # one of three may be slow, but not the first
        ([1, None, 1, 1, 1], 2.0),  # one that was refused is no answer, however fast the others
        ([None, 9, 1, 9, 1, 1], 2.0),
        ([9, 9, 9, 9], None),
        ([1, 1], None),
    ],
)
def test_recovery_begins_with_the_first_of_enough_good_probes(
    first_tokens: list[float | None], recovered: float | None
) -> None:
    probes = [Probe(float(number), ttft_s) for number, ttft_s in enumerate(first_tokens)]
    assert recovered_at(probes, ttft_s=2.0, in_a_row=3) == recovered
